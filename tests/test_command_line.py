"""The options of the commands: their help, names and files of settings, and dry runs."""

import contextlib
import io
import json
import math
import os
import re
import subprocess
import sys
import typing
from pathlib import Path

import jax
import pytest
import yaml
from helpers import options, tiny_policy, word_tokenizer

import ppo_jax
from ppo_jax import cli
from ppo_jax.commands.parsing import COMMANDS, PrintConfig
from ppo_jax.commands.train import Train
from ppo_jax.errors import SettingError
from ppo_jax.models import heads
from ppo_jax.models.io import adapter_files, pretrained, scorers
from ppo_jax.models.lora import init_lora
from ppo_jax.models.lora_settings import LoRA
from ppo_jax.ppo.presets import PRESETS

GIVEN = ["--model", "m", "--prompts", "p.txt", "--reward", "r.py:f", "--out", "o"]
TRAIN = ["train", *GIVEN]
# In the order of the help; the first ten options.
SHORT = "model prompts reward out updates seed batch-size max-new-tokens kl-coef learning-rate"


def printed(*arguments: str, status: int = 0) -> str:
    """Return what a command that ends at once prints."""
    output = io.StringIO()
    with (
        contextlib.redirect_stdout(output),
        contextlib.redirect_stderr(output),
        pytest.raises(SystemExit) as ending,
    ):
        cli.main(list(arguments))
    assert (ending.value.code or 0) == status
    return output.getvalue()


def settings(*arguments: object) -> dict:
    """Return the settings that `--print-config` prints."""
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        cli.main([*map(str, arguments), "--print-config"])
    return yaml.safe_load(output.getvalue())


def options_in(help_text: str) -> list[str]:
    """Return the options that begin a line in the boxes of a help."""
    return re.findall(r"^[│ ] (--[\w.-]+)", help_text, re.MULTILINE)


@pytest.mark.parametrize("command", COMMANDS)
def test_common_options_fit_two_screens(monkeypatch, command):
    monkeypatch.setenv("COLUMNS", "80")
    common, everything = printed(command, "--help"), printed(command, "--help-all")
    assert sum(max(1, math.ceil(len(line) / 80)) for line in common.splitlines()) <= 100
    assert 0 < len(options_in(common)) <= len(options_in(everything))
    assert set(options_in(common)) <= set(re.findall(r"--[\w.-]+", everything))
    assert f"ppo-jax {command} " in common.partition("Example:")[2]


def test_the_options_that_most_people_use_come_first():
    common, everything = printed("train", "--help"), printed("train", "--help-all")
    assert options_in(common)[:10] == [f"--{name}" for name in SHORT.split()]
    assert "--ppo.kl-horizon" in everything and "--ppo.kl-horizon" not in common


def test_every_preset_can_be_chosen():
    choices = typing.get_args(typing.get_type_hints(Train)["preset"])
    assert choices == tuple(PRESETS)


def test_examples_are_valid():
    for name, kind in COMMANDS.items():
        words = kind.example.replace("\\", "").replace('"The film is"', "x").split()
        assert words[:2] == ["ppo-jax", name]
        assert isinstance(cli.parse(words[1:]), kind)


def test_help_and_errors_import_nothing_heavy():
    heavy = ["jax", "transformers", "orbax", "optax", "flax", "datasets", "scipy", "tensorboardX"]
    code = (
        "import sys\nfrom ppo_jax import cli\n"
        "for args in [['--version'], ['--help'], *([x, y] for x in cli.COMMANDS"
        " for y in ('--help', '--no-such-option'))]:\n"
        "    try:\n        cli.main(args)\n        raise AssertionError\n"
        "    except SystemExit:\n        pass\n"
        f"print(sorted(set({heavy}) & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_version():
    assert printed("--version") == f"ppo-jax {ppo_jax.__version__}\n"


def test_a_short_name_is_the_long_one():
    names = {
        "updates": "loop.updates",
        "seed": "loop.seed",
        "batch-size": "ppo.batch-size",
        "max_new_tokens": "ppo.max_new_tokens",
        "kl-coef": "ppo.kl-coef",
        "learning-rate": "ppo.learning-rate",
        "top-k": "ppo.top-k",
    }
    short = cli.parse([*TRAIN, *options(dict.fromkeys(names, 16))])
    assert short == cli.parse([*TRAIN, *options(dict.fromkeys(names.values(), 16))])
    assert (short.loop.seed, short.ppo.batch_size, short.ppo.kl_coef) == (16, 16, 16.0)
    # A setting and one that must divide it are checked together.
    assert cli.parse([*TRAIN, "--batch-size", "3", "--ppo.minibatches", "3"]).ppo.batch_size == 3
    assert cli.parse(["value", *GIVEN, "--seed", "9"]).train.loop.seed == 9


def test_one_thing_has_one_name():
    assert cli.parse(["info", "--remat", "--model", "a"]) == cli.parse(["info", "--remat", "a"])
    for name in ("--prompt-tokens=7", "--max-prompt-tokens=7"):
        assert cli.parse(["plan", "--model", "a", name]).max_prompt_tokens == 7


def test_settings_from_a_file(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(
        "batch-size: 16\nlearning_rate: 1e-4\nppo.lam: 1\nresume: no\nloop:\n"
        "ppo: {minibatches: 2, kl_estimator: k3, importance: tis, importance_range: [0, 2]}\n"
        "reward: [a.py:f, b.py:g=0.5]\nlong_prompts: drop\nlora: {rank: 4}\neval_fraction: 0\n"
    )
    given = ["train", "--model", "m", "--prompts", "p", "--out", "o", f"--config={file}"]
    command = cli.parse(given)
    want = [
        *("train", "--model", "m", "--prompts", "p", "--out", "o", "--batch-size", "16"),
        *("--learning-rate", "1e-4", "--ppo.lam", "1", "--ppo.minibatches", "2", "--reward"),
        *("a.py:f", "--reward", "b.py:g=0.5", "--long-prompts", "drop", "--lora.rank", "4"),
        *("--ppo.kl-estimator", "k3", "--ppo.importance", "tis"),
        *("--ppo.importance-range", "0", "2"),
    ]
    assert command == cli.parse(want)
    # Options take precedence, also over a list, and settings are checked together.
    other = cli.parse([*given, "--reward", "c.py:h", "--batch-size", "9", "--ppo.minibatches", "3"])
    assert (other.reward, other.ppo.batch_size, other.ppo.lam) == (("c.py:h",), 9, 1.0)
    file.write_text("epochs: 7\ntext_column: review\ntraining: {length: 5}\n")
    sft = cli.parse(["sft", "--model", "m", "--data", "d", "--out", "o", "--config", str(file)])
    assert (sft.training.epochs, sft.training.length) == (7, 5)
    assert sft.columns.text_column == "review"


@pytest.mark.parametrize(
    "command",
    [
        [*TRAIN, "--reward", "s.py:g=0.5", "--preset", "dapo", "--long-prompts", "drop"],
        ["value", *GIVEN, "--stop-tokens", "1e-5", "no", "--ppo.adam-eps", "1e-9"],
        ["sft", "--model", "m", "--data", "d", "--out", "o", "--epochs", "2"],
        ["evaluate", "--model", "a", "--model", "b", "--reward", "s.py:g", "--top-p", "0.5"],
        ["generate", "--model", "m", "--prompts", "a", "b.txt", "--greedy", "--seed", "3"],
    ],
)
def test_printed_settings_are_a_file_of_settings(tmp_path, command):
    file = tmp_path / "run.yaml"
    asked = cli.parse([*command, "--print-config"])
    assert isinstance(asked, PrintConfig)
    with file.open("w") as output, contextlib.redirect_stdout(output):
        asked.run()
    assert cli.parse([command[0], "--config", str(file)]) == asked.command == cli.parse(command)


def test_a_preset_and_a_file(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("preset: grpo\nppo: {temperature: 0.5}\n")
    own = cli.parse([*TRAIN, "--config", str(file)])
    assert (own.preset, own.ppo.temperature) == ("grpo", 0.5)
    assert own.ppo.group_size == PRESETS["grpo"].group_size
    with pytest.raises(SettingError, match=r"has preset=grpo .* leave out --preset rloo"):
        cli.parse([*TRAIN, "--config", str(file), "--preset", "rloo"])


@pytest.mark.parametrize(
    "text, message",
    [
        ("batch_sice: 3", "batch_sice, which is no option of ppo-jax train; did you mean batch_s"),
        ("ppo: {batch_size: eight}", 'sets ppo.batch_size to "eight", but it should be a valid in'),
        ("ppo: {loss: none}", "sets ppo.loss to \"none\", but it should be 'ppo', 'cispo'"),
        ("ppo: 3", "sets ppo, which is no option"),
        ("chat: 1", "sets chat to 1, but it should be a valid boolean"),
        ("- a", "must hold names with values"),
        ("a: [", "is not YAML: line"),
        ("a: \0", "is neither YAML nor JSON: unacceptable character"),
        ("model: a\nmodel: b", "sets model twice; keep one of them."),
        ("ppo: {lam: 1, lam: 0.9}", "sets lam twice"),
        ("batch-size: 8\nbatch_size: 9", "sets batch_size twice"),
        (
            "batch_size: 8\nppo: {batch_size: 16}",
            "sets batch_size and ppo.batch_size, which are",
        ),
        ("kl_coef: -1", "kl_coef must not be negative"),
        ("ppo: {critic: {epochs: 3}}", "critic.epochs=3 is for a critic with its own optimizer"),
    ],
)
def test_a_wrong_file_is_one_sentence(tmp_path, text, message):
    file = tmp_path / "run.yaml"
    file.write_text(text)
    error = printed(*TRAIN, "--config", str(file), status=2)
    assert error.count("\n") == 1 and message in error


def test_a_missing_file_is_one_sentence(tmp_path):
    error = printed(*TRAIN, "--config", str(tmp_path / "none.yaml"), status=2)
    assert error == (
        f"ppo-jax: config={tmp_path / 'none.yaml'} cannot be read: No such file or directory.\n"
    )


def test_a_repeated_name_in_json_is_refused(tmp_path):
    (tmp_path / "run.json").write_text('{"model": "a", "model": "b"}')
    error = printed(*TRAIN, "--config", str(tmp_path / "run.json"), status=2)
    assert error.endswith("run.json sets model twice; keep one of them.\n")


def test_the_folder_of_a_supervised_run_is_read_by_its_run_json(tmp_path):
    """The seed of a run without `eval_seed` also chose its held-out rows."""
    (tmp_path / "config.json").write_text('{"bos_token_id": 0}')
    training = {"epochs": 7, "seed": 4, "eval_fraction": 0.2}
    command = {"model": "m", "data": "d", "out": "o", "training": training}
    run = {"settings": {"command": command, "loop": {"seed": 4}}, "hashes": {}}
    (tmp_path / "run.json").write_text(json.dumps(run))
    read = cli.parse(["sft", "--config", str(tmp_path), "--seed", "5"]).training
    assert (read.epochs, read.seed, read.eval_seed) == (7, 5, 4)


def files_in(folder: Path) -> dict[Path, float]:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


@pytest.mark.slow
def test_the_configuration_of_a_run_and_dry_runs(tmp_path, capsys):
    pretrained.save_policy(tmp_path / "model", tiny_policy(), word_tokenizer())
    (tmp_path / "prompts.txt").write_text("a b\nc\nd\ne\n")
    (tmp_path / "reward.py").write_text("def score(p, responses): return [1.0] * len(responses)")
    (tmp_path / "pairs.jsonl").write_text('{"chosen": "a", "rejected": "b"}\n' * 20)
    (tmp_path / "texts.jsonl").write_text('{"response": "a b"}\n' * 20)
    model, run = tmp_path / "model", tmp_path / "run"
    given = {
        "model": model,
        "prompts": tmp_path / "prompts.txt",
        "reward": f"{tmp_path / 'reward.py'}:score",
        "out": run,
        "updates": 1,
        "batch-size": 4,
        "max-new-tokens": 2,
        "mesh": "data=1",
        "critic": "shared",
        "epochs": 1,
        "ppo.minibatches": 1,
    }
    command = ["train", "--loop.no-tensorboard", "--loop.no-progress", *options(given)]
    (tmp_path / "held.txt").write_text("a b\nc\n")
    before = files_in(tmp_path)
    cli.main([*command, "--dry-run", "--eval-fraction", "0.25", "--updates", "3"])
    out = capsys.readouterr().out
    assert "3 prompts and 1 held-out ones of at most 2 tokens" in out
    limit = ["--long-prompts", "drop", "--max-prompt-tokens", "1"]
    cli.main([*command, "--dry-run", "--eval-prompts", str(tmp_path / "held.txt"), *limit])
    assert "1 of 2 prompts of " in capsys.readouterr().out
    assert "3 updates of 4 responses to 4 prompts" in out and "3 optimizer steps on 4" in out
    assert "AdamW's moments" in out and "together" in out
    for name, data in {"sft": "texts.jsonl", "reward": "pairs.jsonl"}.items():
        stage = {"model": model, "data": tmp_path / data, "out": run, "batch-size": 4}
        cli.main([name, *options(stage), "--dry-run"])
        assert "3 epochs of 4 steps: 12 steps" in capsys.readouterr().out
    assert "reward file" in printed(*command, "--dry-run", "--reward", "none.py:f", status=2)
    stop = ["--dry-run", "--stop-tokens", "no token"]
    assert "stop_tokens: 'no token' is " in printed(*command, *stop, status=2)
    assert files_in(tmp_path) == before
    cli.main(command)
    assert "Nothing was evaluated; --eval-fraction 0.1 would hold" in capsys.readouterr().out
    with pytest.raises(SettingError, match="holds the settings of a run; evaluate takes the run"):
        cli.parse(["evaluate", "--config", str(run)])
    # A run's own configuration starts the same run again, in another folder or to resume it.
    stored = json.loads((run / "config.json").read_text())["settings"]["command"]
    for file in (run, run / "config.json"):
        assert cli.parse(["train", "--config", str(file)]) == cli.parse(command)
    assert settings("train", "--config", run, "--out", "b") == settings(*command, "--out", "b")
    assert {"dry_run", "config", "print_config"}.isdisjoint(stored)
    before = files_in(tmp_path)
    resume = ["train", "--config", str(run), "--resume", "auto", "--updates", "5", "--dry-run"]
    cli.main(resume)
    assert "4 updates after 1 of 4 responses" in capsys.readouterr().out
    assert "ppo.lam was 0.95" in printed(*resume, "--ppo.lam", "0.5", status=2)
    assert "holds another run" in printed(*command, "--dry-run", status=2)
    assert files_in(tmp_path) == before


def test_completion_knows_the_short_names(tmp_path):
    printed("--tyro-write-completion", "bash", str(tmp_path / "ppo-jax"))
    script = (tmp_path / "ppo-jax").read_text()
    assert "--max-new-tokens" in script and "--ppo.max-new-tokens" in script
    assert os.path.getsize(tmp_path / "ppo-jax") > 1000


@pytest.mark.parametrize(
    "command, message",
    [
        (
            [*TRAIN, "--update", "3"],
            "--update is no option of ppo-jax train; similar options are --updates, --fork-update, "
            "--loop.updates, and ppo-jax train --help-all lists all.",
        ),
        (
            ["compare", "a", "b", "--zzz=1"],
            "--zzz is no option of ppo-jax compare; ppo-jax compare --help-all lists all.",
        ),
        (
            ["--zzz", *TRAIN],
            "--zzz is no option of ppo-jax train; ppo-jax train --help-all lists all.",
        ),
        (["info", "gpt2", "b"], "ppo-jax info takes no argument 'b'; options begin with --."),
    ],
)
def test_an_unknown_option_is_one_sentence(command, message):
    assert printed(*command, status=2) == f"ppo-jax: {message}\n"


def test_help_fits_80_columns(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    for command in ([], *([name] for name in COMMANDS)):
        assert max(map(len, printed(*command, "--help").splitlines())) <= 80


def test_missing_files_are_found_before_jax_is_imported(tmp_path):
    for name in ("prompts.txt", "r.py", "run/config.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("a")
    train = ["train", "--model", "m", "--prompts", "prompts.txt", "--reward", "r.py:f"]
    more = ["--out", "new", "--model", "m", "--data"]
    cases = {
        "nosuch.csv does not exist": [*train, "--out", "new", "--prompts", "nosuch.csv"],
        "no.csv does not exist": [*train, "--out", "new", "--eval-prompts", "no.csv", "--dry-run"],
        "reward file nosuch.py does not exist": [*train, "--out", "new", "--reward", "nosuch.py:f"],
        "run holds another run": [*train, "--out", "run"],
        "nowhere.csv does not exist": ["value", *train[1:-2], "--reward", "r.py:f", "--out", "new"],
        "rows.csv does not exist": ["sft", *more, "rows.csv"],
        "pairs.csv does not exist": ["reward", *more, "pairs.csv"],
        "is not a size": ["sft", "--from-scratch", "x", "--data", "prompts.txt", "--out", "new"],
        "tests.txt does not exist": ["evaluate", "--model", "m", "--prompts", "tests.txt"],
        "because none is not a folder": ["report", "run", "--out", "none/a.html"],
    }
    cases["nowhere.csv does not exist"] += ["--prompts", "nowhere.csv"]
    code = (
        f"import sys\nfrom ppo_jax import cli\nfor args in {list(cases.values())}:\n"
        "    try:\n        cli.main(args)\n        raise AssertionError(args)\n"
        "    except SystemExit:\n        assert 'jax' not in sys.modules, args\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    for message, line in zip(cases, done.stderr.splitlines(), strict=True):
        assert message in line


@pytest.mark.slow
def test_a_dry_run_refuses_what_the_run_refuses(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    policy = tiny_policy()
    pretrained.save_policy("model", policy, word_tokenizer())
    short = tiny_policy(positions=4)
    head = heads.init_scorer(short.config, jax.random.key(0))
    scorers.save_scorer("short", short._replace(params=head), word_tokenizer())
    spec = LoRA(rank=2)
    adapters = init_lora(policy.params, jax.random.key(0), spec)
    adapter_files.save_adapter("adapter", adapters, spec, policy.config, "gpt2", "model")
    Path("prompts.txt").write_text("a b\nc\n")
    Path("r.py").write_text(
        "def score(prompts, responses): return [1.0] * len(responses)\n"
        "def needy(prompts, responses, answer): return score(prompts, responses)\n"
    )
    Path("one.csv").write_text("text,label\n" + "a b,pos\n" * 20)
    given = {"model": "model", "prompts": "prompts.txt", "out": "run", "batch-size": 4}
    given |= {"max-new-tokens": 8, "mesh": "data=1", "ppo.minibatches": 1}
    train = ["train", *options(given), "--dry-run", "--reward"]
    for message, more in {
        "needs the column 'answer'": ["r.py:needy"],
        "critic must start from a reward model": ["r.py:score", "--critic", "model"],
        "The critic has 4 positions": ["r.py:score", "--critic", "short"],
        "leave out lora.rank=2": ["r.py:score", "--adapter", "adapter", "--lora.rank", "2"],
        "it has no adapter_config.json": ["r.py:score", "--adapter", "model"],
        "gs://b must be gs://BUCKET/PATH": ["r.py:score", "--out", "gs://b"],
    }.items():
        assert message in printed(*train, *more, status=2)
    reward = {"model": "model", "data": "one.csv", "out": "run", "batch-size": 4}
    classes = ["--learn-from", "classes", "--dry-run"]
    assert "hold a single class" in printed("reward", *options(reward), *classes, status=2)
    cli.main([*train, "r.py:score", "--adapter", "adapter"])
    assert not Path("run").exists()
