"""Sums, means, moments and whitening over the entries that a mask keeps.

Every average of the library goes through this file. `axis_name` names a mapped axis (`pmap`, `shard_map`, `vmap`): sums and
counts are then reduced over it, so a result never depends on how the batch was split. Entries outside the mask may hold anything,
NaN included.
"""

from collections.abc import Callable
from typing import NamedTuple, Protocol

import chex
import jax
import jax.numpy as jnp


class Aggregate(Protocol):
    """How per-token terms become one number: `masked_mean` or `sequence_mean`."""

    def __call__(
        self, x: jax.Array, mask: jax.Array, *, count: jax.Array | None = None
    ) -> jax.Array: ...


def masked_sum(x: jax.Array, mask: jax.Array, *, axis_name: str | None = None) -> jax.Array:
    """Sum of `x` where `mask` is true.

    Args:
      x: `[...]` float.
      mask: `[...]` bool, same shape.
      axis_name: mapped axis to sum over as well.

    Returns:
      `[]` float32, or the type of `x` if that is wider.

    Example:
      >>> masked_sum(jnp.array([1.0, 2.0, jnp.nan]), jnp.array([True, True, False]))
      Array(3., dtype=float32)
    """
    chex.assert_equal_shape([x, mask])
    total = jnp.sum(jnp.where(mask, x, 0), dtype=jnp.promote_types(x.dtype, jnp.float32))
    return total if axis_name is None else jax.lax.psum(total, axis_name)


def masked_count(mask: jax.Array, *, axis_name: str | None = None) -> jax.Array:
    """Number of true entries, at least 1 so that it can divide: `[]` float32.

    Example:
      >>> masked_count(jnp.array([True, True, False]))
      Array(2., dtype=float32)
    """
    count = jnp.sum(mask, dtype=jnp.float32)
    count = count if axis_name is None else jax.lax.psum(count, axis_name)
    return jnp.maximum(count, 1)


def masked_mean(
    x: jax.Array, mask: jax.Array, *, count: jax.Array | None = None, axis_name: str | None = None
) -> jax.Array:
    """Mean over the kept entries: `Σ mask·x / count`.

    Args:
      x: `[...]` float.
      mask: `[...]` bool, same shape.
      count: `[]` the divisor, by default the number of kept entries. A micro-batch passes the count of the whole batch;
        the results then add up to the mean of the whole.
      axis_name: mapped axis to average over as well.

    Returns:
      `[]` float32, or the type of `x` if that is wider; 0 where the mask keeps nothing.

    Example:
      >>> masked_mean(jnp.array([1.0, 3.0, 9.0]), jnp.array([True, True, False]))
      Array(2., dtype=float32)
    """
    count = masked_count(mask, axis_name=axis_name) if count is None else count
    return masked_sum(x, mask, axis_name=axis_name) / count


def sequence_count(mask: jax.Array, *, axis_name: str | None = None) -> jax.Array:
    """Number of rows with a real token, at least 1: `[]` float32, for `mask [B, R]`.

    Example:
      >>> sequence_count(jnp.array([[True, True], [False, False]]))
      Array(1., dtype=float32)
    """
    return masked_count(mask.any(axis=1), axis_name=axis_name)


def sequence_mean(x: jax.Array, mask: jax.Array, *, count: jax.Array | None = None) -> jax.Array:
    """Mean over sequences of the mean over each one's tokens, so a short response weighs as much as a long one.

    Args:
      x: `[B, R]` float.
      mask: `[B, R]` bool. A row with no real token has no weight.
      count: `[]` the number of sequences to divide by, by default those with a real token.

    Returns:
      `[]` float32, or wider.

    Example:
      >>> sequence_mean(jnp.array([[1.0, 3.0], [8.0, 0.0]]), jnp.array([[True, True], [True, False]]))
      Array(5., dtype=float32)
    """
    chex.assert_rank([x, mask], 2)
    chex.assert_equal_shape([x, mask])
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    lengths = jnp.maximum(mask.sum(axis=1), 1).astype(x.dtype)
    per_row = jnp.where(mask, x, 0).sum(axis=1) / lengths
    return masked_mean(per_row, mask.any(axis=1), count=count)


class Aggregation(NamedTuple):
    """A mean and the count that it divides by, so that micro-batches can share the count of the whole."""

    mean: Aggregate
    count: Callable[..., jax.Array]


BY_TOKEN = Aggregation(masked_mean, masked_count)
BY_SEQUENCE = Aggregation(sequence_mean, sequence_count)


def masked_var(
    x: jax.Array, mask: jax.Array, *, unbiased: bool = False, axis_name: str | None = None
) -> jax.Array:
    """Variance over the kept entries: `Σ mask·(x - mean)² / n`, or `/ (n - 1)` where `unbiased`.

    Args:
      x: `[...]` float.
      mask: `[...]` bool, same shape.
      unbiased: divide by `n - 1` (Bessel); with a single entry the result is 0.
      axis_name: mapped axis whose moments are global.

    Returns:
      `[]` float32, or the type of `x` if that is wider.

    Example:
      >>> masked_var(jnp.array([1.0, 3.0, 9.0]), jnp.array([True, True, False]), unbiased=True)
      Array(2., dtype=float32)
    """
    x = jnp.where(mask, x, 0)  # NaN under the mask must not reach the gradient of the square
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    n = masked_count(mask, axis_name=axis_name)
    mean = masked_mean(x, mask, count=n, axis_name=axis_name)
    return masked_sum((x - mean) ** 2, mask, axis_name=axis_name) / (
        jnp.maximum(n - 1, 1) if unbiased else n
    )


def masked_whiten(
    x: jax.Array,
    mask: jax.Array,
    *,
    shift_mean: bool = True,
    unbiased: bool = False,
    eps: float = 1e-8,
    axis_name: str | None = None,
) -> jax.Array:
    """Scales the kept entries to variance 1: `(x - mean) / √(var + eps)`, plus `mean` where it is kept.

    Args:
      x: `[...]` float.
      mask: `[...]` bool, same shape.
      shift_mean: also move the mean to 0; if false the mean stays as it was (rewards are whitened so).
      unbiased: which variance, see `masked_var`.
      eps: added to the variance.
      axis_name: mapped axis whose moments are global.

    Returns:
      The shape of `x`, float32 or wider; 0 outside the mask.

    Source:
      `whiten` of Ziegler et al. 2019 (https://arxiv.org/abs/1909.08593), as in their code.

    Example:
      >>> masked_whiten(jnp.array([1.0, 3.0, 9.0]), jnp.array([True, True, False]))
      Array([-1.,  1.,  0.], dtype=float32)
    """
    chex.assert_equal_shape([x, mask])
    x = jnp.where(mask, x, 0)
    mean = masked_mean(x, mask, axis_name=axis_name)
    var = masked_var(x, mask, unbiased=unbiased, axis_name=axis_name)
    white = (x - mean) * jax.lax.rsqrt(var + eps)
    return jnp.where(mask, white if shift_mean else white + mean, 0)
