"""Losses of the policy that read one importance ratio per token.

All take the log-probs now and at sampling, the advantages and a mask, and return one number to
minimise. `aggregate` reduces the per-token terms, as in `ops.losses`. To correct for a sampler
whose probabilities differ from π_old, multiply the advantages by weights of `ops.importance`.
"""

import jax
import jax.numpy as jnp
from jax import Array

from ppo_jax.ops.clips import Clip, ratio_clip
from ppo_jax.ops.masked import masked_mean
from ppo_jax.ops.options import check_not_negative, check_positive
from ppo_jax.ops.ratios import hide_masked, policy_ratio
from ppo_jax.types import Aggregate


def _weighted_logprobs(weights: Array, logprobs: Array, advantages: Array) -> Array:
    """The terms `sg(w) A log π`, whose gradient is that of log π with the weight `w A`."""
    return jax.lax.stop_gradient(weights) * advantages * logprobs


def cispo_loss(
    logprobs: Array,
    old_logprobs: Array,
    advantages: Array,
    mask: Array,
    *,
    clip_low: float,
    clip_high: float,
    aggregate: Aggregate = masked_mean,
) -> Array:
    """Clip the weight of each token instead of dropping its gradient (CISPO).

        L = -E[ sg(clip(ρ, 1 - clip_low, 1 + clip_high)) A log π(a|s) ]

    Args:
      logprobs: `[B, R]` float32, log π(a|s), in nats. The gradient flows through them.
      old_logprobs: `[B, R]` float32, log π_old(a|s) of the policy that sampled the tokens, in nats.
      advantages: `[B, R]` float32.
      mask: `[B, R]` bool, true for the tokens that count.
      clip_low: the weight is at least `1 - clip_low`; not negative, and 1 or more for no lower
        bound, as in the paper.
      clip_high: the weight is at most `1 + clip_high`; not negative.
      aggregate: reduces the terms to one number.

    Returns:
      `[]` float32. Its value depends on log π and says little; its gradient matters.

    Raises:
      AssertionError: if the shapes differ, or a mask is not bool.
      ValueError: if a bound is negative.

    Source:
      MiniMax-M1 2025 (https://arxiv.org/abs/2506.13585), eq. 4-5. Checked against verl and slime.

    Example:
      >>> old_logprobs, mask = jnp.log(jnp.array([[0.2]])), jnp.ones((1, 1), bool)
      >>> loss = lambda x: cispo_loss(
      ...     x, old_logprobs, jnp.ones((1, 1)), mask, clip_low=1.0, clip_high=0.5)
      >>> jax.grad(loss)(jnp.log(jnp.array([[0.8]])))  # The ratio of 4 is clipped to 1.5.
      Array([[-1.5]], dtype=float32)
    """
    check_not_negative(clip_low=clip_low, clip_high=clip_high)
    ratio = policy_ratio(logprobs, old_logprobs, mask)
    logprobs, advantages = hide_masked(mask, logprobs, advantages)
    weights = jnp.clip(ratio, 1 - clip_low, 1 + clip_high)
    return -aggregate(_weighted_logprobs(weights, logprobs, advantages), mask)


def cispo_clip(
    logprobs: Array, old_logprobs: Array, mask: Array, *, clip_low: float, clip_high: float
) -> Clip:
    """Say which weights `cispo_loss` bounds. It drops no token.

    Args:
      logprobs: `[B, R]` float32, see `cispo_loss`.
      old_logprobs: `[B, R]` float32, see `cispo_loss`.
      mask: `[B, R]` bool, true for the tokens that count.
      clip_low: see `cispo_loss`.
      clip_high: see `cispo_loss`.

    Returns:
      The tokens whose ratio is below and above the bounds.

    Raises:
      AssertionError: if the shapes differ, or the mask is not bool.

    Example:
      >>> x, mask = jnp.zeros((1, 1)), jnp.ones((1, 1), bool)
      >>> clip = cispo_clip(x + 1, x, mask, clip_low=1.0, clip_high=0.5)
      >>> clip.high, clip.positive
      (Array([[ True]], dtype=bool), None)
    """
    outside = ratio_clip(logprobs, old_logprobs, mask, clip_low=clip_low, clip_high=clip_high)
    return Clip(outside.low, outside.high)


def dis_loss(
    logprobs: Array,
    old_logprobs: Array,
    advantages: Array,
    mask: Array,
    *,
    clip_low: float,
    clip_high: float,
    aggregate: Aggregate = masked_mean,
) -> Array:
    """Drop every token whose ratio leaves a range, on both sides and for any advantage (DIS, SAO).

        f(ρ) = ρ  if 1 - clip_low < ρ < 1 + clip_high,  else 0
        L    = -E[ sg(f(ρ)) A log π(a|s) ]

    Direct double-sided importance sampling needs no log-probs of an old policy other than the
    sampler's.

    Args:
      logprobs: `[B, R]` float32, log π(a|s), in nats. The gradient flows through them.
      old_logprobs: `[B, R]` float32, in nats, of the sampler.
      advantages: `[B, R]` float32.
      mask: `[B, R]` bool, true for the tokens that count.
      clip_low: tokens with a ratio of `1 - clip_low` or less are dropped; not negative.
      clip_high: tokens with a ratio of `1 + clip_high` or more are dropped; not negative.
      aggregate: reduces the terms to one number. Dropped tokens count in its denominator.

    Returns:
      `[]` float32. Its value depends on log π and says little; its gradient matters.

    Raises:
      AssertionError: if the shapes differ, or a mask is not bool.
      ValueError: if a bound is negative.

    Source:
      Single-rollout asynchronous optimization, 2026 (https://arxiv.org/abs/2607.07508), eq. 3.
      Checked against `rollout_is_policy_loss` of SkyRL.

    Example:
      >>> x, mask = jnp.log(jnp.array([[0.2, 0.8]])), jnp.ones((1, 2), bool)
      >>> old_logprobs = jnp.log(jnp.full((1, 2), 0.2))
      >>> loss = lambda x: dis_loss(
      ...     x, old_logprobs, jnp.ones((1, 2)), mask, clip_low=0.5, clip_high=0.5)
      >>> jax.grad(loss)(x)
      Array([[-0.5, -0. ]], dtype=float32)
    """
    check_not_negative(clip_low=clip_low, clip_high=clip_high)
    ratio = policy_ratio(logprobs, old_logprobs, mask)
    logprobs, advantages = hide_masked(mask, logprobs, advantages)
    weights = jnp.where((ratio > 1 - clip_low) & (ratio < 1 + clip_high), ratio, 0)
    return -aggregate(_weighted_logprobs(weights, logprobs, advantages), mask)


def dis_clip(
    logprobs: Array, old_logprobs: Array, mask: Array, *, clip_low: float, clip_high: float
) -> Clip:
    """Say which tokens `dis_loss` drops: all outside the range, for any advantage.

    Args:
      logprobs: `[B, R]` float32, see `dis_loss`.
      old_logprobs: `[B, R]` float32, see `dis_loss`.
      mask: `[B, R]` bool, true for the tokens that count.
      clip_low: see `dis_loss`.
      clip_high: see `dis_loss`.

    Returns:
      The tokens that the range concerns.

    Raises:
      AssertionError: if the shapes differ, or the mask is not bool.

    Example:
      >>> x, mask = jnp.zeros((1, 2)), jnp.ones((1, 2), bool)
      >>> dis_clip(x.at[0, 0].set(1.0), x, mask, clip_low=0.5, clip_high=0.5).negative
      Array([[ True, False]], dtype=bool)
    """
    ratio = policy_ratio(logprobs, old_logprobs, mask)
    low, high = ratio <= 1 - clip_low, ratio >= 1 + clip_high
    return Clip(low, high, low | high, low | high)


def sapo_loss(
    logprobs: Array,
    old_logprobs: Array,
    advantages: Array,
    mask: Array,
    *,
    tau_positive: float = 1.0,
    tau_negative: float = 1.05,
    aggregate: Aggregate = masked_mean,
) -> Array:
    """Replace the clip by a smooth gate around a ratio of 1 (SAPO).

        L = -E[ (4/τ) σ(τ (ρ - 1)) A ],  τ = tau_positive if A > 0, else tau_negative

    At a ratio of 1 its gradient is that of PPO. It decays as the ratio leaves 1, and faster for
    a larger τ.

    Args:
      logprobs: `[B, R]` float32, log π(a|s), in nats. The gradient flows through them.
      old_logprobs: `[B, R]` float32, log π_old(a|s) of the policy that sampled the tokens, in nats.
      advantages: `[B, R]` float32.
      mask: `[B, R]` bool, true for the tokens that count.
      tau_positive: τ of tokens with a positive advantage; positive.
      tau_negative: τ of the other tokens; positive.
      aggregate: reduces the terms to one number. The paper uses `sequence_mean`.

    Returns:
      `[]` float32.

    Raises:
      AssertionError: if the shapes differ, or a mask is not bool.
      ValueError: if a τ is not positive.

    Source:
      Soft adaptive policy optimization 2025 (https://arxiv.org/abs/2511.20347). Checked against
      verl and AReaL.

    Example:
      >>> x, mask = jnp.zeros((1, 1)), jnp.ones((1, 1), bool)
      >>> sapo_loss(x, x, x + 1, mask)
      Array(-2., dtype=float32)
    """
    check_positive(tau_positive=tau_positive, tau_negative=tau_negative)
    ratio = policy_ratio(logprobs, old_logprobs, mask)
    (advantages,) = hide_masked(mask, advantages)
    tau = jnp.where(advantages > 0, tau_positive, tau_negative).astype(ratio.dtype)
    return -aggregate(jax.nn.sigmoid(tau * (ratio - 1)) * (4 / tau) * advantages, mask)
