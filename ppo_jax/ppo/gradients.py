"""Gradient of a minibatch, a micro-batch at a time."""

from typing import Any

import jax
import jax.numpy as jnp

from ppo_jax.ops.masked import BY_TOKEN, Aggregation
from ppo_jax.ops.metrics import add_parts
from ppo_jax.ppo.scoring import split_rows
from ppo_jax.sharding import constrain_params
from ppo_jax.types import Counts, Experience, LossFn, LossMetrics, Params


def minibatch_gradient(
    loss_fn: LossFn,
    params: Params,
    batch: Experience,
    *,
    micro_batches: int = 1,
    aggregation: Aggregation = BY_TOKEN,
    axis_name: str | None = None,
) -> tuple[Params, LossMetrics]:
    """Gradient and metrics of a minibatch, a micro-batch at a time, with one reduction over devices at the end.

    Args:
      loss_fn: the part that a micro-batch has in the loss.
      params: what the gradient is of.
      batch: the minibatch; its rows are a multiple of `micro_batches`.
      micro_batches: how many parts.
      aggregation: how the loss counts.
      axis_name: mapped axis over which the minibatch is spread.

    Returns:
      The gradient, like `params`, and the metrics of the whole minibatch.
    """
    counts = Counts(
        tokens=BY_TOKEN.count(batch.response_mask, axis_name=axis_name),
        policy=aggregation.count(batch.response_mask, axis_name=axis_name),
        value=aggregation.count(batch.value_mask, axis_name=axis_name),
    )

    def part(micro_batch: Experience) -> tuple[Params, LossMetrics]:
        (_, metrics), grads = jax.value_and_grad(loss_fn, has_aux=True)(params, micro_batch, counts)
        return constrain_params(
            grads
        ), metrics  # else the compiler may add up whole gradients on each device

    def add(total, micro_batch):
        grads, metrics = part(micro_batch)
        return (jax.tree.map(jnp.add, total[0], grads), add_parts(total[1], metrics)), None

    if micro_batches == 1:
        grads, metrics = part(batch)
    else:
        parts = split_rows(batch, micro_batches)
        shapes = jax.eval_shape(part, jax.tree.map(lambda x: x[0], parts))
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        (grads, metrics), _ = jax.lax.scan(add, zeros, parts)
    if axis_name is not None:
        grads, mean = jax.lax.psum((grads, metrics.mean), axis_name)
        metrics = LossMetrics(mean, jax.lax.pmax(metrics.max, axis_name))
    return grads, metrics


def all_finite(tree: Any) -> jax.Array:
    """Whether no number of any array is an infinity or NaN: `[]` bool."""
    return jnp.stack([jnp.isfinite(x).all() for x in jax.tree.leaves(tree)]).all()
