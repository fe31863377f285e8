"""Which tokens of a batch to treat differently, from how they rank among all its tokens.

The ranks are taken over the rows given and, with `axis_name`, over those of all shards. They depend
on how a minibatch is split into micro-batches, unless the function is called on the whole of it
before.
"""

import jax
import jax.numpy as jnp
from jax import Array

from ppo_jax.ops.axes import share
from ppo_jax.ops.masked import masked_count, masked_mean
from ppo_jax.ops.options import check_not_negative, check_unit
from ppo_jax.ops.ratios import hide_masked, log_ratio
from ppo_jax.types import Aggregate, AxisName


def _gather(x: Array, axis_name: AxisName | None) -> Array:
    """Flatten an array and join those of all shards."""
    return x.ravel() if axis_name is None else jax.lax.all_gather(x.ravel(), axis_name, tiled=True)


def _own(x: Array, shape: tuple[int, ...], axis_name: AxisName | None) -> Array:
    """Cut the part of this shard out of what `_gather` has joined."""
    if axis_name is not None:
        x = x.reshape(jax.lax.axis_size(axis_name), -1)[jax.lax.axis_index(axis_name)]
    return x.reshape(shape)


def _ranks(x: Array) -> Array:
    """Number the entries of a flat array from the least, 0, to the largest."""
    return jnp.argsort(jnp.argsort(x))


def m2po_mask(
    logprobs: Array,
    old_logprobs: Array,
    mask: Array,
    *,
    threshold: float = 0.04,
    axis_name: AxisName | None = None,
) -> Array:
    """Drop the tokens with the largest log-ratios until their mean square is small (M2PO).

        M₂ = mean over the kept tokens of log(π(a|s) / π_old(a|s))² < threshold

    As few tokens as possible are dropped, those with the largest squares first.

    Args:
      logprobs: `[B, R]` float32, of the policy at the start of the update, in nats.
      old_logprobs: `[B, R]` float32, of the policy that sampled the tokens, in nats.
      mask: `[B, R]` bool, true for real tokens.
      threshold: the bound of M₂, in nats²; not negative.
      axis_name: the mapped axis over which the rows are split.

    Returns:
      `[B, R]` bool, a part of `mask`; a single token if M₂ is never below the threshold.

    Raises:
      AssertionError: if the shapes differ, or a mask is not bool.
      ValueError: if `threshold` is negative.

    Source:
      Zheng et al. 2025 (https://arxiv.org/abs/2510.01161). Checked against AReaL.

    Example:
      >>> x, mask = jnp.zeros((1, 3)), jnp.ones((1, 3), bool)
      >>> m2po_mask(jnp.array([[0.1, 0.5, -0.2]]), x, mask)
      Array([[ True, False,  True]], dtype=bool)
    """
    check_not_negative(threshold=threshold)
    new, old = hide_masked(mask, logprobs, old_logprobs)
    square = _gather(jnp.where(mask, (new - old) ** 2, jnp.inf), axis_name)
    ordered = jnp.sort(square)
    number = jnp.arange(1, ordered.size + 1)
    # The mean of the smallest squares grows with their number, and is infinite beyond the mask.
    kept = jnp.sum(jnp.cumsum(ordered) / number < threshold)
    ranks = _own(_ranks(square), mask.shape, axis_name)
    return mask & (ranks < jnp.maximum(kept, 1))


def covariances(
    logprobs: Array, advantages: Array, mask: Array, *, axis_name: AxisName | None = None
) -> Array:
    """Compute the contribution of each token to the covariance of log-prob and advantage.

        cov_t = (A_t - mean(A)) (log π_t - mean(log π))

    A policy gradient step lowers the entropy where this is large.

    Args:
      logprobs: `[B, R]` float32, of the policy that trains, in nats.
      advantages: `[B, R]` float32.
      mask: `[B, R]` bool, true for real tokens.
      axis_name: the mapped axis over which the means are taken as well.

    Returns:
      `[B, R]` float32, a constant; -inf outside the mask.

    Raises:
      AssertionError: if the shapes differ, or a mask is not bool.

    Source:
      Cui et al. 2025 (https://arxiv.org/abs/2505.22617). Checked against verl.

    Example:
      >>> mask = jnp.ones((1, 2), bool)
      >>> covariances(jnp.array([[-1.0, -3.0]]), jnp.array([[1.0, 0.0]]), mask)
      Array([[0.5, 0.5]], dtype=float32)
    """
    arrays = jax.lax.stop_gradient(hide_masked(mask, logprobs, advantages))
    centred = [x - share(masked_mean(x, mask, axis_name=axis_name), axis_name) for x in arrays]
    return jnp.where(mask, centred[0] * centred[1], -jnp.inf)


def clip_cov_mask(
    key: Array,
    logprobs: Array,
    old_logprobs: Array,
    advantages: Array,
    mask: Array,
    *,
    clip_low: float,
    clip_high: float,
    part: float = 2e-4,
    least: float = 1.0,
    most: float = 5.0,
    axis_name: AxisName | None = None,
) -> Array:
    """Choose tokens whose gradient to keep, dropping some with a large covariance (Clip-Cov).

        dropped = max(1, ⌊part · tokens⌋) random tokens with  least < cov < most

    Tokens that PPO clips are never chosen. To drop tokens but leave them in the denominator of the
    loss, multiply the advantages by the result.

    Args:
      key: `[]` typed key, consumed.
      logprobs: `[B, R]` float32, of the policy that trains, in nats.
      old_logprobs: `[B, R]` float32, of the policy that sampled the tokens, in nats.
      advantages: `[B, R]` float32.
      mask: `[B, R]` bool, true for real tokens.
      clip_low: see `clipped_policy_loss`.
      clip_high: see `clipped_policy_loss`.
      part: the share of the tokens that is dropped, in 0 .. 1.
      least: a token is only dropped if its covariance is above this.
      most: a token is only dropped if its covariance is below this.
      axis_name: the mapped axis over which the rows are split; `key` is the same on all shards.

    Returns:
      `[B, R]` bool, true for tokens of `mask` that are kept.

    Raises:
      AssertionError: if the shapes differ, or a mask is not bool.
      ValueError: if a bound or `part` is out of its range.

    Source:
      Cui et al. 2025 (https://arxiv.org/abs/2505.22617), Clip-Cov. Checked against verl where all
      candidates are dropped.

    Example:
      >>> x, mask = jnp.array([[0.0, -4.0, -2.0]]), jnp.ones((1, 3), bool)
      >>> clip_cov_mask(jax.random.key(0), x, x, x, mask, clip_low=0.2, clip_high=0.2, part=1.0)
      Array([[False, False,  True]], dtype=bool)
    """
    check_unit(clip_low=clip_low, part=part)
    check_not_negative(clip_high=clip_high)
    covariance = covariances(logprobs, advantages, mask, axis_name=axis_name)
    ratio = jnp.exp(log_ratio(logprobs, old_logprobs, mask))
    clipped = ((ratio > 1 + clip_high) & (advantages > 0)) | (
        (ratio < 1 - clip_low) & (advantages < 0)
    )
    candidates = mask & ~clipped & (covariance > least) & (covariance < most)
    everywhere = _gather(candidates, axis_name)
    order = jnp.where(everywhere, jax.random.uniform(key, everywhere.shape), jnp.inf)
    count = jnp.maximum(jnp.floor(part * masked_count(mask, axis_name=axis_name)), 1)
    ranks = _own(_ranks(order), mask.shape, axis_name)
    return mask & ~(candidates & (ranks < count))


def kl_cov_loss(
    logprobs: Array,
    old_logprobs: Array,
    advantages: Array,
    mask: Array,
    *,
    part: float = 2e-4,
    coef: float = 1.0,
    axis_name: AxisName | None = None,
    aggregate: Aggregate = masked_mean,
) -> Array:
    """Hold the tokens with the largest covariance of log-prob and advantage in place (KL-Cov).

        L = -E[ ρ A - coef · 1[cov is among the largest max(1, ⌊part · tokens⌋)] · |log ρ| ]

    Args:
      logprobs: `[B, R]` float32, log π(a|s), in nats. The gradient flows through them.
      old_logprobs: `[B, R]` float32, log π_old(a|s) of the policy that sampled the tokens, in nats.
      advantages: `[B, R]` float32.
      mask: `[B, R]` bool, true for the tokens that count.
      part: the share of the tokens that is held, in 0 .. 1.
      coef: the weight of the penalty; not negative.
      axis_name: the mapped axis over which the covariances are ranked as well.
      aggregate: reduces the terms to one number.

    Returns:
      `[]` float32.

    Raises:
      AssertionError: if the shapes differ, or a mask is not bool.
      ValueError: if `part` is not in 0 .. 1, or `coef` is negative.

    Source:
      Cui et al. 2025 (https://arxiv.org/abs/2505.22617), KL-Cov. Checked against verl.

    Example:
      >>> x, mask = jnp.array([[-1.0, -3.0]]), jnp.ones((1, 2), bool)
      >>> kl_cov_loss(x, x - 0.5, jnp.zeros((1, 2)), mask, part=0.5)
      Array(0.25, dtype=float32)
    """
    check_unit(part=part)
    check_not_negative(coef=coef)
    covariance = _gather(covariances(logprobs, advantages, mask, axis_name=axis_name), axis_name)
    count = jnp.maximum(jnp.floor(part * masked_count(mask, axis_name=axis_name)), 1)
    held = _own(_ranks(-covariance), mask.shape, axis_name) < count
    change = log_ratio(logprobs, old_logprobs, mask)
    (advantages,) = hide_masked(mask, advantages)
    terms = jnp.exp(change) * advantages - coef * jnp.where(held & mask, jnp.abs(change), 0)
    return -aggregate(terms, mask)
