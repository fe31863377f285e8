"""Iterations with responses of different lengths: slots and packing, and neither, in turn."""

import dataclasses
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from experiments.benchmarks import slots
from experiments.benchmarks import work as work_
from experiments.benchmarks.work import Work
from ppo_jax import jit_steps

PHASES = ("rollout", "scoring", "reward", "update", "iteration")


def packed(work: Work) -> Work:
    """Return the work with 8 slots, and with scoring and update in bins."""
    room = work.prompt_tokens + work.new_tokens
    return dataclasses.replace(work, pack=room, micro_batch=None, slots=8)


def sampler(work: Work) -> Callable:
    """Return the compiled rollout of responses whose lengths are lognormal."""
    agent = work_.agent(work)
    model = slots.with_lengths(agent.model, work.prompt_tokens)
    return jit_steps(agent._replace(model=model, stop_ids=(0,))).sample


def timed(found: dict[str, list[float]], name: str, function: Callable, *args: Any) -> Any:
    """Call a function, add its seconds and its CPU seconds to `found`, and return its result."""
    wall, cpu = time.perf_counter(), time.process_time()
    out = jax.block_until_ready(function(*args))
    found.setdefault(f"{name}_s", []).append(time.perf_counter() - wall)
    found.setdefault(f"{name}_cpu_s", []).append(time.process_time() - cpu)
    return out


def measure(work: Work, runs: int) -> dict[str, Any]:
    """Return the medians of the seconds of each phase and of the whole iteration, in turn."""
    ways = {"unpacked": work, "packed": packed(work)}
    samplers = {way: sampler(x) for way, x in ways.items()}
    programs = {way: work_.programs(x) for way, x in ways.items()}
    state, reference, reward = work_.start(work)
    batch = tuple(map(jnp.asarray, work_.prompts(work)))
    found: dict[str, list[float]] = {}
    errors = {}
    for _ in range(runs + 1):
        for way, steps in programs.items():
            run = lambda phase, *call, way=way: timed(found, f"{phase}_{way}", *call)
            rollout = run("rollout", samplers[way], state, *batch)
            scores = run("scoring", steps.score, state, reference, rollout)
            task = run("reward", steps.reward, reward, rollout.tokens, rollout.mask)
            copy = jax.tree.map(jnp.copy, state)  # the update donates its state
            _, metrics = run("update", steps.learn, copy, rollout, scores, task)
            errors[f"first_ratio_error_{way}"] = float(metrics["policy/first_ratio_error_max"])
    for way in ways:
        for kind in ("s", "cpu_s"):
            phases = (found[f"{phase}_{way}_{kind}"] for phase in PHASES[:-1])
            found[f"iteration_{way}_{kind}"] = [sum(x) for x in zip(*phases, strict=True)]
    median = {name: statistics.median(x[1:]) for name, x in found.items()}  # the first one compiles
    ratios = {
        f"{phase}_ratio{kind}": median[f"{phase}_packed{kind}_s"]
        / median[f"{phase}_unpacked{kind}_s"]
        for phase in PHASES
        for kind in ("", "_cpu")
    }
    return {
        "work": dataclasses.asdict(ways["packed"]),
        "device": jax.devices()[0].device_kind,
        "lengths": rollout.response_mask.sum(axis=1).tolist(),
        "real_share": float(rollout.mask.mean()),
        **median,
        **ratios,
        **errors,
    }
