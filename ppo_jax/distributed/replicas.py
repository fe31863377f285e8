"""The steps of a PPO iteration under `jax.pmap`, for programs that already use `pmap`."""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from ppo_jax.distributed.compilation import Steps
from ppo_jax.ppo import iteration
from ppo_jax.ppo.state import Agent, PPOState
from ppo_jax.types import AdvantageFn, LossFn, Rollout

_AXIS = "devices"
_REPLICATED = ("state", "ref_params", "frozen")  # All other arguments are split by rows.


def pmap_steps(
    agent: Agent,
    devices: Sequence[jax.Device] | None = None,
    *,
    loss_fn: LossFn | None = None,
    advantage_fn: AdvantageFn | None = None,
) -> Steps:
    """Compile the steps of a PPO iteration with `jax.pmap`.

    Every device holds a replica of all parameters, and each device computes a share of the rows of
    the batch. Gradients and averages are summed over the devices, so the result agrees with
    `jit_steps` on a mesh that has all devices on its `data` axis.

    Prefer `jit_steps`: only a mesh can shard parameters, and JAX maintains `pmap` for existing
    programs only. `pmap_steps` works in one process and does not donate the state.

    Args:
      agent: the functions of policy and critic, and the settings. `batch_size` must be a multiple
        of the number of devices.
      devices: the devices to use; by default all of this process.
      loss_fn: replaces the loss that the settings name.
      advantage_fn: replaces the estimator that the settings name.

    Returns:
      The three steps. They take and return arrays of the whole batch.

    Raises:
      TypeError: when a step is called with rows that do not divide by the number of devices.

    Example:
      >>> from ppo_jax import PPOConfig, TransformerConfig, init_params, language_model
      >>> from ppo_jax import init_state, shared_critic, zero_head
      >>> config = TransformerConfig(
      ...     vocab_size=8, positions=8, width=4, layers=1, heads=1, mlp_width=4)
      >>> ppo = PPOConfig(batch_size=2, minibatches=1, max_new_tokens=3)
      >>> agent = Agent(language_model(config), shared_critic(), ppo, stop_ids=(0,), pad_id=0)
      >>> policy = init_params(config, jax.random.key(0))
      >>> params = {"policy": policy, "critic": {"head": zero_head(config.width)}}
      >>> state = init_state(agent, params, jax.random.key(1), updates=1)
      >>> prompts = jnp.ones((2, 4), int)
      >>> pmap_steps(agent, jax.devices()[:1]).sample(state, prompts, prompts > 0).responses.shape
      (2, 3)
    """
    devices = jax.local_devices() if devices is None else devices
    learn = partial(
        iteration.learn, agent, loss_fn=loss_fn, advantage_fn=advantage_fn, axis_name=_AXIS
    )
    sampler = agent
    if (slots := agent.config.rollout_slots) is not None:  # Each device has its share of them.
        share = max(1, slots // len(devices))
        sampler = agent._replace(config=replace(agent.config, rollout_slots=share))
    sample = _map_rows(partial(iteration.sample, sampler), devices)
    score = _map_rows(partial(iteration.score, agent), devices)

    def sample_batch(state: PPOState, prompts: Array, *args: Any, **kwargs: Any) -> Rollout:
        # Row numbers in the whole batch, so that samples do not depend on the number of devices.
        return sample(state, prompts, *args, row_ids=jnp.arange(len(prompts)), **kwargs)

    return Steps(sample_batch, score, _map_rows(learn, devices, out_axes=None))


def _map_rows(
    function: Callable[..., Any], devices: Sequence[jax.Device], out_axes: int | None = 0
) -> Callable[..., Any]:
    """Map a step over devices.

    Args:
      function: a step. Its arguments `state`, `ref_params` and `frozen` are replicated, and all
        others are split over the devices by rows.
      devices: the devices to map over.
      out_axes: 0 to join the rows of the results; None if the results are equal on all devices.

    Returns:
      A function with the arguments of `function`, which takes and returns whole batches.
    """
    mapped = jax.pmap(
        lambda replicated, rows: function(**replicated, **rows),
        axis_name=_AXIS,
        devices=devices,
        in_axes=(None, 0),
        out_axes=out_axes,
    )
    signature = inspect.signature(function)

    def split(x: Array) -> Array:
        return jnp.asarray(x).reshape(len(devices), -1, *x.shape[1:])

    def call(*args: Any, **kwargs: Any) -> Any:
        rows = signature.bind(*args, **kwargs).arguments
        replicated = {name: rows.pop(name) for name in _REPLICATED if name in rows}
        results = mapped(replicated, jax.tree.map(split, dict(rows)))
        if out_axes is None:
            return results
        return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), results)

    return call
