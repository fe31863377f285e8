"""Times the phases of a PPO iteration against what this machine can do, measured in the same run.

    python -m experiments.benchmarks.phases --out DIR

Two fresh processes do the work: the first compiles everything, the second finds it compiled, and is watched for its memory.
"""

import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import tyro

from experiments.benchmarks import work as work_
from experiments.benchmarks.work import WORKS, Work
from ppo_jax.plan.flops import matmul_flops
from ppo_jax.plan.memory import memory, size_of


@dataclasses.dataclass(frozen=True, kw_only=True)
class Phases:
    """Rollout, scoring, reward model, update and the whole iteration."""

    out: Path
    """Folder for summary.json."""
    work: str = "small"
    """One of the shapes in work.py."""
    runs: int = 5
    """Timed iterations, after one that is not."""
    critic: str = ""
    """shared or separate instead of the shape's."""
    child: str = ""
    """Used between its own processes."""

    def shape(self) -> Work:
        return dataclasses.replace(
            WORKS[self.work], **({"critic": self.critic} if self.critic else {})
        )


def main(options: Phases) -> dict[str, Any]:
    if options.child:
        print(json.dumps(measure(options)))
        return {}
    options.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as cache:
        first, second = (_in_process(options, cache, name) for name in ("first", "second"))
    found = {**second, "compile_s": first["compile_s"], "compile_cached_s": second["compile_s"]}
    (options.out / "summary.json").write_text(json.dumps(found, indent=2) + "\n")
    for name, value in found.items():
        print(f"{name:32}{value:.6g}" if isinstance(value, int | float) else f"{name:32}{value}")
    return found


def _in_process(options: Phases, cache: str, name: str) -> dict[str, Any]:
    """In a process that keeps compiled programs in `cache`."""
    environment = {
        **os.environ,
        "JAX_COMPILATION_CACHE_DIR": cache,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    command = [
        sys.executable,
        "-m",
        "experiments.benchmarks.phases",
        "--child",
        name,
        "--out",
        str(options.out),
        "--work",
        options.work,
        "--runs",
        str(options.runs),
        *(["--critic", options.critic] if options.critic else []),
    ]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def measure(options: Phases) -> dict[str, Any]:
    work = options.shape()
    made, plain, args = work_.programs(work), work_.functions(work), work_.shapes(work)
    begin = time.perf_counter()
    compiled = {
        name: getattr(made, name).lower(*args[name]).compile() for name in ("sample", "learn")
    }
    compile_s = time.perf_counter() - begin
    compiled |= {
        name: getattr(made, name).lower(*args[name]).compile() for name in ("score", "reward")
    }
    one = dataclasses.replace(
        work, new_tokens=1
    )  # a rollout of one token is the pass over the prompts
    compiled["prefill"] = work_.programs(one).sample.lower(*args["sample"]).compile()
    if options.child == "first":
        return {"compile_s": compile_s}
    flops = {
        name: matmul_flops(getattr(plain, name), *args[name], while_trips=work.new_tokens - 1)
        for name in args
    }
    peak, times, rates = _iterations(work, compiled, options.runs)
    rate, bandwidth = statistics.median(rates), memory_bandwidth()
    flops["prefill"] = matmul_flops(work_.functions(one).sample, *args["sample"])
    decode_bound = decoding_bound(work, flops["sample"] - flops["prefill"], rate, bandwidth)
    bound = decode_bound + flops["prefill"] / rate
    median = {name: statistics.median(x) for name, x in times.items()}
    account = memory(
        work.config, work.ppo, prompt_tokens=work.prompt_tokens, critic=work.critic, adapters=None
    )
    predicted = sum(account.values()) + size_of(
        args["reward"][0]
    )  # the reward model lies there too
    return {
        "work": dataclasses.asdict(work),
        "device": jax.devices()[0].device_kind,
        "compile_s": compile_s,
        "matmul_gflops": rate / 1e9,
        "bandwidth_gb_s": bandwidth / 1e9,
        **{f"{name}_s": x for name, x in median.items()},
        **{
            f"{name}_gflop": flops[
                {"rollout": "sample", "scoring": "score", "update": "learn"}.get(name, name)
            ]
            / 1e9
            for name in ("rollout", "scoring", "reward", "update")
        },
        "update/share_of_peak": flops["learn"] / median["update"] / rate,
        "scoring/share_of_peak": flops["score"] / median["scoring"] / rate,
        "rollout/share_of_bound": bound / median["rollout"],
        "rollout/bound_s": bound,
        "decode/share_of_bound": decode_bound / (median["rollout"] - median["prefill"]),
        "decode/bound_s": decode_bound,
        "peak_bytes": peak,
        "predicted_peak_bytes": predicted,
        "million_episodes_h": median["iteration"]
        * 1e6
        / work.prompts
        / 3600,  # OpenAI's run of 2019 took 4.8 hours
    }


def _iterations(
    work: Work, compiled: dict[str, Callable], runs: int
) -> tuple[int, dict[str, list[float]], list[float]]:
    """Bytes that the iterations took at most, seconds of each phase, and the rate of matrix products between the iterations."""
    held = jax.block_until_ready((*work_.start(work), *map(jnp.asarray, work_.prompts(work))))
    before = resident() - size_of(held)
    Path("/proc/self/clear_refs").write_text(
        "5"
    )  # what making these took does not count in the high-water mark
    state, reference, reward, tokens, mask = held
    del held
    times: dict[str, list[float]] = {
        name: [] for name in ("rollout", "scoring", "reward", "update", "iteration", "prefill")
    }
    for run in range(runs + 1):
        marks = [time.perf_counter()]

        def done(x: Any, marks: list[float] = marks) -> Any:
            jax.block_until_ready(x)
            marks.append(time.perf_counter())
            return x

        rollout = done(compiled["sample"](state, tokens, mask))
        scores = done(compiled["score"](state, reference, rollout))
        task = done(compiled["reward"](reward, rollout.tokens, rollout.mask))
        state, _ = done(compiled["learn"](state, rollout, scores, task))
        if run:
            for name, a, b in zip(times, marks, marks[1:], strict=False):
                times[name].append(b - a)
            times["iteration"].append(marks[4] - marks[0])
            done(compiled["prefill"](state, tokens, mask))
            times["prefill"].append(marks[5] - marks[4])
    device = jax.devices()[0].memory_stats()
    peak = device["peak_bytes_in_use"] if device else resident("VmHWM") - before
    del scores, task
    rates = []
    for _ in range(runs):  # in turn with updates, so that both see the same machine
        rates.append(matmul_rate(work.dtype))
        begin = time.perf_counter()
        rollout = jax.block_until_ready(compiled["sample"](state, tokens, mask))
        scores, task = (
            compiled["score"](state, reference, rollout),
            compiled["reward"](reward, rollout.tokens, rollout.mask),
        )
        begin = time.perf_counter() if jax.block_until_ready((scores, task)) else begin
        state, _ = jax.block_until_ready(compiled["learn"](state, rollout, scores, task))
        times["update"].append(time.perf_counter() - begin)
    return peak, times, rates


def resident(field: str = "VmRSS") -> int:
    status = Path("/proc/self/status").read_text()
    return next(
        int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith(field + ":")
    )


def matmul_rate(dtype: str, size: int = 2048) -> float:
    """FLOP/s of a large matrix product, the best of several."""
    size = size if jax.default_backend() == "cpu" else 4 * size
    a, b = (jax.random.normal(jax.random.key(i), (size, size), dtype) for i in range(2))
    return (
        2
        * size**3
        / _best(jax.jit(lambda a, b: jnp.dot(a, b, preferred_element_type=jnp.float32)), a, b)
    )


def memory_bandwidth(size: int = 2**28) -> float:
    """Bytes read a second, the best of several: the sum of a large array."""
    size = size if jax.default_backend() == "cpu" else 16 * size
    x = jnp.ones(size // 4, jnp.float32)
    return size / _best(jax.jit(jnp.sum), x)


def _best(function: Callable, *args: Any, runs: int = 8) -> float:
    """Seconds of a call, the best of several; on an accelerator calls are short, and ten follow one another."""
    calls, times = 1 if jax.default_backend() == "cpu" else 10, []
    jax.block_until_ready(function(*args))
    for _ in range(runs):
        begin = time.perf_counter()
        jax.block_until_ready([function(*args) for _ in range(calls)])
        times.append((time.perf_counter() - begin) / calls)
    return min(times)


def decoding_bound(work: Work, flops: float, rate: float, bandwidth: float) -> float:
    """Seconds that decoding needs at least: each step the longer of its arithmetic and of reading parameters and cache once."""
    config, each = work.config, jnp.dtype(work.dtype).itemsize
    params = (
        size_of(jax.eval_shape(lambda: work_.init_params(config, jax.random.key(0)))) / 4 * each
    )
    seconds, steps = 0.0, work.new_tokens - 1
    for filled in range(work.prompt_tokens, work.prompt_tokens + steps):
        cache = (
            2 * config.layers * work.prompts * filled * config.key_heads * config.head_width * each
        )
        seconds += max((params + cache) / bandwidth, flops / steps / rate)
    return seconds


if __name__ == "__main__":
    main(tyro.cli(Phases))
