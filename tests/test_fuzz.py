"""Feed 2,000 malformed inputs to the program.

Each input is accepted, or refused in a sentence that names the cause. None hangs, crashes or
loses data.
"""

import json
import random
import shutil
import signal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.training.train_state import TrainState
from helpers import FULL_PPO, command_line, tiny_policy, word_tokenizer

from ppo_jax import cli, data
from ppo_jax.errors import CheckpointError, SettingError
from ppo_jax.hashing import digest
from ppo_jax.models.io import pretrained
from ppo_jax.ops.kl import fixed_kl
from ppo_jax.ops.rewards import running_scale
from ppo_jax.ppo import iteration
from ppo_jax.run.checkpoints import Checkpoints
from ppo_jax.run.compare import compare
from ppo_jax.run.files import cut_back
from ppo_jax.run.resume import RunConfig, check_unchanged

JUNK = [
    None,
    True,
    -1,
    0,
    3,
    10**30,
    1.5,
    float("nan"),
    float("inf"),
    "",
    "🙂",
    "gpt2",
    [],
    [1, "a"],
    {},
    {"a": 1},
]


@pytest.fixture(autouse=True)
def no_hang():
    """End a test with an error if it still runs after four minutes."""

    def time_out(*_):
        raise TimeoutError("a malformed input hangs")

    before = signal.signal(signal.SIGALRM, time_out)
    signal.alarm(240)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    place = tmp_path_factory.mktemp("fuzz") / "model"
    small = tiny_policy(width=8, layers=1, mlp_width=8)
    pretrained.save_policy(place, small, word_tokenizer())
    return place


def mutated(rng, content):
    """Return the content with some bytes flipped, cut off, inserted or removed."""
    content = bytearray(content)
    match rng.randrange(4):
        case 0:
            for _ in range(rng.choice((1, 1, 3, 20))):
                content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        case 1:
            del content[rng.randrange(len(content)) :]
        case 2:
            at = rng.randrange(len(content))
            content[at:at] = bytes(rng.randrange(256) for _ in range(rng.randrange(1, 40)))
        case 3:
            start = rng.randrange(len(content))
            content[start : start + rng.randrange(1, 40)] = b""
    return bytes(content)


def assert_sentence(error):
    text = str(error)
    assert len(text) > 15 and " " in text, repr(text)


FIELDS = [
    *(f"ppo.{name.replace('_', '-')}" for name in vars(FULL_PPO)),
    *("loop.updates", "loop.keep", "loop.save-every", "loop.faults.reward-timeout-s"),
    *("lora.rank", "lora.alpha", "dtype", "preset", "resume", "no-such-option"),
]
VALUES = [
    *("nan", "inf", "-inf", "-1", "0", "1e999", "", "None", "🙂", "[]", "true", "9" * 30, "0x10"),
    *("1e-400", "7", "--"),
]


@pytest.mark.slow
@pytest.mark.parametrize("part", range(5))
def test_350_settings(part, model, tmp_path, capsys):
    """Set options of `ppo-jax train` to valid and invalid values.

    With valid values a run is built, and its steps are traced.
    """

    def trace(trainer):
        state, prompts = (
            trainer.state,
            trainer.prompts.take(np.zeros(trainer.learner.agent.config.batch_size, int)),
        )
        collector = trainer.collector
        steps, frozen, ref_params = collector.steps, collector.frozen, collector.ref_params
        rollout = jax.eval_shape(steps.sample, state, prompts.tokens, prompts.mask, frozen=frozen)
        scores = jax.eval_shape(steps.score, state, ref_params, rollout, frozen=frozen)
        task = jax.ShapeDtypeStruct(rollout.ended.shape, jnp.float32)
        jax.eval_shape(steps.learn, state, rollout, scores, task, frozen=frozen)

    (tmp_path / "r.py").write_text(
        "def f(prompts, responses):\n    return [0.0] * len(responses)\n"
    )
    (tmp_path / "p.txt").write_text("a b\nc\n")
    given = {"model": model, "prompts": tmp_path / "p.txt", "reward": f"{tmp_path / 'r.py'}:f"}
    sizes = {"ppo.max-new-tokens": 8, "ppo.batch-size": 8}
    base = [*command_line("train", **given, **sizes), "--loop.no-tensorboard"]
    rng = random.Random(part)
    for number in range(70):
        args = [
            x
            for _ in range(rng.choice((1, 2)))
            for x in (f"--{rng.choice(FIELDS)}", rng.choice(VALUES))
        ]
        out, error = tmp_path / str(number), None
        try:
            trainer = cli.parse([*base, "--out", str(out), *args]).build(out)
        except SystemExit as stop:
            printed = capsys.readouterr()
            error = printed.err + printed.out if stop.code == 2 else ""
        except (ValueError, RuntimeError, OSError, SettingError) as refused:
            error = str(refused)
        else:
            trace(trainer)
        assert error is None or len(error) > 15, args
        assert out.exists() == (error is None), (args, error)


def test_600_prompt_files(tmp_path):
    rng, words = random.Random(1), word_tokenizer()
    # fmt: off
    odd = [
        "", " ", "a", "\u202e", "\ud7ff", "\U0001f642" * 9, "a\x00b", "e\u0301" * 30, "a " * 5000,
        "\ufeffa", "\u2028", "\r", "[]", "{}", '{"prompt": ""}', '{"prompt": null}',
        '{"prompt": ["a"]}', '{"prompt": [{"role": "user"}]}', '{"a": 1}', '"a"', "[" * 3000,
        '{"prompt": [{"role": "user", "content": "a"}]}', '{"prompt": "\\ud800"}',
        '{"prompt": "a\u2028b"}', "NaN",
    ]
    # fmt: on
    for number in range(600):
        file = tmp_path / f"prompts{number % 2}.{rng.choice(('txt', 'jsonl'))}"
        lines = [rng.choice(odd) for _ in range(rng.randrange(1, 4))]
        content = "\n".join(lines).encode("utf-8", "surrogatepass")
        file.write_bytes(mutated(rng, content) if content and rng.random() < 0.5 else content)
        try:
            rows = data.read_rows(file)
            made = data.encode_prompts(rows, words, positions=16, new_tokens=4, pad_id=0)
        except ValueError as error:
            assert_sentence(error)
        else:
            assert made.tokens.shape == made.mask.shape and made.mask.any(axis=1).all()


def corrupt_header(rng, content):
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    name = rng.choice([n for n in header if n != "__metadata__"])
    match rng.randrange(6):
        case 0:
            header[name][rng.choice(("dtype", "shape", "data_offsets"))] = rng.choice(JUNK)
        case 1:
            header[name]["data_offsets"] = [
                rng.choice((-1, 0, 8, 2**63)),
                rng.choice((0, 4, 2**62)),
            ]
        case 2:
            header[name]["shape"] = [rng.choice((0, -1, 2**40, 3)) for _ in range(rng.randrange(4))]
        case 3:
            header[rng.choice(("x", "", "🙂", "__metadata__"))] = header.pop(name)
        case 4:
            header[name]["dtype"] = rng.choice(("F64", "I8", "BOOL", "F8_E4M3", "U64", "nothing"))
        case 5:
            return rng.choice((0, 1, 2**20, 2**63, 2**64 - 1)).to_bytes(8, "little") + content[8:]
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + content[8 + size :]


@pytest.mark.slow
def test_450_weight_files(model, tmp_path):
    rng, folder = random.Random(2), tmp_path / "model"
    shutil.copytree(model, folder)
    content, like = (
        (model / "model.safetensors").read_bytes(),
        jax.tree.structure(pretrained.load_policy(model).params),
    )
    for number in range(450):
        (folder / "model.safetensors").write_bytes(
            (corrupt_header, mutated)[number % 2](rng, content)
        )
        try:
            loaded = pretrained.load_policy(folder)
        except ValueError as error:
            assert_sentence(error)
        else:
            assert jax.tree.structure(loaded.params) == like


@pytest.mark.slow
def test_200_model_configs(model, tmp_path):
    rng, folder = random.Random(3), tmp_path / "model"
    shutil.copytree(model, folder)
    config = json.loads((model / "config.json").read_text())
    for number in range(200):
        text = json.dumps(config | {rng.choice(list(config)): rng.choice(JUNK)}).encode()
        (folder / "config.json").write_bytes(mutated(rng, text) if number % 2 else text)
        try:
            pretrained.load_policy(folder)
        except ValueError as error:
            assert_sentence(error)


def state(update):
    params = {
        "policy": {"w": jnp.full((40, 30), update, jnp.float32) + jnp.arange(30.0)[None]},
        "critic": {"b": jnp.ones(3)},
    }
    train = TrainState.create(apply_fn=None, params=params, tx=optax.adam(0.1)).replace(
        step=jnp.int32(update)
    )
    return iteration.PPOState(
        train, fixed_kl(0.1).init(), running_scale().init(), jax.random.key(0), jnp.int32(update)
    )


@pytest.mark.slow
@pytest.mark.parametrize("part", range(2))
def test_250_checkpoints(tmp_path, part):
    """If the newest checkpoint is damaged, the one before it is restored, intact."""
    rng = random.Random(10 + part)
    whole = Checkpoints(tmp_path / "whole")
    whole.save(state(1)), whole.save(state(2), {"sizes": {"metrics.jsonl": 7}})
    whole.close()
    good = {number: digest(state(number).train) for number in (1, 2)}
    seen = set()
    for _ in range(125):
        folder = tmp_path / "now"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(tmp_path / "whole", folder)
        files = sorted(p for p in (folder / "2").rglob("*") if p.is_file())
        file = rng.choice(files)
        if rng.random() < 0.1:
            file.unlink()
        elif content := file.read_bytes():
            file.write_bytes(mutated(rng, content))
        checkpoints = Checkpoints(folder)
        back, about = checkpoints.restore(state(0))
        checkpoints.close()
        number = int(back.update)
        assert digest(back.train) == good[number] and (
            number == 1 or about["sizes"] == {"metrics.jsonl": 7}
        )
        assert (folder / "2").is_dir() == (number == 2)
        seen.add(number)
    assert seen == {1, 2}


def test_arrays_of_another_checkpoint_are_detected(tmp_path):
    """Every file is intact, so only the digest of the restored arrays can show the mix-up."""
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(state(1)), checkpoints.save(state(2))
    checkpoints.close()
    shutil.rmtree(tmp_path / "2/state")
    shutil.copytree(tmp_path / "1/state", tmp_path / "2/state")
    checkpoints = Checkpoints(tmp_path)
    back, _ = checkpoints.restore(state(0))
    checkpoints.close()
    assert int(back.update) == 1 and (tmp_path / "2.damaged").is_dir()


def test_150_run_folders(tmp_path):
    """Damage the files of a run: `config.json`, `metrics.jsonl` and all checkpoints."""
    rng = random.Random(4)
    config = {
        "settings": {"ppo": {"lam": 0.9}, "loop": {"faults": {}}},
        "hashes": {"model": "a"},
        "processes": [{"xla_flags": ""}],
    }
    for number in range(140):
        odd = json.loads(json.dumps(config))
        part = rng.choice(
            (odd, odd["settings"], odd["settings"]["ppo"], odd["settings"]["loop"], odd["hashes"])
        )
        part[rng.choice(list(part))] = rng.choice(JUNK)
        content = json.dumps(odd if number % 2 else config).encode()
        (tmp_path / "config.json").write_bytes(content if number % 2 else mutated(rng, content))
        (tmp_path / "metrics.jsonl").write_bytes(((b"x" * 14 + b"\n") * 2)[: rng.randrange(30)])
        before = (tmp_path / "metrics.jsonl").read_bytes()
        now = RunConfig(
            {
                name: config["settings"].get(name, {})
                for name in ("ppo", "loop", "command", "data", "jax")
            },
            config["hashes"],
        )
        unchanged = lambda now=now: check_unchanged(tmp_path, now)
        for attempt in (
            unchanged,
            lambda: compare(tmp_path, tmp_path),
            lambda: cut_back(tmp_path, {"metrics.jsonl": 15}),
        ):
            try:
                attempt()
            except ValueError as error:
                assert_sentence(error)
        after = (tmp_path / "metrics.jsonl").read_bytes()
        assert after == before if len(before) < 15 else after == before[:15], number
    for number in range(10):
        folder = tmp_path / f"bad{number}"
        checkpoints = Checkpoints(folder)
        checkpoints.save(state(1))
        checkpoints.close()
        for file in (p for p in (folder / "1").rglob("*") if p.is_file()):
            file.write_bytes(bytes(rng.randrange(256) for _ in range(file.stat().st_size)))
        checkpoints = Checkpoints(folder)
        with pytest.raises(CheckpointError, match="Checkpoint 1 in"):
            checkpoints.restore(state(0))
        checkpoints.close()
        assert np.size(list(folder.glob("1.damaged"))) == 1
