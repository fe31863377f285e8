"""The README: it is short, its commands and its Python run, and dependencies are declared."""

import ast
import importlib.metadata
import itertools
import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from helpers import ROOT, code_blocks, documented_metrics, run_python_blocks, save_tiny_gpt2

README = ROOT / "README.md"
OPTIONAL_METRICS = {
    "faults/skipped",
    "critic/grad_norm",
    "critic/steps",
    "eval/distinct_2",
    "eval/reward/NAME",
    "eval/scores",
    "eval/scores_error",
    "reward/NAME",
    "reward/timeouts",
    "rollout/age",
    "value/explained_variance_after",
    "eval/length_mean",
    "eval/kl",
    "objective/entropy_coef",
    "policy/clipfrac_dual",
    "loss/kl",
    "loss/positive_nll",
    "importance/mean",
    "importance/max",
    "importance/effective_sample_size",
    "groups/uninformative",
    # Metrics of supervised runs.
    "train/loss",
    "train/accuracy",
    "eval/loss",
    "eval/accuracy",
    "optimizer/learning_rate",
    "perf/tokens_per_s",
}


def test_is_one_page():
    text = README.read_text()
    assert len(text.splitlines()) <= 150 and len(text.split()) < 1900
    assert len(re.findall(r"^!\[", text, re.MULTILINE)) == 1
    assert len(re.findall(r"^\|---", text, re.MULTILINE)) == 1


def test_second_command_is_the_check_of_ci():
    (command,) = [block for block in code_blocks(README, "bash") if "pytest" in block]
    script = (ROOT / ".ci/run").read_text().splitlines()
    assert [part.strip() for part in command.split("&&")] == [
        line for line in script if re.match(r"python3 -m venv|\S+/pip install|\S+ -m pytest", line)
    ]


@pytest.mark.slow
def test_python_blocks_run(tmp_path, monkeypatch):
    """The training run and the loop work, and every metric that they report is documented."""
    save_tiny_gpt2(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "my_reward", raising=False)
    variables = run_python_blocks(README, tmp_path)
    lines = (tmp_path / "runs/python/metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["update"] for line in lines] == [0, 1]
    assert float(variables["loss"]) == pytest.approx(0, abs=1e-6)
    assert int(variables["state"].update) == 3
    logged = {name for line in lines for name in json.loads(line)} - {"update"}
    assert set(variables["metrics"]) < logged
    assert logged == documented_metrics() - OPTIONAL_METRICS


@pytest.mark.slow
def test_own_model_and_reward(tmp_path):
    """The commands for a user's own reward run as they stand, with a tiny model as GPT-2."""
    save_tiny_gpt2(tmp_path)
    (reward,) = [x for x in code_blocks(README, "python") if x.startswith("# my_reward.py")]
    (tmp_path / "my_reward.py").write_text(reward)
    assert "The film is|" in run_block("my_reward.py", tmp_path)
    assert json.loads((tmp_path / "runs/mine/summary.json").read_text())["updates"] == 50


@pytest.mark.slow
def test_from_tables_to_a_report(tmp_path):
    """The commands of all stages run as they stand, on two tables and a tiny model as GPT-2."""
    save_tiny_gpt2(tmp_path)
    words = [f"film {i}" for i in range(40)]
    answers = [f"What is {x}?,It is a {x}." for x in words]
    (tmp_path / "answers.csv").write_text("\n".join(["prompt,response", *answers]))
    reviews = [f"The {x} is good,{i % 5}" for i, x in enumerate(words)]
    (tmp_path / "reviews.csv").write_text("\n".join(["text,label", *reviews]))
    run_block("ppo-jax sft", tmp_path)
    assert "eval/scores" in (tmp_path / "runs/ppo/metrics.jsonl").read_text()
    assert (tmp_path / "runs/evaluation/responses.jsonl").is_file()
    assert (tmp_path / "report.html").stat().st_size > 10_000


def run_block(text: str, folder: Path) -> str:
    """Run the README's block of commands that contains the text, and return what they print."""
    (commands,) = [x for x in code_blocks(README, "bash") if text in x]
    commands = commands.replace(".venv/bin/ppo-jax", f"{sys.executable} -m ppo_jax.cli")
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        ["bash", "-ec", commands], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_what_is_imported_is_declared():
    """The environment of the tests has more packages than that of a user."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    requirements = [project["dependencies"], *project["optional-dependencies"].values()]
    declared = {
        re.split(r"[ <>=;\[]", line)[0].lower().replace("-", "_")
        for line in itertools.chain(*requirements)
    }
    trees = [ast.parse(file.read_text()) for file in (ROOT / "ppo_jax").rglob("*.py")]
    nodes = [node for tree in trees for node in ast.walk(tree)]
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module}
    modules = {name.split(".")[0] for name in names} - sys.stdlib_module_names - {"ppo_jax"}
    owners = importlib.metadata.packages_distributions()
    missing = {
        module
        for module in modules
        if not declared & {owner.lower().replace("-", "_") for owner in owners.get(module, ())}
    }
    assert missing <= {"numpy", "jaxlib"}, missing  # JAX requires these.
    assert "jinja2" in declared  # transformers needs it for chat templates but does not require it.
