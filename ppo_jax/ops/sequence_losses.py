"""Losses of the policy that read one importance ratio per response.

All terms of a response are equal up to the advantage, so `sequence_mean` is the default that
reduces them. As in `ops.policy_losses`, weights of `ops.importance` multiply the advantages.
"""

import jax
import jax.numpy as jnp
from jax import Array

from ppo_jax.ops.clips import Clip
from ppo_jax.ops.kl import MAX_LOG_RATIO
from ppo_jax.ops.masked import masked_mean, sequence_mean
from ppo_jax.ops.options import check_not_negative, check_positive, check_unit
from ppo_jax.ops.ratios import hide_masked, log_ratio
from ppo_jax.types import Aggregate


def _row_mean(x: Array, mask: Array) -> Array:
    """Average over the real tokens of each row, `[B, 1]`; 0 for a row without one."""
    return jnp.where(mask, x, 0).sum(axis=1, keepdims=True) / jnp.maximum(
        mask.sum(axis=1, keepdims=True), 1
    )


def gspo_loss(
    logprobs: Array,
    old_logprobs: Array,
    advantages: Array,
    mask: Array,
    *,
    clip_low: float = 3e-4,
    clip_high: float = 4e-4,
    aggregate: Aggregate = sequence_mean,
) -> Array:
    """Clip the geometric mean of the ratios of a response instead of each ratio (GSPO).

        s = exp( 1/|y| Σ_t log(π(a_t|s_t) / π_old(a_t|s_t)) )
        L = -E[ min(s A, clip(s, 1 - clip_low, 1 + clip_high) A) ]

    This is the form for advantages per token: token `t` has the term s A_t and its gradient is
    s A_t ∇ log π(a_t|s_t). Where all tokens of a response have one advantage, the mean over the
    response is the loss of the response.

    Args:
      logprobs: `[B, R]` float32, log π(a|s), in nats. The gradient flows through them.
      old_logprobs: `[B, R]` float32, log π_old(a|s) of the policy that sampled the tokens, in nats.
      advantages: `[B, R]` float32.
      mask: `[B, R]` bool, true for the tokens that count.
      clip_low: `s` is clipped from below at `1 - clip_low`. The range is much narrower than that of
        PPO, because `s` is a mean. It is in 0 .. 1.
      clip_high: `s` is clipped from above at `1 + clip_high`; not negative.
      aggregate: reduces the terms to one number.

    Returns:
      `[]` float32.

    Raises:
      AssertionError: if the shapes differ, or a mask is not bool.
      ValueError: if a bound is out of its range.

    Source:
      Group sequence policy optimization, 2025 (https://arxiv.org/abs/2507.18071), eq. 14-15.
      Checked against verl, which clips log s at 10, not 20.

    Example:
      >>> x, mask = jnp.zeros((1, 2)), jnp.ones((1, 2), bool)
      >>> logprobs = jnp.log(jnp.array([[2.0, 0.5]]))  # The geometric mean of the ratios is 1.
      >>> jax.grad(gspo_loss)(logprobs, x, jnp.ones((1, 2)), mask)
      Array([[-0.5, -0.5]], dtype=float32)
    """
    check_unit(clip_low=clip_low)
    check_not_negative(clip_high=clip_high)
    logprobs, old, advantages = hide_masked(mask, logprobs, old_logprobs, advantages)
    mean = jax.lax.stop_gradient(_row_mean(logprobs - old, mask))
    # The value is that of the response, and the gradient that of the token.
    log_s = mean + (logprobs - jax.lax.stop_gradient(logprobs))
    ratio = jnp.exp(jnp.clip(log_s, -MAX_LOG_RATIO, MAX_LOG_RATIO))
    clipped = jnp.clip(ratio, 1 - clip_low, 1 + clip_high)
    return -aggregate(jnp.minimum(ratio * advantages, clipped * advantages), mask)


def gspo_clip(
    logprobs: Array,
    old_logprobs: Array,
    mask: Array,
    *,
    clip_low: float = 3e-4,
    clip_high: float = 4e-4,
) -> Clip:
    """Say which tokens `gspo_loss` drops: those of responses whose mean ratio is out of range.

    Args:
      logprobs: `[B, R]` float32, see `gspo_loss`.
      old_logprobs: `[B, R]` float32, see `gspo_loss`.
      mask: `[B, R]` bool, true for the tokens that count.
      clip_low: see `gspo_loss`.
      clip_high: see `gspo_loss`.

    Returns:
      The tokens that the clip concerns, all or none of a response for an advantage of one sign.

    Raises:
      AssertionError: if the shapes differ, or the mask is not bool.

    Example:
      >>> x, mask = jnp.zeros((1, 2)), jnp.ones((1, 2), bool)
      >>> gspo_clip(x.at[0, 0].set(1.0), x, mask).high
      Array([[ True,  True]], dtype=bool)
    """
    logprobs, old = hide_masked(mask, logprobs, old_logprobs)
    log_s = jnp.broadcast_to(_row_mean(logprobs - old, mask), mask.shape)
    ratio = jnp.exp(jnp.clip(log_s, -MAX_LOG_RATIO, MAX_LOG_RATIO))
    low, high = ratio < 1 - clip_low, ratio > 1 + clip_high
    return Clip(low, high, high, low)


def gmpo_loss(
    logprobs: Array,
    old_logprobs: Array,
    advantages: Array,
    mask: Array,
    *,
    clip_low: float = 0.4,
    clip_high: float = 0.4,
    aggregate: Aggregate = sequence_mean,
) -> Array:
    """Weigh a response by the geometric mean of its clipped ratios (GMPO).

        ℓ_t = min(log ρ_t, clip_high) if A_t > 0,  max(log ρ_t, -clip_low) if A_t < 0
        L   = -E[ exp(1/|y| Σ_t ℓ_t) · 1/|y| Σ_t A_t ]

    Args:
      logprobs: `[B, R]` float32, log π(a|s), in nats. The gradient flows through them.
      old_logprobs: `[B, R]` float32, log π_old(a|s) of the policy that sampled the tokens, in nats.
      advantages: `[B, R]` float32, of one sign within a response, as those of a group are.
      mask: `[B, R]` bool, true for the tokens that count.
      clip_low: the bound of a log-ratio with a negative advantage, in nats; at least 0.
      clip_high: the bound of a log-ratio with a positive advantage, in nats; at least 0.
      aggregate: reduces the terms, which are equal within a response, to one number.

    Returns:
      `[]` float32.

    Raises:
      AssertionError: if the shapes differ, or a mask is not bool.
      ValueError: if a bound is negative.

    Source:
      Geometric-mean policy optimization, 2025 (https://arxiv.org/abs/2507.20673). Checked against
      verl.

    Example:
      >>> x, mask = jnp.zeros((1, 2)), jnp.ones((1, 2), bool)
      >>> gmpo_loss(jnp.array([[1.0, -0.4]]), x, jnp.ones((1, 2)), mask)
      Array(-1., dtype=float32)
    """
    check_not_negative(clip_low=clip_low, clip_high=clip_high)
    logprobs, old, advantages = hide_masked(mask, logprobs, old_logprobs, advantages)
    change, sign = logprobs - old, jnp.sign(advantages)
    clipped = jnp.clip(change, -clip_low, clip_high)
    one_sided = sign * jnp.minimum(sign * change, sign * clipped)
    mean = jnp.clip(_row_mean(one_sided, mask), -MAX_LOG_RATIO, MAX_LOG_RATIO)
    terms = jnp.exp(mean) * _row_mean(advantages, mask)
    return -aggregate(jnp.broadcast_to(terms, mask.shape), mask)


def gmpo_clip(
    logprobs: Array,
    old_logprobs: Array,
    mask: Array,
    *,
    clip_low: float = 0.4,
    clip_high: float = 0.4,
) -> Clip:
    """Say which tokens `gmpo_loss` drops: those whose log-ratio is out of range.

    Args:
      logprobs: `[B, R]` float32, see `gmpo_loss`.
      old_logprobs: `[B, R]` float32, see `gmpo_loss`.
      mask: `[B, R]` bool, true for the tokens that count.
      clip_low: see `gmpo_loss`.
      clip_high: see `gmpo_loss`.

    Returns:
      The tokens that the clip concerns.

    Raises:
      AssertionError: if the shapes differ, or the mask is not bool.

    Example:
      >>> x, mask = jnp.zeros((1, 2)), jnp.ones((1, 2), bool)
      >>> gmpo_clip(x.at[0, 0].set(1.0), x, mask).high
      Array([[ True, False]], dtype=bool)
    """
    logprobs, old = hide_masked(mask, logprobs, old_logprobs)
    low, high = logprobs - old < -clip_low, logprobs - old > clip_high
    return Clip(low, high, high, low)


def vespo_loss(
    logprobs: Array,
    old_logprobs: Array,
    advantages: Array,
    mask: Array,
    *,
    k_positive: float = 2.0,
    lambda_positive: float = 3.0,
    k_negative: float = 3.0,
    lambda_negative: float = 2.0,
    aggregate: Aggregate = masked_mean,
) -> Array:
    """Weigh a response by a smooth function of the product of its ratios (VESPO).

        w = Π_t ρ_t
        φ = exp(λ + k log w - λ w)
        L = -E[ sg(φ) A log π(a|s) ]

    φ is 1 at w = 1 and goes to 0 for both small and large w.

    Args:
      logprobs: `[B, R]` float32, log π(a|s), in nats. The gradient flows through them.
      old_logprobs: `[B, R]` float32, log π_old(a|s) of the policy that sampled the tokens, in nats.
      advantages: `[B, R]` float32.
      mask: `[B, R]` bool, true for the tokens that count.
      k_positive: k of tokens whose advantage is not negative.
      lambda_positive: λ of tokens whose advantage is not negative; positive.
      k_negative: k of tokens with a negative advantage.
      lambda_negative: λ of tokens with a negative advantage; positive.
      aggregate: reduces the terms to one number.

    Returns:
      `[]` float32. Its value depends on log π and says little; its gradient matters.

    Raises:
      AssertionError: if the shapes differ, or a mask is not bool.
      ValueError: if a λ is not positive.

    Source:
      VESPO 2026 (https://arxiv.org/abs/2602.10693), section 3.4; the defaults are those of TRL.
      Checked against TRL, whose bounds of log ρ (±20) and log w (log 1e-8 to 20) are kept.

    Example:
      >>> x, mask = jnp.zeros((1, 1)), jnp.ones((1, 1), bool)
      >>> jax.grad(vespo_loss)(x, x, x + 1, mask)
      Array([[-1.]], dtype=float32)
    """
    check_positive(lambda_positive=lambda_positive, lambda_negative=lambda_negative)
    change = log_ratio(logprobs, old_logprobs, mask).sum(axis=1, keepdims=True)
    log_w = jnp.clip(change, jnp.log(1e-8), MAX_LOG_RATIO)
    logprobs, advantages = hide_masked(mask, logprobs, advantages)
    k = jnp.where(advantages >= 0, k_positive, k_negative).astype(log_w.dtype)
    decay = jnp.where(advantages >= 0, lambda_positive, lambda_negative).astype(log_w.dtype)
    weights = jnp.exp(decay + k * log_w - decay * jnp.exp(log_w))
    return -aggregate(jax.lax.stop_gradient(weights) * advantages * logprobs, mask)
