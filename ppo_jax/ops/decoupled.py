"""PPO with a proximal policy that is newer than the policy that sampled (decoupled PPO)."""

import chex
import jax
import jax.numpy as jnp
from jax import Array

from ppo_jax.ops.losses import clipped_policy_loss
from ppo_jax.ops.masked import masked_mean, widen
from ppo_jax.ops.options import check_positive
from ppo_jax.ops.ratios import hide_masked, policy_ratio
from ppo_jax.types import Aggregate


def decoupled_policy_loss(
    logprobs: Array,
    old_logprobs: Array,
    proximal_logprobs: Array,
    advantages: Array,
    mask: Array,
    *,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None = None,
    weight_max: float | None = None,
    aggregate: Aggregate = masked_mean,
) -> Array:
    """Clip around a proximal policy that is newer than the one that sampled (decoupled PPO).

        w = π_prox(a|s) / π_old(a|s),  ρ = π(a|s) / π_prox(a|s)
        L = -E[ w min(ρ A, clip(ρ, 1 - clip_low, 1 + clip_high) A) ]

    Args:
      logprobs: `[B, R]` float32, log π(a|s), in nats. The gradient flows through them.
      old_logprobs: `[B, R]` float32, log π_old(a|s) of the policy that sampled the tokens, in nats.
      proximal_logprobs: `[B, R]` float32, in nats, of the policy at the start of the update, or of
        `interpolated_logprobs`. They are constants.
      advantages: `[B, R]` float32.
      mask: `[B, R]` bool, true for the tokens that count.
      clip_low: see `clipped_policy_loss`.
      clip_high: see `clipped_policy_loss`.
      dual_clip: see `clipped_policy_loss`.
      weight_max: the largest `w`; positive. `None` sets no bound.
      aggregate: reduces the terms to one number.

    Returns:
      `[]` float32.

    Raises:
      AssertionError: if the shapes differ, or a mask is not bool.
      ValueError: if a bound is out of its range.

    Source:
      Hilton et al. 2021 (https://arxiv.org/abs/2110.00641); AReaL 2025
      (https://arxiv.org/abs/2505.24298). Checked against AReaL.

    Example:
      >>> logs, mask = jnp.log(jnp.array([[0.25, 0.5, 0.6]])), jnp.ones((1, 1), bool)
      >>> decoupled_policy_loss(
      ...     logs[:, 2:], logs[:, :1], logs[:, 1:2], jnp.ones((1, 1)), mask, clip_low=0.1,
      ...     clip_high=0.1).round(4)
      Array(-2.2, dtype=float32)
    """
    check_positive(weight_max=weight_max)
    proximal_logprobs = jax.lax.stop_gradient(proximal_logprobs)
    weights = policy_ratio(proximal_logprobs, jax.lax.stop_gradient(old_logprobs), mask)
    (advantages,) = hide_masked(mask, advantages)
    # The weights are positive, so they can move into the minimum.
    return clipped_policy_loss(
        logprobs,
        proximal_logprobs,
        advantages * (weights if weight_max is None else jnp.minimum(weights, weight_max)),
        mask,
        clip_low=clip_low,
        clip_high=clip_high,
        dual_clip=dual_clip,
        aggregate=aggregate,
    )


def interpolated_logprobs(logprobs: Array, old_logprobs: Array, age: Array) -> Array:
    """Estimate the log-probs of the policy before the last update, without running it (A-3PO).

        α = (age - 1) / age,  or 0 if age ≤ 1
        log π_prox = log π_old + α (log π - log π_old)

    Args:
      logprobs: `[B, R]` float32, of the policy that trains, in nats.
      old_logprobs: `[B, R]` float32, of the policy that sampled the tokens, in nats.
      age: `[B, R]` int32, the number of updates since each token was sampled.

    Returns:
      `[B, R]` float32, a constant.

    Raises:
      AssertionError: if the shapes differ.

    Source:
      A-3PO 2025 (https://arxiv.org/abs/2512.06547). Checked against AReaL.

    Example:
      >>> interpolated_logprobs(jnp.array([[-1.0]]), jnp.array([[-3.0]]), jnp.array([[4]]))
      Array([[-1.5]], dtype=float32)
    """
    chex.assert_equal_shape([logprobs, old_logprobs, age])
    new, old = (jax.lax.stop_gradient(widen(x)) for x in (logprobs, old_logprobs))
    weight = 1 - 1 / jnp.maximum(age, 1).astype(new.dtype)
    return old + weight * (new - old)
