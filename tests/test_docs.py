"""The documentation: its Python runs, its commands parse, its tables and links are right."""

import contextlib
import io
import json
import re
import shlex
import subprocess
import sys
import zlib
from pathlib import Path

import pytest
from helpers import (
    ROOT,
    code_blocks,
    documented_metrics,
    run_python_blocks,
    save_tiny_gpt2,
    table_rows,
)

import ppo_jax
from ppo_jax import cli
from ppo_jax.ppo.presets import PRESETS
from ppo_jax.ppo.settings import PPOConfig

DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *DOCS]
MORE_PAGES = [*ROOT.glob("experiments/**/*.md"), *ROOT.glob("ppo_jax/**/*.md")]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working directory with a tiny model called `gpt2`, from which modules can be imported."""
    save_tiny_gpt2(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize(
    "page", [page for page in DOCS if code_blocks(page, "python")], ids=lambda page: page.name
)
def test_python_blocks_run(page, folder):
    run_python_blocks(page, folder)


@pytest.mark.slow
def test_the_site_is_built_without_warnings_and_documents_all_names(tmp_path):
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", str(ROOT / "docs")]
    done = subprocess.run([*command, str(tmp_path)], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    # Four lines of text are followed by the names, compressed.
    *_, names = (tmp_path / "objects.inv").read_bytes().split(b"\n", 4)
    documented = {line.split()[0] for line in zlib.decompress(names).decode().splitlines()}
    assert {f"ppo_jax.{name}" for name in ppo_jax.__all__} <= documented


def test_metrics_named_for_trl_exist():
    rows = [row for row in table_rows(ROOT / "docs/coming_from_trl.md") if len(row) == 3]
    named = {name for row in rows for name in re.findall(r"`(\w+/\w+)`", row[1])}
    assert len(named) > 20 and named <= documented_metrics()


def test_table_of_presets():
    rows = {row[0]: row[1:] for row in table_rows(ROOT / "docs/presets_and_metrics.md")}
    presets = [PRESETS[name] for name in ("default", "oai2019", "nplus", "trl")]

    def power(x: float) -> str:
        return f"{x:.0e}".replace("e-0", "e-")

    assert rows["rows per update, epochs x minibatches"] == [
        f"{c.batch_size}, {c.epochs}x{c.minibatches}" for c in presets
    ]
    assert rows["maximum response length"] == [str(c.max_new_tokens) for c in presets]
    assert [cell.startswith("yes") for cell in rows["sampling continues after an end token"]] == [
        not c.stop_at_end for c in presets
    ]
    assert rows["first token that may end a response"] == [str(c.truncate_after) for c in presets]
    temperatures = {1.0: "1", 0.7: "0.7", 0.7 + 1e-7: "0.7 + 1e-7"}
    assert rows["temperature"] == [temperatures[c.temperature] for c in presets]
    assert [cell.replace(" the", "").replace(" ", "_") for cell in rows["score is added at"]] == [
        c.score_at.value for c in presets
    ]
    without_end = {"keep": "keeps its score", "replace": "scores -1"}
    assert rows["response without an end token"] == [
        without_end[c.missing_eos.value] for c in presets
    ]
    adapts = [f", adapts to {c.kl_target:g} nats" if c.kl_target else "" for c in presets]
    assert rows["KL weight"] == [f"{c.kl_coef}{x}" for c, x in zip(presets, adapts, strict=True)]
    assert [cell.startswith("yes") for cell in rows["token rewards are whitened"]] == [
        c.whiten_rewards for c in presets
    ]
    assert rows["variance used for whitening"] == [
        "unbiased" if c.unbiased_whitening else "biased" for c in presets
    ]
    assert rows["learning rate"] == [
        power(c.learning_rate) + ", decays" * c.decay_learning_rate for c in presets
    ]
    assert rows["Adam's epsilon, weight decay"] == [
        f"{power(c.adam_eps)}, {c.weight_decay:g}" for c in presets
    ]
    assert rows["gradient clipped at"] == [
        "no" if c.max_grad_norm is None else f"{c.max_grad_norm:g}" for c in presets
    ]


# What `...` stands for in a command.
LEFT_OUT = shlex.split("--model gpt2 --prompts a.txt --reward b.py:f --out runs/b")


def commands_in(text: str) -> list[list[str]]:
    """Return the arguments of each call of `ppo-jax` in a block of code."""
    lines = text.replace("\\\n", " ").splitlines()
    calls = [re.search(r"(?:^|[\s/!])ppo-jax ([a-z].*)", line) for line in lines]
    return [
        [x for word in shlex.split(call[1]) for x in (LEFT_OUT if word == "..." else [word])]
        for call in calls
        if call
    ]


def commands_of(page: Path) -> list[list[str]]:
    """Return the arguments of each call of `ppo-jax` in the shell blocks of a page."""
    return commands_in("\n".join(code_blocks(page, "bash", "console", "text")))


def test_commands_are_found():
    assert [len(commands_of(ROOT / f"docs/{name}.md")) for name in ("tpu", "own_reward")] == [6, 2]
    assert len(commands_of(ROOT / "docs/own_data.md")) == 5


@pytest.mark.slow
def test_a_file_of_questions_is_enough(folder, capsys):
    """The block at the top of `own_data.md` runs, with fewer updates."""
    Path("questions.csv").write_text("question,answer\n" + "a b,c\nd e,f\n" * 20)
    Path("reviews.csv").write_text("review,sentiment\n" + "a b,positive\nc d,negative\n" * 20)
    sft, reward, train = commands_in(code_blocks(ROOT / "docs/own_data.md", "console")[0])
    cli.main([*sft, "--epochs", "1"])
    cli.main([*reward, "--epochs", "1"])
    cli.main([*train, "--updates", "1", "--batch-size", "32", "--max-new-tokens", "4"])
    out = capsys.readouterr().out
    assert "on held-out prompts" in out and "Nothing was evaluated" not in out
    assert Path("runs/ppo/model/model.safetensors").is_file()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_parse(page, tmp_path, monkeypatch):
    """Each `ppo-jax` command on a page is accepted by the parser; none is executed."""
    monkeypatch.chdir(tmp_path)
    for text in code_blocks(page, "yaml"):
        Path(text.split()[1]).write_text(text)  # Its first line names the file.
    Path("runs/a").mkdir(parents=True)
    given = {"model": "gpt2", "prompts": "a.txt", "reward": "b.py:f", "out": "runs/a"}
    Path("runs/a/config.json").write_text(
        json.dumps({"settings": {"command": given}, "hashes": {}})
    )
    for arguments in commands_of(page):
        assert callable(cli.parse(arguments).run)


def test_options_exist(monkeypatch):
    """Each option that the text names in code is an option of a command."""
    monkeypatch.setenv("COLUMNS", "300")
    text = "\n".join(page.read_text() for page in PAGES if page.name != "experiments.md")
    prose = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z.-]*[a-z](?![\w.-])", prose))
    subcommands = re.findall(r"`(\w+)`", re.search(r"`ppo-jax sft`.*?describe", text, re.DOTALL)[0])
    output = io.StringIO()
    for command in {"sft", "train", "plan", *subcommands}:
        with contextlib.redirect_stdout(output), pytest.raises(SystemExit):
            cli.main([command, "--help-all"])
    known = set(re.findall(r"--[a-z][a-z.-]*", output.getvalue()))
    known |= {"--check", "--help-all", "--version", "--tyro-write-completion"}
    assert len(named) > 15
    assert named <= known, named - known


@pytest.mark.parametrize("page", [*PAGES, *MORE_PAGES], ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if target.startswith("https://"):
            continue
        name, _, anchor = target.partition("#")
        file = (page.parent / name).resolve() if name else page
        assert file.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", file.read_text(), re.MULTILINE)
            assert anchor in {heading.lower().replace(" ", "-") for heading in headings}, target


def test_presets_whose_critic_has_its_own_optimizer():
    """They set no weight of the value loss, which has no effect, and have a documented warm-up."""
    own = {name: c for name, c in PRESETS.items() if c.critic.learning_rate is not None}
    assert own.keys() == {"vapo", "sao"}
    assert {c.vf_coef for c in own.values()} == {PPOConfig().vf_coef}
    text = " ".join((ROOT / "docs/presets_and_metrics.md").read_text().split())
    assert PRESETS["sao"].critic.warmup_steps == 10  # `critic_lr_warmup_iters` of its code
    assert "which rises over its first 10 steps" in text


def test_table_of_presets_with_groups():
    rows = {row[0]: row[1:] for row in table_rows(ROOT / "docs/presets_and_metrics.md")}
    presets = [PRESETS[name] for name in rows["preset"]]
    described = {
        "prompts x responses": lambda c: f"{c.batch_size // c.group_size}x{c.group_size}",
        "epochs x minibatches per update": lambda c: f"{c.epochs}x{c.minibatches}",
        "longest response": lambda c: str(c.max_new_tokens),
        "advantage": lambda c: c.advantage.value,
        "weighting of tokens": lambda c: c.weighting.value,
        "clip low, high, dual": lambda c: f"{c.clip_low}, {c.clip_high}, {c.dual_clip or 'none'}",
        "KL in reward, in loss": lambda c: (
            f"{c.kl_coef:g}, {c.kl_loss_coef:g}" + f" by {c.kl_loss.value}" * bool(c.kl_loss_coef)
        ),
        "sampler's weights": lambda c: c.importance.value,
        "overlong buffer": lambda c: str(c.overlong_buffer or "none"),
        "uninformative groups are left out": lambda c: "yes" if c.filter_groups else "no",
        "rate, weight decay": lambda c: f"{c.learning_rate:g}, {c.weight_decay:g}",
    }
    for name, describe in described.items():
        assert rows[name] == [describe(c) for c in presets], name
    assert len(presets) == len(PRESETS) - 4
    assert all(c.max_grad_norm == c.gamma == 1 for c in presets)
    assert not any(c.vf_coef for c in presets if not c.advantage.reads_values)


def test_contributing_names_files_that_exist():
    rows = table_rows(ROOT / "CONTRIBUTING.md")[2:]
    assert len(rows) == 6
    for kind, new, changed in rows:
        new_file = ROOT / re.search(r"`(ppo_jax/\S+\.py)`", new)[1]
        assert new_file.parent.is_dir() and not new_file.exists(), kind
        changed, _, _ = changed.partition(";")
        changed_file = ROOT / re.search(r"`(ppo_jax/\S+\.py)`", changed)[1]
        assert changed_file.is_file(), kind
        for name in re.findall(r"`([A-Za-z_]+)`", changed):
            assert name in changed_file.read_text(), (kind, name)


def test_changelog_has_this_version():
    assert f"\n## [{ppo_jax.__version__}]" in (ROOT / "CHANGELOG.md").read_text()
