"""Weights that make up for a sampler whose probabilities differ from those of the trainer.

The engine that samples may round differently, or hold older parameters, so that its log-probs of
the same tokens differ from those of π_old, which the loss computes. The weight π_old / π_sampler of
a token or of a whole response corrects for it. Multiply the advantages by the weights, before or
after whitening, or take a mask of them as the mask of the loss. All results are constants.
"""

import enum

import jax
import jax.numpy as jnp
from jax import Array

from ppo_jax.ops.kl import MAX_LOG_RATIO
from ppo_jax.ops.options import check_range, choose
from ppo_jax.ops.ratios import hide_masked


class Level(enum.Enum):
    """What an importance weight is computed for.

    Attributes:
      TOKEN: each token, from its own ratio.
      SEQUENCE: the response, as the product of the ratios of its tokens.
      GEOMETRIC: the response, as the geometric mean of the ratios of its tokens.

    Example:
      >>> Level("geometric")
      <Level.GEOMETRIC: 'geometric'>
    """

    TOKEN = "token"
    SEQUENCE = "sequence"
    GEOMETRIC = "geometric"


def importance_weights(
    logprobs: Array, sampler_logprobs: Array, mask: Array, *, level: Level | str = Level.TOKEN
) -> Array:
    """Compute the weights of tokens that another policy has sampled.

        w_t = π(a_t|s_t) / π_sampler(a_t|s_t)              per token
        w   = Π_t w_t  or  (Π_t w_t)^(1/|y|)               per response

    Args:
      logprobs: `[B, R]` float32, of the trainer before the update, in nats.
      sampler_logprobs: `[B, R]` float32, of the sampler, in nats.
      mask: `[B, R]` bool, true for real tokens.
      level: what a weight is computed for, or its name.

    Returns:
      `[B, R]` float32, the same for all tokens of a response unless `level` is `TOKEN`; 0 outside
      the mask. Logarithms are clipped to ±20.

    Raises:
      AssertionError: if the shapes differ, or a mask is not bool.
      ValueError: if there is no such level.

    Source:
      Precup et al. 2000, "Eligibility Traces for Off-Policy Policy Evaluation". Checked against
      verl, SkyRL and OpenRLHF.

    Example:
      >>> logprobs, mask = jnp.log(jnp.array([[0.5, 0.9]])), jnp.ones((1, 2), bool)
      >>> sampler_logprobs = jnp.log(jnp.array([[0.25, 0.3]]))
      >>> importance_weights(logprobs, sampler_logprobs, mask, level=Level.SEQUENCE).round(4)
      Array([[6., 6.]], dtype=float32)
    """
    level = choose(Level, level, "level")
    logprobs, sampler_logprobs = hide_masked(mask, logprobs, sampler_logprobs)
    log_weights = jax.lax.stop_gradient(logprobs - sampler_logprobs)
    if level is not Level.TOKEN:
        log_weights = log_weights.sum(axis=1, keepdims=True)
    if level is Level.GEOMETRIC:
        log_weights = log_weights / jnp.maximum(mask.sum(axis=1, keepdims=True), 1)
    weights = jnp.exp(jnp.clip(log_weights, -MAX_LOG_RATIO, MAX_LOG_RATIO))
    return jnp.where(mask, jnp.broadcast_to(weights, mask.shape), 0)


def truncated_weights(
    logprobs: Array,
    sampler_logprobs: Array,
    mask: Array,
    *,
    high: float,
    low: float = 0.0,
    level: Level | str = Level.TOKEN,
) -> Array:
    """Truncate the importance weights (truncated importance sampling, TIS).

        clip(w, low, high)

    Args:
      logprobs: `[B, R]` float32, of the trainer before the update, in nats.
      sampler_logprobs: `[B, R]` float32, of the sampler, in nats.
      mask: `[B, R]` bool, true for real tokens.
      high: the largest weight, such as 2.
      low: the smallest weight of a real token.
      level: what a weight is computed for, or its name.

    Returns:
      `[B, R]` float32; 0 outside the mask.

    Raises:
      AssertionError: if the shapes differ, or a mask is not bool.
      ValueError: unless 0 ≤ low ≤ high, or if there is no such level.

    Source:
      Ionides 2008, "Truncated Importance Sampling"; `rollout_is` of verl, against which it was
      checked, as against SkyRL.

    Example:
      >>> logprobs, mask = jnp.log(jnp.array([[0.5, 0.9]])), jnp.ones((1, 2), bool)
      >>> truncated_weights(logprobs, jnp.log(jnp.array([[0.25, 0.3]])), mask, high=2.5)
      Array([[2. , 2.5]], dtype=float32)
    """
    check_range(low, high)
    weights = importance_weights(logprobs, sampler_logprobs, mask, level=level)
    return jnp.where(mask, jnp.clip(weights, low, high), 0)


def importance_mask(
    logprobs: Array,
    sampler_logprobs: Array,
    mask: Array,
    *,
    low: float,
    high: float,
    level: Level | str = Level.GEOMETRIC,
    whole: bool = False,
) -> Array:
    """Keep the tokens or responses whose importance weight lies in a range.

        mask_t and low ≤ w ≤ high

    Args:
      logprobs: `[B, R]` float32, of the trainer before the update, in nats.
      sampler_logprobs: `[B, R]` float32, of the sampler, in nats.
      mask: `[B, R]` bool, true for real tokens.
      low: the smallest weight that is kept.
      high: the largest weight that is kept.
      level: what a weight is computed for, or its name.
      whole: drop a response if any of its tokens is dropped.

    Returns:
      `[B, R]` bool, a part of `mask`.

    Raises:
      AssertionError: if the shapes differ, or a mask is not bool.
      ValueError: unless 0 ≤ low ≤ high, or if there is no such level.

    Source:
      Masks of tokens, of responses and of responses with an outlier in `compute_token_mask`,
      `compute_sequence_mask` and `compute_outlier_token_mask` of SkyRL, against which it was
      checked.

    Example:
      >>> logprobs, mask = jnp.log(jnp.array([[0.5, 0.9]])), jnp.ones((1, 2), bool)
      >>> sampler_logprobs = jnp.log(jnp.array([[0.5, 0.3]]))
      >>> importance_mask(
      ...     logprobs, sampler_logprobs, mask, low=0.5, high=2.0, level=Level.TOKEN)
      Array([[ True, False]], dtype=bool)
    """
    check_range(low, high)
    weights = importance_weights(logprobs, sampler_logprobs, mask, level=level)
    inside = (low <= weights) & (weights <= high)
    if whole:
        inside = (inside | ~mask).all(axis=1, keepdims=True)
    return mask & inside


def bounded_weights(
    logprobs: Array,
    sampler_logprobs: Array,
    mask: Array,
    *,
    low: float,
    high: float,
    level: Level | str = Level.TOKEN,
) -> Array:
    """Set the importance weights outside a range to 0 (IcePop).

        w if low ≤ w ≤ high, else 0

    Args:
      logprobs: `[B, R]` float32, of the trainer before the update, in nats.
      sampler_logprobs: `[B, R]` float32, of the sampler, in nats.
      mask: `[B, R]` bool, true for real tokens.
      low: the smallest weight that is kept, such as 0.5.
      high: the largest weight that is kept, such as 5.
      level: what a weight is computed for, or its name.

    Returns:
      `[B, R]` float32; 0 outside the mask.

    Raises:
      AssertionError: if the shapes differ, or a mask is not bool.
      ValueError: unless 0 ≤ low ≤ high, or if there is no such level.

    Source:
      IcePop in verl (`rollout_is_threshold="0.5_5"`), against which it was checked.

    Example:
      >>> logprobs, mask = jnp.log(jnp.array([[0.5, 0.9]])), jnp.ones((1, 2), bool)
      >>> bounded_weights(logprobs, jnp.log(jnp.array([[0.25, 0.3]])), mask, low=0.5, high=2.5)
      Array([[2., 0.]], dtype=float32)
    """
    check_range(low, high)
    weights = importance_weights(logprobs, sampler_logprobs, mask, level=level)
    return jnp.where((low <= weights) & (weights <= high), weights, 0)


def sequence_masked_weights(
    logprobs: Array, sampler_logprobs: Array, mask: Array, *, low: float, high: float
) -> Array:
    """Keep the weights of tokens, but only in responses whose mean weight lies in a range.

        w_t if low ≤ (Π_t w_t)^(1/|y|) ≤ high, else 0

    Args:
      logprobs: `[B, R]` float32, of the trainer before the update, in nats.
      sampler_logprobs: `[B, R]` float32, of the sampler, in nats.
      mask: `[B, R]` bool, true for real tokens.
      low: the smallest geometric mean of a response that is kept.
      high: the largest geometric mean of a response that is kept.

    Returns:
      `[B, R]` float32; 0 outside the mask.

    Raises:
      AssertionError: if the shapes differ, or a mask is not bool.
      ValueError: unless 0 ≤ low ≤ high.

    Source:
      The correction `seq-mask-tis` of OpenRLHF, against which it was checked.

    Example:
      >>> logprobs, mask = jnp.log(jnp.array([[0.5, 0.9]])), jnp.ones((1, 2), bool)
      >>> sampler_logprobs = jnp.log(jnp.array([[0.25, 0.3]]))
      >>> sequence_masked_weights(logprobs, sampler_logprobs, mask, low=0.5, high=2.5).round(4)
      Array([[2., 3.]], dtype=float32)
    """
    weights = importance_weights(logprobs, sampler_logprobs, mask)
    kept = importance_mask(logprobs, sampler_logprobs, mask, low=low, high=high)
    return jnp.where(kept, weights, 0)
