"""Sums, means, variances and whitening over the entries that a mask keeps.

All averages of the package are computed here. `axis_name` names a mapped axis (of `shard_map`,
`pmap` or `vmap`). Sums and counts are then reduced over that axis too, so that results and their
gradients do not depend on how the batch is split (see `ops.axes`). Entries outside the mask may
hold anything, even NaN: they change neither a result nor its gradient.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import chex
import jax
import jax.numpy as jnp
from jax import Array

from ppo_jax.ops.axes import share, sum_shards
from ppo_jax.ops.options import check_not_negative
from ppo_jax.types import AxisName


def widen(x: Array) -> Array:
    """Cast to float32, or keep the type of `x` if that is wider."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def check_dtype(kind: type[bool] | type[int], **arrays: Array) -> None:
    """Raise AssertionError unless all arrays are of a kind; the keywords name them."""
    for name, x in arrays.items():
        if not jnp.issubdtype(x.dtype, jnp.bool_ if kind is bool else jnp.integer):
            raise AssertionError(f"{name} must be of type {kind.__name__}, but is of {x.dtype}.")


def check_mask(mask: Array, *arrays: Array, name: str = "mask") -> None:
    """Raise AssertionError unless a mask is boolean and has the shape of each of the arrays."""
    check_dtype(bool, **{name: mask})
    chex.assert_equal_shape([mask, *arrays])


def nearly_equal(largest: Array, least: Array) -> Array:
    """Whether the extremes of some numbers differ by the rounding of a few operations at most."""
    rounding = 8 * jnp.finfo(largest.dtype).eps * jnp.maximum(jnp.abs(largest), jnp.abs(least))
    # An infinite number is not close to any other, although the rounding is infinite then.
    return (largest <= least) | ((largest - least <= rounding) & jnp.isfinite(rounding))


def _constant(x: Array, mask: Array, axis_name: AxisName | None) -> Array:
    """Whether the kept entries are equal up to the rounding of a few operations, `[]` bool."""
    x = jax.lax.stop_gradient(x)
    largest = jnp.max(x, where=mask, initial=-jnp.inf)
    least = jnp.min(x, where=mask, initial=jnp.inf)
    if axis_name is not None:
        largest, least = jax.lax.pmax(largest, axis_name), jax.lax.pmin(least, axis_name)
    return nearly_equal(largest, least)


def masked_sum(x: Array, mask: Array, *, axis_name: AxisName | None = None) -> Array:
    """Sum the entries of `x` where `mask` is true.

    Args:
      x: `[...]` float.
      mask: `[...]` bool, of the shape of `x`.
      axis_name: the mapped axis to sum over as well.

    Returns:
      `[]` float32, or the type of `x` if that is wider.

    Raises:
      AssertionError: if `x` and `mask` have different shapes, or `mask` is not bool.

    Example:
      >>> masked_sum(jnp.array([1.0, 2.0, jnp.nan]), jnp.array([True, True, False]))
      Array(3., dtype=float32)
    """
    check_mask(mask, x)
    return sum_shards(jnp.sum(widen(jnp.where(mask, x, 0))), axis_name)


def masked_count(mask: Array, *, axis_name: AxisName | None = None) -> Array:
    """Count the true entries of a mask; the result is at least 1, so that it can be a divisor.

    Args:
      mask: `[...]` bool.
      axis_name: the mapped axis to sum over as well.

    Returns:
      `[]` float32.

    Raises:
      AssertionError: if `mask` is not bool.

    Example:
      >>> masked_count(jnp.array([True, True, False]))
      Array(2., dtype=float32)
    """
    check_mask(mask)
    return jnp.maximum(sum_shards(jnp.sum(mask, dtype=jnp.float32), axis_name), 1)


def masked_mean(
    x: Array, mask: Array, *, count: Array | None = None, axis_name: AxisName | None = None
) -> Array:
    """Average the entries of `x` where `mask` is true.

        mean = Σ mask · x / count

    Args:
      x: `[...]` float.
      mask: `[...]` bool, of the shape of `x`.
      count: `[]` float32, the divisor. By default it is the number of kept entries. For a
        micro-batch, pass the count of the whole batch: the results of all micro-batches then add
        up to the mean of the batch.
      axis_name: the mapped axis to average over as well.

    Returns:
      `[]` float32, or the type of `x` if that is wider; 0 if the mask keeps no entry.

    Raises:
      AssertionError: if `x` and `mask` have different shapes, or `mask` is not bool.

    Example:
      >>> masked_mean(jnp.array([1.0, 3.0, 9.0]), jnp.array([True, True, False]))
      Array(2., dtype=float32)
    """
    count = masked_count(mask, axis_name=axis_name) if count is None else count
    return masked_sum(x, mask, axis_name=axis_name) / count


def sequence_count(mask: Array, *, axis_name: AxisName | None = None) -> Array:
    """Count the sequences with at least one real token; the result is at least 1.

    Args:
      mask: `[B, R]` bool.
      axis_name: the mapped axis to sum over as well.

    Returns:
      `[]` float32.

    Raises:
      AssertionError: if `mask` is not bool.

    Example:
      >>> sequence_count(jnp.array([[True, True], [False, False]]))
      Array(1., dtype=float32)
    """
    check_mask(mask)
    return masked_count(mask.any(axis=1), axis_name=axis_name)


def sequence_mean(x: Array, mask: Array, *, count: Array | None = None) -> Array:
    """Average over sequences the mean over the tokens of each sequence.

    A short response then has the same weight as a long one.

    Args:
      x: `[B, R]` float.
      mask: `[B, R]` bool. A row without a real token has no weight.
      count: `[]` float32, the divisor. By default it is the number of rows with a real token.

    Returns:
      `[]` float32, or the type of `x` if that is wider.

    Raises:
      AssertionError: if `x` and `mask` are not both `[B, R]`, or `mask` is not bool.

    Example:
      >>> x, mask = jnp.array([[1.0, 3.0], [8.0, 0.0]]), jnp.array([[True, True], [True, False]])
      >>> sequence_mean(x, mask)
      Array(5., dtype=float32)
    """
    chex.assert_rank([x, mask], 2)
    check_mask(mask, x)
    x = widen(x)
    lengths = jnp.maximum(mask.sum(axis=1), 1).astype(x.dtype)
    means = jnp.where(mask, x, 0).sum(axis=1) / lengths
    return masked_mean(means, mask.any(axis=1), count=count)


class MeanFn(Protocol):
    """A masked mean with a divisor that can be given."""

    def __call__(self, x: Array, mask: Array, /, *, count: Array | None = None) -> Array:
        """Return the mean, `[]` float32, of `x [B, R]` float where `mask [B, R]` bool is true."""


@dataclass(frozen=True)
class Aggregation:
    """A masked mean and its divisor, which all micro-batches of a minibatch share.

    Attributes:
      mean: reduces per-token terms to one number.
      count: `(mask, *, axis_name=None) -> []`, the divisor of that mean.

    Example:
      >>> x, mask = jnp.array([[1.0, 3.0], [8.0, 0.0]]), jnp.array([[True, True], [True, False]])
      >>> BY_TOKEN.mean(x, mask), BY_SEQUENCE.mean(x, mask)
      (Array(4., dtype=float32), Array(5., dtype=float32))
    """

    mean: MeanFn
    count: Callable[..., Array]


BY_TOKEN = Aggregation(masked_mean, masked_count)
BY_SEQUENCE = Aggregation(sequence_mean, sequence_count)


def masked_var(
    x: Array, mask: Array, *, unbiased: bool = False, axis_name: AxisName | None = None
) -> Array:
    """Compute the variance of the entries of `x` where `mask` is true.

        var = Σ mask · (x - mean)² / n,  or  / (n - 1) if `unbiased`

    Args:
      x: `[...]` float.
      mask: `[...]` bool, of the shape of `x`.
      unbiased: divide by `n - 1` (Bessel's correction). For a single entry the result is 0.
      axis_name: the mapped axis to reduce over as well.

    Returns:
      `[]` float32, or the type of `x` if that is wider; 0 if the entries are equal up to rounding.

    Raises:
      AssertionError: if `x` and `mask` have different shapes, or `mask` is not bool.

    Example:
      >>> masked_var(jnp.array([1.0, 3.0, 9.0]), jnp.array([True, True, False]), unbiased=True)
      Array(2., dtype=float32)
    """
    check_mask(mask, x)
    # Masking before squaring keeps a NaN outside the mask out of the gradient.
    x = widen(jnp.where(mask, x, 0))
    n = masked_count(mask, axis_name=axis_name)
    mean = share(masked_mean(x, mask, count=n, axis_name=axis_name), axis_name)
    total = masked_sum((x - mean) ** 2, mask, axis_name=axis_name)
    var = total / (jnp.maximum(n - 1, 1) if unbiased else n)
    return jnp.where(_constant(x, mask, axis_name), 0, var)


def masked_whiten(
    x: Array,
    mask: Array,
    *,
    shift_mean: bool = True,
    unbiased: bool = False,
    eps: float = 1e-8,
    axis_name: AxisName | None = None,
) -> Array:
    """Scale the kept entries to variance 1 and, by default, shift them to mean 0.

        white = (x - mean) / √(var + eps),  plus mean if `shift_mean` is false

    Args:
      x: `[...]` float.
      mask: `[...]` bool, of the shape of `x`.
      shift_mean: whether to shift the mean to 0. Rewards are whitened without the shift.
      unbiased: which variance to use; see `masked_var`.
      eps: added to the variance; not negative.
      axis_name: the mapped axis over which mean and variance are taken as well.

    Returns:
      An array of the shape of `x`, float32 or wider; 0 outside the mask. Entries that are equal up
      to rounding become 0, or keep their mean if `shift_mean` is false.

    Raises:
      AssertionError: if `x` and `mask` have different shapes, or `mask` is not bool.
      ValueError: if `eps` is negative.

    Source:
      `whiten` in the code of Ziegler et al. 2019 (https://arxiv.org/abs/1909.08593).

    Example:
      >>> masked_whiten(jnp.array([1.0, 3.0, 9.0]), jnp.array([True, True, False]))
      Array([-1.,  1.,  0.], dtype=float32)
    """
    check_not_negative(eps=eps)
    check_mask(mask, x)
    x = widen(jnp.where(mask, x, 0))
    mean = share(masked_mean(x, mask, axis_name=axis_name), axis_name)
    var = share(masked_var(x, mask, unbiased=unbiased, axis_name=axis_name), axis_name)
    white = (x - mean) * jax.lax.rsqrt(var + eps)
    # The mean of equal entries is rounded, and the difference from it would be scaled up to 1.
    white = jnp.where(_constant(x, mask, axis_name), 0, white)
    return jnp.where(mask, white if shift_mean else white + mean, 0)
