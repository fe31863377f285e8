"""Scoring and update of long sequences with both forms of attention, in turn."""

import dataclasses
import statistics
from typing import Any

import jax
import jax.numpy as jnp

from experiments.benchmarks import ragged
from experiments.benchmarks import work as work_
from experiments.benchmarks.work import Work
from ppo_jax import Rollout
from ppo_jax.models import attention


def rollout(work: Work) -> Rollout:
    """Return responses of random tokens, all of the greatest length."""
    prompts, mask = map(jnp.asarray, work_.prompts(work))
    shape = work.prompts, work.new_tokens
    tokens = jax.random.randint(jax.random.key(3), shape, 1, work.vocab_size)
    return Rollout(
        tokens=jnp.concatenate([prompts, tokens], axis=1),
        mask=jnp.concatenate([mask, jnp.ones(shape, bool)], axis=1),
        response_mask=jnp.ones(shape, bool),
        logprobs=jnp.zeros(shape, jnp.float32),
        ended=jnp.zeros(work.prompts, bool),
    )


def measure(work: Work, runs: int) -> dict[str, Any]:
    """Return medians of the seconds of scoring and update with each form, and their memory.

    The forms are `matrix`, which computes the logits of all pairs of positions at once, and
    `blocks`, which `ppo_jax.models.attention` chooses for long sequences.
    """
    # Programs are cached by the config of their model, so the other form has another one.
    works = {"matrix": dataclasses.replace(work, positions=work.positions + 1), "blocks": work}
    batch, task = rollout(work), jax.random.normal(jax.random.key(4), (work.prompts,))
    threshold, others = attention.LONG, {}
    found: dict[str, list[float]] = {}
    for run in range(runs + 1):
        for form, shape in works.items():
            attention.LONG = threshold if form == "blocks" else 10**9
            programs, (state, reference, _) = work_.programs(shape), work_.start(shape)
            arguments = state, reference, batch
            if not run:
                scoring = programs.score.lower(*arguments).compile().memory_analysis()
                others[f"scoring_{form}_temporary_bytes"] = scoring.temp_size_in_bytes
            scores = ragged.timed(found, f"scoring_{form}", programs.score, *arguments)
            arguments = state, batch, scores, task
            if not run:
                update = programs.learn.lower(*arguments).compile().memory_analysis()
                others[f"update_{form}_temporary_bytes"] = update.temp_size_in_bytes
            _, metrics = ragged.timed(found, f"update_{form}", programs.learn, *arguments)
            others[f"first_ratio_error_{form}"] = float(metrics["policy/first_ratio_error_max"])
    attention.LONG = threshold
    median = {name: statistics.median(x[1:]) for name, x in found.items()}  # the first one compiles
    ratios = {
        f"{phase}_ratio{kind}": median[f"{phase}_blocks{kind}_s"]
        / median[f"{phase}_matrix{kind}_s"]
        for phase in ("scoring", "update")
        for kind in ("", "_cpu")
    }
    device = jax.devices()[0].device_kind
    return {"work": dataclasses.asdict(work), "device": device, **median, **ratios, **others}
