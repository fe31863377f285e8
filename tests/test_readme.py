"""The Python code of the README runs, its table of presets is right, and imports are declared."""

import ast
import importlib.metadata
import re
import sys
from pathlib import Path

import pytest
import transformers
from helpers import tiny_policy, word_tokenizer

from ppo_jax.models.io import pretrained
from ppo_jax.ppo.presets import PRESETS

README = (Path(__file__).parent.parent / "README.md").read_text()


def test_python_blocks_run(tmp_path, monkeypatch):
    """Run all Python blocks in order, with a tiny checkpoint in place of `gpt2`."""
    pretrained.save_policy(tmp_path / "gpt2", tiny_policy(positions=64), word_tokenizer())
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    load = transformers.AutoTokenizer.from_pretrained
    monkeypatch.setattr(
        transformers.AutoTokenizer, "from_pretrained", lambda name: load(tmp_path / name)
    )
    names: dict = {}
    for block in re.findall(r"```python\n(.*?)```", README, re.DOTALL):
        if named := re.match(r"# (\w+\.py)\n", block):
            (tmp_path / named[1]).write_text(block)
        else:
            exec(block, names)
    assert (tmp_path / "runs/python/metrics.jsonl").read_text().count("\n") == 2
    assert float(names["loss"]) == pytest.approx(0, abs=1e-6)
    assert int(names["state"].update) == 3 and "policy/clipfrac" in names["metrics"]


def test_the_table_of_presets_equals_the_presets():
    lines = [line.split("|") for line in README.splitlines() if line.startswith("|")]
    rows = {line[1].strip(): [cell.strip() for cell in line[2:-1]] for line in lines}
    presets = [PRESETS[name] for name in ("default", "oai2019", "nplus", "trl")]
    assert rows["rows an update, epochs x minibatches"] == [
        f"{c.batch_size}, {c.epochs}x{c.minibatches}" for c in presets
    ]
    assert rows["longest response"] == [str(c.max_new_tokens) for c in presets]
    assert [cell.startswith("yes") for cell in rows["a row samples on after its end token"]] == [
        not c.stop_at_end for c in presets
    ]
    assert rows["first token that may end it"] == [str(c.truncate_after) for c in presets]
    assert rows["temperature"] == [
        {1.0: "1", 0.7: "0.7", 0.7 + 1e-7: "0.7 + 1e-7"}[c.temperature] for c in presets
    ]
    assert [cell.replace(" the", "").replace(" ", "_") for cell in rows["score is added at"]] == [
        c.score_at.value for c in presets
    ]
    says = {"keep": "keeps its score", "replace": "scores -1"}
    assert rows["response without an end"] == [says[c.missing_eos.value] for c in presets]
    adapts = [f", adapts to {c.kl_target:g} nats" if c.kl_target else "" for c in presets]
    assert rows["KL weight"] == [
        f"{c.kl_coef}{more}" for c, more in zip(presets, adapts, strict=True)
    ]
    assert [cell.startswith("yes") for cell in rows["token rewards whitened"]] == [
        c.whiten_rewards for c in presets
    ]
    assert rows["variance that whitens"] == [
        "unbiased" if c.unbiased_whitening else "biased" for c in presets
    ]
    rates = [
        f"{c.learning_rate:.0e}".replace("e-0", "e-") + ", decays" * c.decay_learning_rate
        for c in presets
    ]
    assert rows["learning rate"] == rates
    adam = [f"{c.adam_eps:.0e}".replace("e-0", "e-") + f", {c.weight_decay:g}" for c in presets]
    assert rows["Adam's epsilon, weight decay"] == adam
    assert rows["gradient clipped at"] == [
        "no" if c.max_grad_norm is None else f"{c.max_grad_norm:g}" for c in presets
    ]


def test_imported_packages_are_declared():
    """The test environment has more packages than a user's, so others would go unnoticed."""
    declared = {
        re.split(r"[ <>=;\[]", line)[0].lower().replace("-", "_")
        for line in importlib.metadata.requires("ppo_jax")
    }
    trees = [
        ast.parse(file.read_text())
        for file in (Path(__file__).parents[1] / "ppo_jax").rglob("*.py")
    ]
    nodes = [node for tree in trees for node in ast.walk(tree)]
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
    modules = {name.split(".")[0] for name in names} - sys.stdlib_module_names - {"ppo_jax"}
    owners = importlib.metadata.packages_distributions()
    missing = {
        m
        for m in modules
        if not declared & {owner.lower().replace("-", "_") for owner in owners.get(m, ())}
    }
    assert missing <= {"numpy", "jaxlib"}, missing  # they come with JAX
    assert "jinja2" in declared  # transformers needs it for chat templates, but does not require it
