"""Time PPO iterations of this package on the work given as JSON.

python -m experiments.benchmarks.peer_ours '{"layers": 4, ...}'
"""

import dataclasses
import json
import sys
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp

from experiments.benchmarks import slots
from experiments.benchmarks import work as work_
from experiments.benchmarks.work import Work
from ppo_jax import jit_steps


def main(settings: dict) -> dict:
    """Return the seconds of each rollout and of each whole iteration, and the responses' lengths.

    Responses of different lengths are sampled in 16 slots and packed.
    """
    runs = settings.pop("runs")
    work = Work(**settings)
    if work.median:
        room = work.prompt_tokens + work.new_tokens
        work = dataclasses.replace(work, pack=room, micro_batch=None, slots=16)
    programs = work_.programs(work)
    sample_rows = ragged_sample(work) if work.median else programs.sample
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


def ragged_sample(work: Work) -> Callable:
    """Return the compiled rollout of responses whose lengths are lognormal with this median."""
    agent = work_.agent(work)
    model = slots.with_lengths(agent.model, work.prompt_tokens)
    config = dataclasses.replace(agent.config, pack=None)
    return jit_steps(agent._replace(model=model, config=config, stop_ids=(0,))).sample


if __name__ == "__main__":
    print(json.dumps(main(json.loads(sys.argv[1]))))
