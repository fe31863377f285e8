"""A training step on the parts of a batch, which are cut to the lengths of their rows.

The rows of a batch are sorted by length, and each part of them is cut to little more than its
longest row. The gradients of the parts are added up with the weights of their means, so that the
step is that of the whole batch, up to rounding, and little padding is computed.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.training.train_state import TrainState
from jax import Array

from ppo_jax.types import Params

Arrays = tuple[np.ndarray, ...]  # Row `i` of every array belongs to example `i`.
LossAndAccuracy = tuple[Array, Array]
SupervisedLoss = Callable[..., LossAndAccuracy]  # `loss_fn(params, *batch)`
Weight = Callable[..., float]  # `weight(*batch)`, the weight of the means over a batch

_LENGTHS = 8  # number of lengths that parts may have at most, and so of compiled programs
_ALIGNED = 8  # Parts are cut to a multiple of so many columns.
_PARTS = 4  # A batch has so many parts, or the largest smaller number that divides its rows.


class Totals(NamedTuple):
    """Weighted sums over the parts of a batch: the gradient, the loss and the accuracy."""

    grads: Params
    loss: Array
    accuracy: Array


def epoch_rows(rows: int, *, batch_size: int, seed: int, epoch: int) -> np.ndarray:
    """Return the rows of each batch of an epoch, `[steps, batch_size]` int.

    Rows that do not fill a batch are left out; each epoch leaves out others.

    Args:
      rows: number of rows.
      batch_size: rows of a batch.
      seed: seed of the shuffles.
      epoch: number of the epoch, from 0.

    Raises:
      ValueError: if there are fewer rows than `batch_size`.

    Example:
      >>> epoch_rows(5, batch_size=2, seed=0, epoch=0).shape
      (2, 2)
    """
    steps = rows // batch_size
    if not steps:
        raise ValueError(f"{rows} rows are left to learn from, fewer than batch_size={batch_size}.")
    order = np.random.default_rng((seed, epoch)).permutation(rows)[: steps * batch_size]
    return order.reshape(steps, batch_size)


def split_batch(
    arrays: Arrays, rows: np.ndarray, lengths: np.ndarray, *, parts: int | None = None
) -> Iterator[Arrays]:
    """Yield the rows of a batch in parts of equal numbers of rows, sorted by length.

    Each part is cut to one of at most 8 lengths, so that few programs are compiled.

    Args:
      arrays: `[n, ...]` each; those with two or more axes are cut along the second one.
      rows: `[B]` int, the rows of the batch.
      lengths: `[n]` int, the number of columns that each row uses.
      parts: number of parts; by default 4, or the largest smaller number that divides `B`.

    Yields:
      The arrays of each part.

    Example:
      >>> tokens = np.zeros((4, 30), np.int32)
      >>> lengths = np.array([30, 3, 12, 9])
      >>> [part.shape for part, in split_batch((tokens,), np.arange(4), lengths, parts=2)]
      [(2, 16), (2, 30)]
    """
    count = parts or next(k for k in range(_PARTS, 0, -1) if len(rows) % k == 0)
    step = -(-int(lengths.max()) // (_LENGTHS * _ALIGNED)) * _ALIGNED
    by_length = rows[np.argsort(lengths[rows], kind="stable")]
    for part in np.split(by_length, count):
        end = -(-int(lengths[part].max()) // step) * step
        yield tuple(x[part, :end] if x.ndim > 1 else x[part] for x in arrays)


def make_step(
    loss_fn: SupervisedLoss, *, weight: Weight | None = None
) -> Callable[[TrainState, list[Arrays]], tuple[TrainState, dict[str, Array]]]:
    """Return a function that takes one optimizer step on the parts of a batch.

    Args:
      loss_fn: `loss_fn(params, *batch) -> (loss, accuracy)`, both means over the batch.
      weight: `weight(*batch)`, the weight of a batch's means; by default its number of rows.

    Returns:
      `step(state, parts) -> (state, metrics)`, where `parts` is a list of what `split_batch`
      yields. It donates the state. The metrics are `train/loss`, `train/accuracy` and
      `optimizer/grad_norm`, the norm of the gradient before clipping.
    """

    @partial(jax.jit, donate_argnums=1)
    def add(params: Params, totals: Totals, share: Array, *batch: Array) -> Totals:
        (loss, accuracy), grads = jax.value_and_grad(loss_fn, has_aux=True)(params, *batch)
        new = Totals(grads, loss, accuracy)
        return jax.tree.map(lambda total, x: total + share * x, totals, new)

    @jax.jit
    def nothing(params: Params) -> Totals:
        return Totals(jax.tree.map(jnp.zeros_like, params), jnp.float32(0), jnp.float32(0))

    @partial(jax.jit, donate_argnums=0)
    def apply(state: TrainState, totals: Totals) -> tuple[TrainState, dict[str, Array]]:
        metrics = {
            "train/loss": totals.loss,
            "train/accuracy": totals.accuracy,
            "optimizer/grad_norm": optax.tree.norm(totals.grads),
        }
        return state.apply_gradients(grads=totals.grads), metrics

    def step(state: TrainState, parts: list[Arrays]) -> tuple[TrainState, dict[str, Array]]:
        weights = [mean_weight(weight, part) for part in parts]
        totals = nothing(state.params)
        for part, x in zip(parts, weights, strict=True):
            share = np.float32(x / max(sum(weights), 1.0))
            totals = add(state.params, totals, share, *part)
        return apply(state, totals)

    return step


def mean_weight(weight: Weight | None, batch: Arrays) -> float:
    """Return the weight of the means over a batch; by default its number of rows."""
    return float(len(batch[0]) if weight is None else weight(*batch))
