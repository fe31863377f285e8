"""Time PPO iterations of this package on the work given as JSON.

python -m experiments.benchmarks.peer_ours '{"layers": 4, ...}'
"""

import json
import sys
import time

import jax
import jax.numpy as jnp

from experiments.benchmarks import ragged
from experiments.benchmarks import work as work_
from experiments.benchmarks.work import Work


def main(settings: dict) -> dict:
    """Return the seconds of each rollout and of each whole iteration, and the responses' lengths.

    Responses of different lengths are sampled in 8 slots and packed.
    """
    runs = settings.pop("runs")
    work = Work(**settings)
    if work.median:
        work = ragged.packed(work)
    programs = work_.programs(work)
    sample_rows = ragged.sampler(work) if work.median else programs.sample
    state, reference, reward = work_.start(work)
    first = jax.tree.map(jnp.copy, state)  # An update donates its state.
    tokens, mask = map(jnp.asarray, work_.prompts(work))
    times = {"rollout_s": [], "iteration_s": []}
    for _ in range(runs + 1):
        start = time.perf_counter()
        # Responses of different lengths have the same ones in every iteration.
        sampler = first if work.median else state
        rollout = jax.block_until_ready(sample_rows(sampler, tokens, mask))
        sampled = time.perf_counter()
        scores = programs.score(state, reference, rollout)
        state, metrics = programs.learn(
            state, rollout, scores, programs.reward(reward, rollout.tokens, rollout.mask)
        )
        jax.block_until_ready((state, metrics))
        times["iteration_s"].append(time.perf_counter() - start)
        times["rollout_s"].append(sampled - start)
    lengths = rollout.response_mask.sum(axis=1).tolist()
    return {name: x[1:] for name, x in times.items()} | {"lengths": lengths}


if __name__ == "__main__":
    print(json.dumps(main(json.loads(sys.argv[1]))))
