"""Checkpoints of a run become models, and new runs start from models, adapters and checkpoints."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
import transformers
from helpers import options, tiny_policy, word_tokenizer

from ppo_jax import cli
from ppo_jax.commands.training import build
from ppo_jax.models import heads
from ppo_jax.models.io import pretrained, scorers
from ppo_jax.run.files import read_lines

CLOSE = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)
TOKENS = np.array([[1, 2, 3, 4, 5]])


def train_arguments(place, out, *flags, **more):
    given = {
        "model": place / "model",
        "prompts": place / "prompts.txt",
        "reward": f"{place / 'reward.py'}:score",
        "out": place / out,
        "loop.updates": 3,
        "loop.save-every": 1,
        "loop.keep": 9,
        "ppo.batch-size": 8,
        "ppo.max-new-tokens": 4,
        "ppo.learning-rate": 0.01,
    } | more
    return ["train", "--loop.no-progress", "--mesh", "data=1", *options(given), *flags]


def train(place, out, *flags, **more):
    cli.main(train_arguments(place, out, *flags, **more))
    return place / out


def refused(capsys, arguments):
    with pytest.raises(SystemExit):
        cli.main([str(x) for x in arguments])
    return capsys.readouterr().err


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Return a folder with a model, prompts, a reward and two runs, of which one has adapters."""
    place = tmp_path_factory.mktemp("place")
    pretrained.save_policy(place / "model", tiny_policy(layers=1), word_tokenizer())
    (place / "prompts.txt").write_text("a b\nc\nd e f\n")
    (place / "reward.py").write_text(
        "def score(prompts, responses):\n    return [r.count('b') for r in responses]\n"
    )
    train(place, "whole", critic="shared")
    held_out = {"eval-prompts": place / "prompts.txt", "loop.eval-every": 1}
    train(place, "adapted", **held_out, **{"lora.rank": 2, "lora.targets": "attn/(q|o)$"})
    return place


def convert(run, out, **given):
    cli.main(["convert", str(run), *options({"out": out, **given})])
    return out


def same_values(folder, values):
    """Check that `transformers` reads a critic with this value at the last token."""
    peer = transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval()
    with torch.no_grad():
        scores = peer(torch.tensor(TOKENS)).logits[:, 0]
    CLOSE(np.asarray(scores), values[:, -1])


def values_of(folder):
    scorer = scorers.load_scorer(folder)
    critic = heads.separate_critic(scorer.config)
    hidden = jnp.zeros((1, TOKENS.shape[1], 1))
    return np.asarray(critic(scorer.params, hidden, jnp.asarray(TOKENS), TOKENS >= 0))


def test_the_last_checkpoint_becomes_a_policy_a_critic_and_an_adapter(place, tmp_path, capsys):
    for run, parts in {"whole": "critic, model", "adapted": "adapter, critic, model"}.items():
        out = convert(place / run, tmp_path / run)
        assert f"after 3 updates are in {out}, in the format that transformers loads: {parts}." in (
            capsys.readouterr().out
        )
        want, got = pretrained.load_policy(place / run), pretrained.load_policy(out)
        jax.tree.map(np.testing.assert_array_equal, got.params, want.params)
        peer = transformers.AutoModelForCausalLM.from_pretrained(out / "model")
        assert transformers.AutoTokenizer.from_pretrained(out / "model")("a").input_ids == [1]
        values = values_of(out / "critic")
        assert np.abs(values).max() > 1e-3
        same_values(out / "critic", values)
    base = transformers.AutoModelForCausalLM.from_pretrained(place / "model")
    theirs = peft.PeftModel.from_pretrained(base, out / "adapter").eval()
    with torch.no_grad():
        CLOSE(theirs(torch.tensor(TOKENS)).logits, peer.eval()(torch.tensor(TOKENS)).logits)
    # The trunk of a shared critic is the policy.
    trunk = scorers.load_scorer(tmp_path / "whole/critic").params["trunk"]
    jax.tree.map(
        np.testing.assert_array_equal, trunk, pretrained.load_policy(place / "whole").params
    )


def test_the_best_checkpoint_or_a_numbered_one_is_converted(place, tmp_path, capsys):
    rows = [
        row
        for row in read_lines(place / "adapted/metrics.jsonl")
        if "eval/scores" in row and row["update"] >= 0
    ]
    best = max(rows, key=lambda row: (row["eval/scores"], -row["update"]))["update"] + 1
    outs = {}
    for update in (1, 2, 3, "best"):
        outs[update] = convert(place / "adapted", tmp_path / str(update), update=update)
    assert f"The models after {best} updates" in capsys.readouterr().out.splitlines()[-1]
    found = {update: (out / "model/model.safetensors").read_bytes() for update, out in outs.items()}
    assert found["best"] == found[best] and len(set(found.values())) == 3


def test_what_cannot_be_converted_is_refused_before_anything_is_written(place, tmp_path, capsys):
    run, out = place / "whole", ["--out", tmp_path / "out"]
    cases = {
        "has no checkpoint after 7 updates; it has those after [1, 2, 3]": [run, "--update", 7],
        "was not evaluated on held-out prompts": [run, "--update", "best"],
        "either the folder of a run or --model": [run, "--model", place / "model"],
        "a run has its own adapter": [run, "--adapter", place / "adapted/adapter"],
        "is for the folder of a run, not": ["--model", place / "model", "--update", 2],
        "is not the folder of a run, because it has no config.json": [place / "model/nothing"],
        f"but of a model; ppo-jax train and convert take a model as --model {place}": [
            place / "model"
        ],
    }
    for message, arguments in cases.items():
        assert message in refused(capsys, ["convert", *arguments, *out])
        assert not (tmp_path / "out").exists()


def test_another_base_model_of_adapters_is_warned_about(place, tmp_path, capsys):
    other = tiny_policy(layers=1)
    other = other._replace(params=jax.tree.map(lambda x: x + 1, other.params))
    pretrained.save_policy(tmp_path / "other", other, word_tokenizer())
    (tmp_path / "run").mkdir()
    (tmp_path / "run/checkpoints").symlink_to(place / "adapted/checkpoints")
    config = json.loads((place / "adapted/config.json").read_text())
    config["settings"]["command"]["model"] = str(tmp_path / "other")
    (tmp_path / "run/config.json").write_text(json.dumps(config))
    convert(tmp_path / "run", tmp_path / "out")
    assert "the adapters were trained over another model" in capsys.readouterr().err


def shown(run):
    """Return the metrics of a run by update, without timings."""
    rows = [row for row in read_lines(run / "metrics.jsonl") if "objective/kl" in row]
    return [{k: x for k, x in row.items() if not k.startswith(("time", "perf"))} for row in rows]


@pytest.mark.slow
def test_a_fork_starts_from_a_checkpoint_and_says_so(place, tmp_path, capsys):
    """Without another setting it repeats the run; with another one it differs from there on."""
    source = {"resume": "fork", "fork-from": place / "whole", "fork-update": 2, "critic": "shared"}
    same = train(place, tmp_path / "same", **source)
    assert f"from {place / 'whole'} after 2 updates" in capsys.readouterr().out
    assert shown(same) == shown(place / "whole")[2:]
    config = json.loads((same / "config.json").read_text())
    assert config["forked_from"] == {
        "run": str(place / "whole"),
        "update": 2,
        "digest": config["forked_from"]["digest"],
        "changes": {},
    }
    other = {**source, "ppo.kl-coef": 0.5, "loop.updates": 4, "loop.seed": 1}
    half = train(place, tmp_path / "half", **other | {"loop.updates": 3})
    (place / "whole").rename(place / "aside")  # A forked run needs the other one at its start only.
    try:
        del other["fork-from"], other["fork-update"]
        train(place, half, **other | {"resume": "auto"})
    finally:
        (place / "aside").rename(place / "whole")
    config = json.loads((half / "config.json").read_text())
    changes = config["forked_from"]["changes"]
    assert changes["ppo.kl_coef"] == [0.05, 0.5] and changes["loop.seed"] == [0, 1]
    assert [p["first_update"] for p in config["processes"]] == [2, 3]
    rows = shown(half)
    assert [row["update"] for row in rows] == [2, 3] and rows[0]["objective/kl_coef"] == 0.5
    assert rows[0] != shown(place / "whole")[2]
    cli.main(["replay", str(half), "--update", "2", "--out", str(tmp_path / "again")])
    assert "All its metrics are those of the run." in capsys.readouterr().out
    assert "update=1 must lie in 2 .. 3" in refused(
        capsys, ["replay", half, "--update", 1, "--out", tmp_path / "before"]
    )


@pytest.mark.slow
def test_a_run_with_a_moving_reference_is_repeated_and_converted(place, tmp_path, capsys):
    """The reference after two updates is the policy, in a fork and a replay from there too."""
    moving = {"ppo.reference-every": 2, "ppo.kl-loss-coef": 0.1, "critic": "shared"}
    run = train(place, tmp_path / "run", **moving)
    kl = [row["objective/kl"] for row in shown(run)]
    assert kl[0] == kl[2] == 0 != kl[1]
    source = {"resume": "fork", "fork-from": run, "fork-update": 1}
    assert shown(train(place, tmp_path / "fork", **moving, **source)) == shown(run)[1:]
    source["fork-from"] = place / "whole"
    fork = train(place, tmp_path / "other", **moving, **source)
    assert shown(fork)[0]["objective/kl"] == shown(place / "whole")[1]["objective/kl"] != 0
    for update in (1, 2):
        out = tmp_path / str(update)
        cli.main(["replay", str(run), "--update", str(update), "--out", str(out)])
        assert "All its metrics are those of the run." in capsys.readouterr().out
    convert(run, tmp_path / "converted", update=3)
    want, got = (pretrained.load_policy(x) for x in (run, tmp_path / "converted"))
    jax.tree.map(np.testing.assert_array_equal, got.params, want.params)


@pytest.mark.parametrize("flags", [[], ["--dry-run"]])
def test_another_reference_cannot_move(place, tmp_path, capsys, flags):
    given = {"reference": place / "model", "ppo.reference-decay": 0.9}
    with pytest.raises(SystemExit):
        train(place, tmp_path / "out", *flags, **given)
    assert "leave out the other reference" in capsys.readouterr().err


@pytest.mark.parametrize(
    "changes, message",
    [
        ({}, "resume=fork and fork_from go together"),
        ({"fork-from": "nothing"}, "is not the folder of a run"),
        ({"fork-from": "whole", "loop.updates": 3}, "count towards updates=3; set updates above"),
        ({"fork-from": "whole", "fork-update": 9}, "has no checkpoint after 9 updates"),
        ({"fork-from": "whole", "lora.rank": 2}, "and the run now has"),
        ({"fork-from": "whole", "out": "adapted"}, "holds another run"),
    ],
)
def test_a_fork_that_is_impossible_is_refused(place, tmp_path, capsys, changes, message):
    given = {"critic": "shared", "resume": "fork", "loop.updates": 4, **changes}
    if "fork-from" in given:
        given["fork-from"] = place / given["fork-from"]
    with pytest.raises(SystemExit):
        train(place, given.pop("out", tmp_path / "out"), **given)
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out/config.json").exists()


@pytest.mark.slow
def test_a_run_starts_from_an_adapter_and_its_reference_is_the_adapted_model(place, tmp_path):
    adapter, model = place / "adapted/adapter", tiny_policy(layers=1)
    further = train(place, tmp_path / "further", adapter=adapter, **{"loop.updates": 2})
    assert abs(shown(further)[0]["objective/kl"]) < 1e-6 < abs(shown(further)[1]["objective/kl"])
    start = pretrained.load_policy(adapter)
    end, whole = (pretrained.load_policy(further / name) for name in ("adapter", "model"))
    jax.tree.map(CLOSE, end.params, whole.params)
    moved = jax.tree.map(lambda a, b: bool(jnp.any(a != b)), start.params, whole.params)
    moved = {name: any(jax.tree.leaves(part)) for name, part in moved["layer_0"]["attn"].items()}
    assert all(moved.values())  # GPT-2 stores q, k and v as one layer, which peft adapts as one.
    mlp = start.params["layer_0"]["mlp"], whole.params["layer_0"]["mlp"]
    jax.tree.map(np.testing.assert_array_equal, *mlp)
    before = jax.tree.map(lambda a, b: np.abs(a - b).max(), model.params, start.params)
    assert before["layer_0"]["attn"]["q"]["kernel"] > 1e-4


@pytest.mark.slow
def test_another_reference_may_have_another_architecture(place, tmp_path, capsys):
    """The KL of the first update is that of the two models on the sampled texts."""
    deeper = tiny_policy(layers=2, width=8)
    pretrained.save_policy(tmp_path / "deeper", deeper, word_tokenizer())
    run = train(place, tmp_path / "run", reference=tmp_path / "deeper", **{"loop.updates": 1})
    assert abs(shown(run)[0]["objective/kl"]) > 1e-3
    config = json.loads((run / "config.json").read_text())
    assert config["hashes"]["reference_config"]
    tokenizer = word_tokenizer()
    tokenizer.add_tokens(["z"])
    pretrained.save_policy(tmp_path / "larger", tiny_policy(vocab_size=22), tokenizer)
    pretrained.save_policy(tmp_path / "shorter", tiny_policy(positions=6), word_tokenizer())
    for name, message in {
        "larger": "has another tokenizer than the policy: token 21 is 'z' in only one of them",
        "shorter": "The reference has 6 positions; the longest prompt and max_new_tokens=4 need 7",
    }.items():
        with pytest.raises(SystemExit):
            train(place, tmp_path / "refused", reference=tmp_path / name)
        assert message in capsys.readouterr().err and not (tmp_path / "refused").exists()


@pytest.mark.slow
def test_a_run_from_before_critics_were_left_out_goes_on_with_its_critic(place, tmp_path):
    """Every run had a separate critic by default, which a resumed run still has."""
    given = {"ppo.advantage": "grpo", "ppo.group-size": 2, "loop.updates": 1}
    arguments = train_arguments(place, tmp_path / "old", **given)
    command = dataclasses.replace(cli.parse(arguments), critic="separate")
    build(command, tmp_path / "old").run()
    train(place, tmp_path / "old", **given | {"loop.updates": 2, "resume": "yes"})
    assert (tmp_path / "old/critic").is_dir()
    assert len(read_lines(tmp_path / "old/metrics.jsonl")) == 2
    new = train(place, tmp_path / "new", **given)
    assert not (new / "critic").exists()
    config = json.loads((new / "config.json").read_text())
    assert config["settings"]["command"]["critic"] == "none"
