"""The gradient of a minibatch, accumulated over micro-batches and devices."""

from functools import partial

import jax
import jax.numpy as jnp
from jax import Array

from ppo_jax.ops.axes import separate
from ppo_jax.ops.masked import BY_TOKEN, Aggregation
from ppo_jax.ops.metrics import add_parts
from ppo_jax.ppo.batching import split_rows
from ppo_jax.ppo.packing import Bins, sum_bins
from ppo_jax.sharding import constrain_params
from ppo_jax.types import AxisName, Counts, Experience, LossFn, LossMetrics, Params

_Gradient = tuple[Params, LossMetrics]


def minibatch_gradient(
    loss_fn: LossFn,
    params: Params,
    batch: Experience,
    axis_name: AxisName | None = None,
    *,
    micro_batches: int = 1,
    aggregation: Aggregation = BY_TOKEN,
    bins: Bins | None = None,
) -> tuple[Params, LossMetrics]:
    """Compute the gradient and the metrics of a minibatch, one micro-batch at a time.

    Under `axis_name`, gradients are reduced over devices once per minibatch, after all
    micro-batches. The result is the same under `vmap`, `pmap` and `shard_map`, checked or not.

    Args:
      loss_fn: the loss of a micro-batch; these add up to the loss of the minibatch.
      params: the parameters to differentiate with respect to.
      batch: the minibatch, `[B, ...]` arrays.
      axis_name: mapped axis over which the minibatch is split.
      micro_batches: number of micro-batches; it must divide `B`.
      aggregation: the mean over tokens that `loss_fn` uses.
      bins: the shape of the bins that rows are packed into; `None` for no packing. A
        micro-batch is then the rows of `bins.total` bins: `loss_fn` gets the whole minibatch each
        time, with the masks of all other rows false. `micro_batches` has no effect.

    Returns:
      The gradient, a pytree like `params`, and the metrics of the whole minibatch.

    Example:
      >>> import jax.numpy as jnp
      >>> x, mask = jnp.ones((2, 1)), jnp.ones((2, 1), bool)
      >>> batch = Experience(x, mask, mask, mask, x, x, x, 3 * x)
      >>> def squared_error(params, batch, counts):
      ...     loss = ((params - batch.returns) ** 2).sum() / counts.value
      ...     return loss, LossMetrics({"loss/total": loss}, {})
      >>> minibatch_gradient(squared_error, jnp.float32(1.0), batch, micro_batches=2)[0]
      Array(-4., dtype=float32)
    """
    good = None if batch.scores is None else batch.response_mask & (batch.scores > 0)[:, None]
    counts = Counts(
        tokens=BY_TOKEN.count(batch.response_mask, axis_name=axis_name),
        policy=aggregation.count(batch.response_mask, axis_name=axis_name),
        value=aggregation.count(batch.value_mask, axis_name=axis_name),
        good=None if good is None else BY_TOKEN.count(good, axis_name=axis_name),
        steps=BY_TOKEN.count(batch.value_mask, axis_name=axis_name),
    )

    # Each device differentiates with respect to its own copy and reduces the gradients itself.
    params = separate(params, axis_name)

    # Jitted to be traced once, although `eval_shape` and `scan` both call it.
    @partial(jax.jit, inline=True)
    def part(rows: Experience) -> tuple[Params, LossMetrics]:
        (_, metrics), grads = jax.value_and_grad(loss_fn, has_aux=True)(params, rows, counts)
        # Without the constraint the compiler may add up unsharded gradients on every device.
        return constrain_params(grads), metrics

    def add(total: _Gradient, new: _Gradient) -> _Gradient:
        return jax.tree.map(jnp.add, total[0], new[0]), add_parts(total[1], new[1])

    if bins is not None:
        of_bins = lambda chosen: part(_only(batch, chosen))
        grads, metrics = sum_bins(of_bins, batch.mask[:, :-1], bins, add=add, axis_name=axis_name)
    elif micro_batches == 1:
        grads, metrics = part(batch)
    else:
        parts = split_rows(batch, micro_batches)
        shapes = jax.eval_shape(part, jax.tree.map(lambda x: x[0], parts))
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        zeros = separate(zeros, axis_name)
        (grads, metrics), _ = jax.lax.scan(
            lambda total, rows: (add(total, part(rows)), None), zeros, parts
        )
    if axis_name is not None:
        grads, mean = jax.lax.psum((grads, metrics.mean), axis_name)
        metrics = LossMetrics(mean, jax.lax.pmax(metrics.max, axis_name))
    return grads, metrics


def _only(batch: Experience, chosen: Array) -> Experience:
    """Return the batch with the masks of all rows false but those where `chosen [B]` is true."""
    return batch.replace(
        mask=batch.mask & chosen[:, None],
        response_mask=batch.response_mask & chosen[:, None],
        value_mask=batch.value_mask & chosen[:, None],
    )
