"""Scoring and update of responses of different lengths, packed and unpacked in turn."""

import dataclasses
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.benchmarks import work as work_
from experiments.benchmarks.work import Work
from ppo_jax import Rollout


def lengths(work: Work) -> np.ndarray:
    """Return response lengths with a lognormal distribution, or the greatest length for all."""
    if work.median is None:
        return np.full(work.prompts, work.new_tokens)
    drawn = np.random.default_rng(0).lognormal(np.log(work.median), 1, work.prompts)
    return np.clip(np.rint(drawn), 1, work.new_tokens).astype(int)


def rollout(work: Work) -> Rollout:
    """Return responses of random tokens and of these lengths."""
    prompts, mask = map(jnp.asarray, work_.prompts(work))
    real = jnp.arange(work.new_tokens)[None] < lengths(work)[:, None]
    tokens = jax.random.randint(jax.random.key(3), real.shape, 1, work.vocab_size)
    return Rollout(
        tokens=jnp.concatenate([prompts, jnp.where(real, tokens, 0)], axis=1),
        mask=jnp.concatenate([mask, real], axis=1),
        response_mask=real,
        logprobs=jnp.zeros(real.shape, jnp.float32),
        ended=jnp.asarray(lengths(work) < work.new_tokens),
    )


def timed(found: dict[str, list[float]], name: str, function: Callable, *args: Any) -> Any:
    """Call a function, add its seconds and its CPU seconds to `found`, and return its result."""
    wall, cpu = time.perf_counter(), time.process_time()
    out = jax.block_until_ready(function(*args))
    found.setdefault(f"{name}_s", []).append(time.perf_counter() - wall)
    found.setdefault(f"{name}_cpu_s", []).append(time.process_time() - cpu)
    return out


def measure(work: Work, runs: int) -> dict[str, Any]:
    """Return the medians of the seconds of scoring and update, packed and unpacked, in turn."""
    room = work.prompt_tokens + work.new_tokens
    packed = dataclasses.replace(work, pack=room, micro_batch=None)
    ways = {"unpacked": work_.programs(work), "packed": work_.programs(packed)}
    state, reference, _ = work_.start(work)
    batch, task = rollout(work), jax.random.normal(jax.random.key(4), (work.prompts,))
    found: dict[str, list[float]] = {}
    errors = {}
    for _ in range(runs + 1):
        for way, programs in ways.items():
            scores = timed(found, f"scoring_{way}", programs.score, state, reference, batch)
            copy = jax.tree.map(jnp.copy, state)  # the update donates its state
            _, metrics = timed(found, f"update_{way}", programs.learn, copy, batch, scores, task)
            errors[f"first_ratio_error_{way}"] = float(metrics["policy/first_ratio_error_max"])
    median = {name: statistics.median(x[1:]) for name, x in found.items()}  # the first one compiles
    ratios = {
        f"{phase}_ratio{kind}": median[f"{phase}_packed{kind}_s"]
        / median[f"{phase}_unpacked{kind}_s"]
        for phase in ("scoring", "update")
        for kind in ("", "_cpu")
    }
    return {
        "work": dataclasses.asdict(packed),
        "device": jax.devices()[0].device_kind,
        "real_share": float(batch.mask.mean()),
        **median,
        **ratios,
        **errors,
    }
