"""Time the phases of a PPO iteration and compare them with the limits of this machine.

    python -m experiments.benchmarks.phases --out DIR

The rate of matrix products and the memory bandwidth are measured in the same run. Two new processes
do the work: the first compiles everything, the second uses the compilation cache and measures time
and memory.
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

from experiments.benchmarks import forms, ragged
from experiments.benchmarks import work as work_
from experiments.benchmarks.work import WORKS, Work
from ppo_jax import estimate_memory, init_params, matmul_flops


@dataclasses.dataclass(frozen=True, kw_only=True)
class Phases:
    """Time rollout, scoring, reward model, update and the whole iteration."""

    out: Path
    """Folder for summary.json."""
    work: str = "small"
    """Name of a shape in work.py."""
    runs: int = 5
    """Timed iterations, after one that is not timed."""
    critic: str = ""
    """shared or separate, instead of the critic of the shape."""
    child: str = ""
    """Set in the processes that this program starts: first or second."""

    def shape(self) -> Work:
        """Return the chosen shape."""
        work = WORKS[self.work]
        return dataclasses.replace(work, critic=self.critic) if self.critic else work


def main(options: Phases) -> dict[str, Any]:
    """Measure, write a summary to `options.out`, print and return it."""
    if options.work in ("ragged", "long"):
        measured = {"ragged": ragged.measure, "long": forms.measure}[options.work]
        return _report(options, measured(options.shape(), options.runs))
    if options.child:
        print(json.dumps(measure(options)))
        return {}
    with tempfile.TemporaryDirectory() as cache:
        first, second = (_in_process(options, cache, name) for name in ("first", "second"))
    found = {**second, "compile_s": first["compile_s"], "compile_cached_s": second["compile_s"]}
    return _report(options, found)


def _report(options: Phases, found: dict[str, Any]) -> dict[str, Any]:
    """Write figures to `options.out`, print and return them."""
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "summary.json").write_text(json.dumps(found, indent=2) + "\n")
    for name, value in found.items():
        print(f"{name:32}{value:.6g}" if isinstance(value, int | float) else f"{name:32}{value}")
    return found


def _in_process(options: Phases, cache: str, name: str) -> dict[str, Any]:
    """Return the figures of a new process that caches compiled programs in the folder `cache`."""
    environment = {
        **os.environ,
        "JAX_COMPILATION_CACHE_DIR": cache,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    given = {"child": name, "out": options.out, "work": options.work, "runs": options.runs}
    if options.critic:
        given["critic"] = options.critic
    command = [sys.executable, "-m", "experiments.benchmarks.phases"]
    command += [str(x) for option, value in given.items() for x in (f"--{option}", value)]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def measure(options: Phases) -> dict[str, Any]:
    """Return compile times, and in the second process also times, rates, FLOPs and memory."""
    work = options.shape()
    shapes = work_.shapes(work)
    compiled, compile_s = _compile(work, shapes)
    if options.child == "first":
        return {"compile_s": compile_s}
    peak, times, rates = _iterations(work, compiled, options.runs)
    rate, bandwidth = statistics.median(rates), memory_bandwidth()
    account = estimate_memory(
        work.config, work.ppo, prompt_tokens=work.prompt_tokens, critic=work.critic, adapters=None
    )
    return {
        "work": dataclasses.asdict(work),
        "device": jax.devices()[0].device_kind,
        "compile_s": compile_s,
        "matmul_gflops": rate / 1e9,
        "bandwidth_gb_s": bandwidth / 1e9,
        **_rates(work, shapes, times, rate, bandwidth),
        "peak_bytes": peak,
        # The parameters of the reward model are in memory too.
        "predicted_peak_bytes": sum(account.values()) + size_of(shapes["reward"][0]),
        # For comparison: OpenAI's run of 2019 took 4.8 hours.
        "million_episodes_h": statistics.median(times["iteration"]) * 1e6 / work.prompts / 3600,
    }


def size_of(tree: Any) -> int:
    """Return the number of bytes of the arrays, or shapes, of a tree."""
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def _prefill(work: Work) -> Work:
    """Return work whose rollout is of a single token, that is the pass over the prompts."""
    return dataclasses.replace(work, new_tokens=1)


def _compile(work: Work, shapes: dict[str, tuple]) -> tuple[dict[str, Callable], float]:
    """Return the compiled phases and the seconds that compiling rollout and update took."""
    programs = work_.programs(work)
    compile_phase = lambda name: getattr(programs, name).lower(*shapes[name]).compile()
    start = time.perf_counter()
    compiled = {name: compile_phase(name) for name in ("sample", "learn")}
    compile_s = time.perf_counter() - start
    compiled |= {name: compile_phase(name) for name in ("score", "reward")}
    prefill = work_.programs(_prefill(work)).sample
    compiled["prefill"] = prefill.lower(*shapes["sample"]).compile()
    return compiled, compile_s


def _rates(
    work: Work,
    shapes: dict[str, tuple],
    times: dict[str, list[float]],
    rate: float,
    bandwidth: float,
) -> dict[str, float]:
    """Return seconds and FLOPs of the phases, and their shares of what the machine can do."""
    plain = work_.functions(work)
    flops = {name: matmul_flops(getattr(plain, name), *shapes[name]) for name in shapes}
    flops["prefill"] = matmul_flops(work_.functions(_prefill(work)).sample, *shapes["sample"])
    decode_bound = decoding_bound(work, flops["sample"] - flops["prefill"], rate, bandwidth)
    bound = decode_bound + flops["prefill"] / rate
    median = {name: statistics.median(x) for name, x in times.items()}
    names = {"rollout": "sample", "scoring": "score", "reward": "reward", "update": "learn"}
    return {
        **{f"{name}_s": x for name, x in median.items()},
        **{f"{phase}_gflop": flops[name] / 1e9 for phase, name in names.items()},
        "update/share_of_peak": flops["learn"] / median["update"] / rate,
        "scoring/share_of_peak": flops["score"] / median["scoring"] / rate,
        "rollout/share_of_bound": bound / median["rollout"],
        "rollout/bound_s": bound,
        "decode/share_of_bound": decode_bound / (median["rollout"] - median["prefill"]),
        "decode/bound_s": decode_bound,
    }


def _iterations(
    work: Work, compiled: dict[str, Callable], runs: int
) -> tuple[int, dict[str, list[float]], list[float]]:
    """Run iterations.

    Returns:
      Peak memory of the iterations in bytes, seconds of each phase, and rates of matrix products
      measured between further updates, so that both are measured under the same conditions.
    """
    arrays = jax.block_until_ready((*work_.start(work), *map(jnp.asarray, work_.prompts(work))))
    before = resident() - size_of(arrays)
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak resident memory, VmHWM
    state, *arguments = arrays
    del arrays
    phases = ("rollout", "scoring", "reward", "update", "iteration", "prefill")
    times: dict[str, list[float]] = {name: [] for name in phases}
    for run in range(runs + 1):
        state, marks = _iteration(compiled, state, *arguments)
        if run:
            for name, a, b in zip(times, marks, marks[1:], strict=False):
                times[name].append(b - a)
            times["iteration"].append(marks[-1] - marks[0])
            start = time.perf_counter()
            _, _, *prompts = arguments
            jax.block_until_ready(compiled["prefill"](state, *prompts))
            times["prefill"].append(time.perf_counter() - start)
    device = jax.devices()[0].memory_stats()
    peak = device["peak_bytes_in_use"] if device else resident("VmHWM") - before
    rates = []
    for _ in range(runs):
        rates.append(matmul_rate(work.dtype))
        state, marks = _iteration(compiled, state, *arguments)
        times["update"].append(marks[4] - marks[3])
    return peak, times, rates


def _iteration(
    compiled: dict[str, Callable], state: Any, reference: Any, reward: Any, tokens: Any, mask: Any
) -> tuple[Any, list[float]]:
    """Run one iteration; return the new state and the times between which each phase ran."""
    marks = [time.perf_counter()]

    def done(x: Any) -> Any:
        jax.block_until_ready(x)
        marks.append(time.perf_counter())
        return x

    rollout = done(compiled["sample"](state, tokens, mask))
    scores = done(compiled["score"](state, reference, rollout))
    task = done(compiled["reward"](reward, rollout.tokens, rollout.mask))
    state, _ = done(compiled["learn"](state, rollout, scores, task))
    return state, marks


def resident(field: str = "VmRSS") -> int:
    """Return the resident memory of this process in bytes, or its peak with `VmHWM`."""
    status = Path("/proc/self/status").read_text()
    return next(
        int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith(field + ":")
    )


def matmul_rate(dtype: str, size: int = 2048) -> float:
    """Return the FLOP/s of a large matrix product, the best of several."""
    size = size if jax.default_backend() == "cpu" else 4 * size
    a, b = (jax.random.normal(jax.random.key(i), (size, size), dtype) for i in range(2))
    product = jax.jit(lambda a, b: jnp.dot(a, b, preferred_element_type=jnp.float32))
    return 2 * size**3 / _best(product, a, b)


def memory_bandwidth(size: int = 2**28) -> float:
    """Return the bytes per second read by the sum of a large array, the best of several."""
    size = size if jax.default_backend() == "cpu" else 16 * size
    x = jnp.ones(size // 4, jnp.float32)
    return size / _best(jax.jit(jnp.sum), x)


def _best(function: Callable, *args: Any, runs: int = 8) -> float:
    """Return the seconds of a call, the best of several; accelerators run ten calls in a row."""
    calls, times = 1 if jax.default_backend() == "cpu" else 10, []
    jax.block_until_ready(function(*args))
    for _ in range(runs):
        begin = time.perf_counter()
        jax.block_until_ready([function(*args) for _ in range(calls)])
        times.append((time.perf_counter() - begin) / calls)
    return min(times)


def decoding_bound(work: Work, flops: float, rate: float, bandwidth: float) -> float:
    """Return a lower bound of the seconds of decoding.

    Each step takes at least as long as its arithmetic, and as reading parameters and cache once.
    """
    config, itemsize = work.config, jnp.dtype(work.dtype).itemsize
    shapes = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
    params = size_of(shapes) / 4 * itemsize
    seconds, steps = 0.0, work.new_tokens - 1
    for filled in range(work.prompt_tokens, work.prompt_tokens + steps):
        entries = config.layers * work.prompts * filled * config.key_heads * config.head_width
        cache = 2 * entries * itemsize
        seconds += max((params + cache) / bandwidth, flops / steps / rate)
    return seconds


if __name__ == "__main__":
    main(tyro.cli(Phases))
