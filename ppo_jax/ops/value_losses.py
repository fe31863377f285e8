"""The parts of a loss that are not of the policy: values and entropy."""

import jax.numpy as jnp
from jax import Array

from ppo_jax.ops.masked import check_mask, masked_mean, widen
from ppo_jax.ops.options import check_positive
from ppo_jax.types import Aggregate


def clipped_value_loss(
    values: Array,
    old_values: Array,
    returns: Array,
    mask: Array,
    *,
    clip: float | None,
    aggregate: Aggregate = masked_mean,
) -> Array:
    """Compute half the squared error of the values, with the values clipped around the old ones.

        V_c = V_old + clip(V - V_old, -clip, clip)
        L = ½ E[ max((V - G)², (V_c - G)²) ]

    Args:
      values: `[B, R]` float32, V, in units of reward. The gradient flows through them.
      old_values: `[B, R]` float32, V_old, the values that the advantages were computed with.
      returns: `[B, R]` float32, G, the targets.
      mask: `[B, R]` bool, true for the steps that count.
      clip: how far a value may move from its old value, in units of reward; positive. `None` gives
        the plain squared error.
      aggregate: reduces the terms to one number.

    Returns:
      `[]` float32.

    Raises:
      AssertionError: if the shapes differ, or a mask is not bool.
      ValueError: if `clip` is not positive.

    Source:
      `ppo2` of OpenAI Baselines, and the code of Ziegler et al. 2019
      (https://arxiv.org/abs/1909.08593).

    Example:
      >>> one = jnp.ones((1, 1))
      >>> clipped_value_loss(one, 0 * one, 2 * one, one > 0, clip=0.5)
      Array(1.125, dtype=float32)
    """
    check_positive(clip=clip)
    check_mask(mask, values, old_values, returns)
    # Masking before the arithmetic keeps a NaN outside the mask out of the gradient.
    values, old_values, returns = (
        widen(jnp.where(mask, x, 0)) for x in (values, old_values, returns)
    )
    error = (values - returns) ** 2
    if clip is not None:
        clipped = old_values + jnp.clip(values - old_values, -clip, clip)
        error = jnp.maximum(error, (clipped - returns) ** 2)
    return 0.5 * aggregate(error, mask)


def entropy_bonus(entropies: Array, mask: Array, *, aggregate: Aggregate = masked_mean) -> Array:
    """Compute the mean entropy, which PPO may reward to keep the policy exploring.

    Args:
      entropies: `[B, R]` float32, in nats.
      mask: `[B, R]` bool, true for the tokens that count.
      aggregate: reduces the entropies to one number.

    Returns:
      `[]` float32, to be subtracted from a loss.

    Raises:
      AssertionError: if the shapes differ, or a mask is not bool.

    Source:
      Schulman et al. 2017 (https://arxiv.org/abs/1707.06347), eq. 9.

    Example:
      >>> entropy_bonus(jnp.array([[1.0, 2.0]]), jnp.array([[True, True]]))
      Array(1.5, dtype=float32)
    """
    return aggregate(entropies, mask)


def value_clipfrac(
    values: Array,
    old_values: Array,
    returns: Array,
    mask: Array,
    *,
    clip: float | None,
    aggregate: Aggregate = masked_mean,
) -> Array:
    """Compute the share of the steps whose value loss is that of the clipped value.

    The gradient of these steps is 0.

    Args:
      values: `[B, R]` float32, see `clipped_value_loss`.
      old_values: `[B, R]` float32, see `clipped_value_loss`.
      returns: `[B, R]` float32, see `clipped_value_loss`.
      mask: `[B, R]` bool, true for the steps that count.
      clip: see `clipped_value_loss`; `None` gives 0.
      aggregate: reduces the steps to one number.

    Returns:
      `[]` float32.

    Raises:
      AssertionError: if the shapes differ, or a mask is not bool.
      ValueError: if `clip` is not positive.

    Source:
      `vf_clipfrac` of verl and TRL.

    Example:
      >>> one = jnp.ones((1, 2))
      >>> values = jnp.array([[1.0, 0.25]])
      >>> value_clipfrac(values, 0 * one, 2 * one, one > 0, clip=0.5)
      Array(0.5, dtype=float32)
    """
    check_positive(clip=clip)
    check_mask(mask, values, old_values, returns)
    values, old_values, returns = (widen(x) for x in (values, old_values, returns))
    if clip is None:
        return aggregate(jnp.zeros_like(values), mask)
    # This form leaves a value that has moved less as it is, so that rounding counts nothing.
    clipped = jnp.clip(values, old_values - clip, old_values + clip)
    is_clipped = (clipped - returns) ** 2 > (values - returns) ** 2
    return aggregate(is_clipped.astype(jnp.float32), mask)
