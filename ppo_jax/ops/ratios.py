"""The importance ratio between two policies, per token."""

import jax.numpy as jnp
from jax import Array

from ppo_jax.ops.kl import MAX_LOG_RATIO
from ppo_jax.ops.masked import check_mask, widen


def policy_ratio(logprobs: Array, old_logprobs: Array, mask: Array) -> Array:
    """Compute the importance ratio of each token.

        ρ_t = π(a_t|s_t) / π_old(a_t|s_t)

    The log-ratio is clipped to ±20, far beyond the clip range of any loss, so that a single token
    can neither overflow nor outweigh all others. Its gradient is 0 beyond.

    Args:
      logprobs: `[B, R]` float32, log π of the policy that trains, in nats.
      old_logprobs: `[B, R]` float32, log π_old of the policy that sampled the tokens, in nats.
      mask: `[B, R]` bool, true for real tokens.

    Returns:
      `[B, R]` float32; 1 outside the mask.

    Raises:
      AssertionError: if the shapes differ, or a mask is not bool.

    Source:
      Schulman et al. 2017 (https://arxiv.org/abs/1707.06347), section 3.

    Example:
      >>> logprobs, old_logprobs = jnp.array([[-1.0, jnp.nan]]), jnp.array([[-1.0, 0.0]])
      >>> policy_ratio(logprobs, old_logprobs, jnp.array([[True, False]]))
      Array([[1., 1.]], dtype=float32)
    """
    return jnp.exp(log_ratio(logprobs, old_logprobs, mask))


def log_ratio(logprobs: Array, old_logprobs: Array, mask: Array) -> Array:
    """Compute the logarithm of `policy_ratio`, in nats; the arguments are the same."""
    check_mask(mask, logprobs, old_logprobs)
    difference = widen(logprobs) - widen(old_logprobs)
    return jnp.clip(jnp.where(mask, difference, 0), -MAX_LOG_RATIO, MAX_LOG_RATIO)


def hide_masked(mask: Array, *arrays: Array) -> tuple[Array, ...]:
    """Widen arrays and set their masked entries to 0, which keeps a NaN out of the gradient."""
    check_mask(mask, *arrays)
    return tuple(widen(jnp.where(mask, x, 0)) for x in arrays)
