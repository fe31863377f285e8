"""Divergence PPO: a trust region of probabilities instead of ratios."""

from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp
from jax import Array

from ppo_jax.ops.clips import Clip
from ppo_jax.ops.masked import masked_mean, widen
from ppo_jax.ops.options import check_not_negative, check_positive
from ppo_jax.ops.ratios import hide_masked, policy_ratio
from ppo_jax.types import Aggregate

Divergence = Callable[[Array, Array], Array]
"""Measures how far the probability of the sampled token has moved, `[B, R]` float32, at least 0,
from the log-probs `[B, R]` of the policy that trains and of the one that sampled."""


def binary_tv(logprobs: Array, old_logprobs: Array) -> Array:
    """Compute the total variation of the choice between the sampled token and all others.

        TV = |π(a|s) - π_old(a|s)|

    Args:
      logprobs: `[B, R]` float32, log π(a|s), in nats.
      old_logprobs: `[B, R]` float32, log π_old(a|s), in nats.

    Returns:
      `[B, R]` float32, from 0 to 1.

    Raises:
      AssertionError: if the shapes differ.

    Source:
      DPPO 2026 (https://arxiv.org/abs/2602.04879), eq. 13.

    Example:
      >>> binary_tv(jnp.log(jnp.array([0.5])), jnp.log(jnp.array([0.25])))
      Array([0.25], dtype=float32)
    """
    chex.assert_equal_shape([logprobs, old_logprobs])
    return jnp.abs(jnp.exp(widen(logprobs)) - jnp.exp(widen(old_logprobs)))


def binary_kl(logprobs: Array, old_logprobs: Array) -> Array:
    """Compute the KL divergence of the choice between the sampled token and all others.

        KL = q log(q / p) + (1 - q) log((1 - q) / (1 - p)),  p = π(a|s), q = π_old(a|s)

    Args:
      logprobs: `[B, R]` float32, log π(a|s), in nats.
      old_logprobs: `[B, R]` float32, log π_old(a|s), in nats.

    Returns:
      `[B, R]` float32, in nats. `1 - p` counts as at least 1e-8.

    Raises:
      AssertionError: if the shapes differ.

    Source:
      DPPO 2026 (https://arxiv.org/abs/2602.04879), eq. 14.

    Example:
      >>> binary_kl(jnp.log(jnp.array([0.5])), jnp.log(jnp.array([0.25]))).round(4)
      Array([0.1308], dtype=float32)
    """
    chex.assert_equal_shape([logprobs, old_logprobs])
    logp, logq = widen(logprobs), widen(old_logprobs)
    rest_p, rest_q = (jnp.maximum(-jnp.expm1(x), 1e-8) for x in (logp, logq))
    return jnp.exp(logq) * (logq - logp) - jnp.expm1(logq) * jnp.log(rest_q / rest_p)


def dppo_loss(
    logprobs: Array,
    old_logprobs: Array,
    advantages: Array,
    mask: Array,
    *,
    clip_low: float,
    clip_high: float,
    divergence: Divergence = binary_tv,
    ratio_max: float | None = 20.0,
    aggregate: Aggregate = masked_mean,
) -> Array:
    """Drop the tokens whose probability has moved too far in the direction of the advantage (DPPO).

        M = 0  if A > 0, π > π_old and D > clip_high,  or A < 0, π < π_old and D > clip_low;  else 1
        L = -E[ M min(ρ, ratio_max) A ]

    A ratio says little where the probability is small. The divergence D is that of the choice
    between the sampled token and all others.

    Args:
      logprobs: `[B, R]` float32, log π(a|s), in nats. The gradient flows through them.
      old_logprobs: `[B, R]` float32, log π_old(a|s) of the policy that sampled the tokens, in nats.
      advantages: `[B, R]` float32.
      mask: `[B, R]` bool, true for the tokens that count.
      clip_low: largest divergence of a token with a negative advantage that has become less likely;
        not negative.
      clip_high: largest divergence of a token with a positive advantage that has become more
        likely; not negative.
      divergence: `binary_tv`, `binary_kl` or a function of the same form.
      ratio_max: the largest weight of a token; its gradient goes on above. It is positive; `None`
        sets no bound.
      aggregate: reduces the terms to one number. Dropped tokens count in its denominator.

    Returns:
      `[]` float32.

    Raises:
      AssertionError: if the shapes differ, or a mask is not bool.
      ValueError: if a bound is out of its range.

    Source:
      DPPO 2026 (https://arxiv.org/abs/2602.04879), eq. 13-14. Checked against verl, SkyRL and
      prime-rl.

    Example:
      >>> x, mask = jnp.log(jnp.array([[0.1, 0.6]])), jnp.ones((1, 2), bool)
      >>> old_logprobs = jnp.log(jnp.array([[0.05, 0.3]]))
      >>> loss = lambda x: dppo_loss(
      ...     x, old_logprobs, jnp.ones((1, 2)), mask, clip_low=0.2, clip_high=0.2)
      >>> jax.grad(loss)(x)  # Both ratios are 2.
      Array([[-1.,  0.]], dtype=float32)
    """
    check_not_negative(clip_low=clip_low, clip_high=clip_high)
    check_positive(ratio_max=ratio_max)
    weights = jax.lax.stop_gradient(policy_ratio(logprobs, old_logprobs, mask))
    logprobs, old, advantages = hide_masked(mask, logprobs, old_logprobs, advantages)
    now = jax.lax.stop_gradient(logprobs)
    low, high = _beyond(now, old, clip_low, clip_high, divergence)
    far = jnp.where(advantages > 0, high, low)
    if ratio_max is not None:
        weights = jnp.minimum(weights, ratio_max)
    # exp(x - sg(x)) is 1 and has the gradient of x.
    terms = weights * jnp.exp(logprobs - now) * advantages
    return -aggregate(jnp.where(far, 0, terms), mask)


def _beyond(
    now: Array, old: Array, clip_low: float, clip_high: float, divergence: Divergence
) -> tuple[Array, Array]:
    """Return which tokens have become less likely, and which more likely, than is allowed."""
    distance = divergence(now, old)
    chex.assert_equal_shape([distance, now])
    return (now < old) & (distance > clip_low), (now > old) & (distance > clip_high)


def dppo_clip(
    logprobs: Array,
    old_logprobs: Array,
    mask: Array,
    *,
    clip_low: float,
    clip_high: float,
    divergence: Divergence = binary_tv,
) -> Clip:
    """Say which tokens `dppo_loss` drops, by the divergence and the direction of their change.

    Args:
      logprobs: `[B, R]` float32, see `dppo_loss`.
      old_logprobs: `[B, R]` float32, see `dppo_loss`.
      mask: `[B, R]` bool, true for the tokens that count.
      clip_low: see `dppo_loss`.
      clip_high: see `dppo_loss`.
      divergence: see `dppo_loss`.

    Returns:
      The tokens that have become less likely and more likely than is allowed.

    Raises:
      AssertionError: if the shapes differ, or the mask is not bool.

    Example:
      >>> x, mask = jnp.log(jnp.array([[0.1, 0.6]])), jnp.ones((1, 2), bool)
      >>> old_logprobs = jnp.log(jnp.array([[0.05, 0.3]]))
      >>> dppo_clip(x, old_logprobs, mask, clip_low=0.2, clip_high=0.2).positive
      Array([[False,  True]], dtype=bool)
    """
    now, old = hide_masked(mask, logprobs, old_logprobs)
    low, high = _beyond(now, old, clip_low, clip_high, divergence)
    return Clip(low, high, high, low)
