"""The package is typed: mypy accepts correct programs of a user and rejects wrong ones."""

import importlib.resources
import os
import re
import subprocess
import sys

import pytest
from helpers import ROOT, code_blocks

USER = """
from pathlib import Path

import jax
import jax.numpy as jnp
from ppo_jax import (
    Agent,
    KVCache,
    LoopConfig,
    LossFn,
    PPOConfig,
    PPOState,
    Rollout,
    TransformerConfig,
    language_model,
    masked_mean,
    shared_critic,
)


def later(state: PPOState, updates: int) -> PPOState:
    new: PPOState = state.replace(update=state.update + updates)
    return new.replace(train=new.train.replace(step=jnp.int32(0)))


def without_ends(rollout: Rollout) -> Rollout:
    return rollout.replace(ended=jnp.zeros_like(rollout.ended))


def mean_length(rollout: Rollout) -> jax.Array:
    lengths = rollout.response_mask.sum(axis=1)
    return masked_mean(lengths.astype(jnp.float32), jnp.ones_like(rollout.ended))


def empty(cache: KVCache) -> KVCache:
    return cache.replace(length=jnp.int32(0))


def small_agent(loss_fn: LossFn | None = None) -> Agent:
    config = TransformerConfig(
        vocab_size=7, positions=8, width=4, layers=1, heads=2, mlp_width=16
    )
    ppo = PPOConfig(batch_size=8, kl_target=None, max_grad_norm=1.0)
    return Agent(language_model(config), shared_critic(), ppo, stop_ids=(0,), pad_id=0)


loop: LoopConfig = LoopConfig(updates=2)
folder: Path = Path("runs")
"""

WRONG = """
import jax
import jax.numpy as jnp
from ppo_jax import Agent, LossMetrics, Params, PPOConfig, PPOState, Rollout, Scores
from ppo_jax import learn, masked_mean
from ppo_jax import no_such_name  # error: attr-defined

values = jnp.zeros((2, 3))
masked_mean(values, "mask")  # error: arg-type
PPOConfig(batch_size="64")  # error: arg-type
PPOConfig(batchsize=64)  # error: call-arg


def loss_without_counts(params: Params) -> tuple[jax.Array, LossMetrics]:
    return jnp.float32(0), LossMetrics({}, {})


def advantages_without_returns(rewards: jax.Array, values: jax.Array) -> jax.Array:
    return rewards - values


def train(
    agent: Agent, state: PPOState, rollout: Rollout, scores: Scores, task: jax.Array
) -> None:
    learn(agent, state, rollout, scores)  # error: call-arg
    learn(agent, state, scores, rollout, task)  # error: arg-type
    learn(agent, state, rollout, scores, task, loss_fn=loss_without_counts)  # error: arg-type
    learn(
        agent,
        state,
        rollout,
        scores,
        task,
        advantage_fn=advantages_without_returns,  # error: arg-type
    )
    state.polices  # error: attr-defined
"""


def test_type_information_is_shipped():
    assert (importlib.resources.files("ppo_jax") / "py.typed").is_file()


@pytest.mark.slow
def test_mypy_accepts_correct_programs_and_rejects_wrong_ones(tmp_path):
    """Checks the README, a page of methods, a user's program, and a program with marked errors."""
    pages = {"readme": ROOT / "README.md", "methods": ROOT / "docs/own_loss_and_advantage.md"}
    programs = {"user": USER, "wrong": WRONG}
    for name, page in pages.items():
        blocks = code_blocks(page, "python")
        programs[name] = "\n".join(x for x in blocks if not x.startswith("# my_reward.py"))
        for block in blocks:
            if block.startswith("# my_reward.py"):
                (tmp_path / "my_reward.py").write_text(block)
    for name, program in programs.items():
        (tmp_path / f"{name}.py").write_text(program)
    files = [str(tmp_path / f"{name}.py") for name in programs]
    options = ["--config-file", "pyproject.toml", "--no-error-summary", "--no-pretty"]
    done = subprocess.run(
        [sys.executable, "-m", "mypy", *options, *files],
        cwd=ROOT,
        env=os.environ | {"MYPYPATH": f"{ROOT}:{tmp_path}"},
        capture_output=True,
        text=True,
    )
    found = re.findall(r"(\w+)\.py:(\d+): error: .*\[([\w-]+)\]$", done.stdout, re.MULTILINE)
    expected = [
        ("wrong", str(number), match[1])
        for number, line in enumerate(WRONG.splitlines(), start=1)
        if (match := re.search(r"# error: ([\w-]+)$", line))
    ]
    assert len(expected) == 9
    assert sorted(set(found)) == sorted(expected), done.stdout + done.stderr
