"""The steps of an iteration under `jax.pmap`."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ppo_jax.distributed.compilation import Steps
from ppo_jax.ppo import iteration
from ppo_jax.ppo.iteration import Agent, PPOState
from ppo_jax.types import AdvantageFn, LossFn, Params


def pmap_steps(
    agent: Agent,
    devices: Sequence[Any] | None = None,
    *,
    advantage_fn: AdvantageFn | None = None,
    loss_fn: LossFn | None = None,
) -> Steps:
    """By `pmap`: a replica of everything on each device, rows spread, gradients and averages summed over the devices.

    The same results as `jit_steps` with all devices on `data`, which is to be preferred: only a mesh can cut parameters, and JAX
    keeps `pmap` for what exists. Use this one inside programs that are built on `pmap`. One process.
    """
    devices = jax.local_devices() if devices is None else devices
    n, axis = len(devices), "devices"
    cut = functools.partial(
        jax.tree.map, lambda x: jnp.asarray(x).reshape(n, x.shape[0] // n, *x.shape[1:])
    )
    join = functools.partial(jax.tree.map, lambda x: x.reshape(-1, *x.shape[2:]))
    mapped = functools.partial(jax.pmap, axis_name=axis, devices=devices)

    def own_sample(state, frozen, prompts, mask, row_ids):
        return iteration.sample(agent, state, prompts, mask, row_ids=row_ids, frozen=frozen)

    def own_score(state, ref_params, frozen, rollout):
        return iteration.score(agent, state, ref_params, rollout, frozen=frozen)

    def own_learn(state, frozen, rollout, scores, task_scores, token_scores):
        more = {
            "frozen": frozen,
            "advantage_fn": advantage_fn,
            "loss_fn": loss_fn,
            "axis_name": axis,
        }
        return iteration.learn(agent, state, rollout, scores, task_scores, token_scores, **more)

    all_sample = mapped(own_sample, in_axes=(None, None, 0, 0, 0))
    all_score = mapped(own_score, in_axes=(None, None, None, 0))
    all_learn = mapped(own_learn, in_axes=(None, None, 0, 0, 0, 0), out_axes=None)

    def sample(
        state: PPOState, prompts: jax.Array, mask: jax.Array, *, frozen: Params | None = None
    ):
        return join(all_sample(state, frozen, *cut((prompts, mask, np.arange(len(prompts))))))

    def score(state: PPOState, ref_params: Params, rollout, *, frozen: Params | None = None):
        return join(all_score(state, ref_params, frozen, cut(rollout)))

    def learn(
        state: PPOState,
        rollout,
        scores,
        task_scores,
        token_scores=None,
        *,
        frozen: Params | None = None,
    ):
        return all_learn(state, frozen, *cut((rollout, scores, task_scores, token_scores)))

    return Steps(sample, score, learn)
