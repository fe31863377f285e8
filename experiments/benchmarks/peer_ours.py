"""Time PPO iterations of this package on the work given as JSON.

python -m experiments.benchmarks.peer_ours '{"layers": 4, ...}'
"""

import json
import sys
import time

import jax
import jax.numpy as jnp

from experiments.benchmarks import work as work_
from experiments.benchmarks.work import Work


def main(settings: dict) -> dict:
    """Return the seconds of each rollout and of each whole iteration."""
    runs = settings.pop("runs")
    work = Work(**settings)
    programs = work_.programs(work)
    state, reference, reward = work_.start(work)
    tokens, mask = map(jnp.asarray, work_.prompts(work))
    times = {"rollout_s": [], "iteration_s": []}
    for _ in range(runs + 1):
        start = time.perf_counter()
        rollout = jax.block_until_ready(programs.sample(state, tokens, mask))
        sampled = time.perf_counter()
        scores = programs.score(state, reference, rollout)
        state, metrics = programs.learn(
            state, rollout, scores, programs.reward(reward, rollout.tokens, rollout.mask)
        )
        jax.block_until_ready((state, metrics))
        times["iteration_s"].append(time.perf_counter() - start)
        times["rollout_s"].append(sampled - start)
    return {name: x[1:] for name, x in times.items()}


if __name__ == "__main__":
    print(json.dumps(main(json.loads(sys.argv[1]))))
