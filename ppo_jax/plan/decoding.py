"""Predict the time of a decode step, beside the least time that its memory traffic takes."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from ppo_jax.distributed.meshes import batch_shards
from ppo_jax.models.config import TransformerConfig
from ppo_jax.models.transformer import language_model
from ppo_jax.plan.account import Account
from ppo_jax.plan.memory import size_of
from ppo_jax.plan.topology import Chip
from ppo_jax.ppo.settings import PPOConfig
from ppo_jax.sharding import shardings
from ppo_jax.sharding_rules import DECODING_RULES

_LOOKED_UP = {"position_embedding", "type_embedding"}


class DecodeStep(NamedTuple):
    """The mean over the decode steps of a rollout, on each chip.

    Attributes:
      seconds: the compiler's estimate of the time, including collectives.
      collective_s: the part of it that is spent in collectives, at the published rate of the chip's
        links.
      collective_bytes: sum of the sizes of the collectives of one step.
      bound_s: the least time, from `bound_seconds`.

    Example:
      >>> step = DecodeStep(seconds=2e-3, collective_s=0.0, collective_bytes=0, bound_s=1e-3)
      >>> step.bound_s / step.seconds
      0.5
    """

    seconds: float
    collective_s: float
    collective_bytes: int
    bound_s: float = 0.0


def decode_step(costs: Account) -> DecodeStep | None:
    """Return the mean decode step of a rollout, or None if it has no decode loop."""
    if not costs.step_count:
        return None
    size = sum(x.bytes for x in costs.steps.collectives.values())
    return DecodeStep(
        seconds=costs.steps.seconds / costs.step_count,
        collective_s=costs.steps.collective_s / costs.step_count,
        collective_bytes=size // costs.step_count,
    )


def bound_seconds(
    config: TransformerConfig,
    params: Any,
    ppo: PPOConfig,
    mesh: Mesh,
    chip: Chip,
    *,
    prompt_tokens: int,
) -> float:
    """Return the time to read once what a mean decode step must read, on each chip.

    These are the parameters in the type that decoding computes in, without tables of which a step
    reads a few rows only, and the filled part of the key/value cache. The parameters are sharded
    over `fsdp` and `tensor`, and the cache over rows and key heads.

    Args:
      config: the model.
      params: shapes of the policy's parameters, including frozen ones.
      ppo: settings of the iteration.
      mesh: the mesh.
      chip: what each device offers.
      prompt_tokens: `P`. Every response is assumed to have its greatest length.
    """
    rounded = jax.eval_shape(language_model(config).rounded, params)
    tables = _LOOKED_UP if config.tied else _LOOKED_UP | {"embedding"}
    read = {name: part for name, part in rounded.items() if name not in tables}
    placed = jax.tree.map(
        lambda x, on: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=on),
        read,
        shardings(read, mesh, DECODING_RULES),
    )
    rows = (ppo.rollout_slots or ppo.rollout_rows or ppo.batch_size) // batch_shards(mesh)
    shared = mesh.shape["tensor"] if config.key_heads % mesh.shape["tensor"] == 0 else 1
    position = 2 * config.key_heads // shared * config.head_width * jnp.dtype(config.dtype).itemsize
    filled = prompt_tokens + np.arange(max(1, ppo.max_new_tokens - 1))
    positions = sum(np.minimum(filled, window or np.inf).mean() for window in config.layer_windows)
    return float(size_of(placed) + rows * position * positions) / (chip.bandwidth * 1e9)
