"""The loss of PPO and its parts: `[B, R]` arrays and a mask in, one number to minimise out.

`aggregate` reduces the per-token terms to one number. `masked_mean` gives each token the same
weight, and `sequence_mean` gives each response the same weight. For a micro-batch, pass
`functools.partial(masked_mean, count=tokens_in_the_whole_minibatch)`: the losses of the
micro-batches then add up to the loss of the minibatch.
"""

from functools import partial
from typing import Protocol

import jax.numpy as jnp
from jax import Array

from ppo_jax.ops.masked import check_mask, masked_mean, widen
from ppo_jax.ops.options import check_not_negative, check_over_one, check_unit
from ppo_jax.ops.ratios import policy_ratio
from ppo_jax.ops.value_losses import clipped_value_loss, entropy_bonus, value_clipfrac
from ppo_jax.types import Aggregate, Metrics


def clipped_policy_loss(
    logprobs: Array,
    old_logprobs: Array,
    advantages: Array,
    mask: Array,
    *,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None = None,
    aggregate: Aggregate = masked_mean,
) -> Array:
    """Compute the negative of the clipped surrogate objective.

        ρ = π(a|s) / π_old(a|s)
        L = -E[ min(ρ A, clip(ρ, 1 - clip_low, 1 + clip_high) A) ]

    With `dual_clip = c`, the term inside E is at least `c A` where `A < 0`. This bounds the loss of
    a token with a negative advantage whose probability has grown much.

    Args:
      logprobs: `[B, R]` float32, log π(a|s), in nats. The gradient flows through them.
      old_logprobs: `[B, R]` float32, log π_old(a|s) of the policy that sampled the tokens, in nats.
      advantages: `[B, R]` float32.
      mask: `[B, R]` bool, true for the tokens that count.
      clip_low: the ratio is clipped from below at `1 - clip_low`; in 0 .. 1.
      clip_high: the ratio is clipped from above at `1 + clip_high`. PPO sets both to its ε, and
        "clip-higher" sets this one to more. It is not negative.
      dual_clip: `c`, greater than 1. `None` sets no bound.
      aggregate: reduces the terms to one number.

    Returns:
      `[]` float32.

    Raises:
      AssertionError: if the shapes differ, or a mask is not bool.
      ValueError: if a bound is out of its range.

    Source:
      Schulman et al. 2017 (https://arxiv.org/abs/1707.06347), eq. 7. Dual clip: Ye et al. 2020
      (https://arxiv.org/abs/1912.09729), eq. 5. Two bounds: Yu et al. 2025
      (https://arxiv.org/abs/2503.14476), eq. 10.

    Example:
      >>> old_logprobs, mask = jnp.zeros((1, 2)), jnp.ones((1, 2), bool)
      >>> logprobs = jnp.log(jnp.array([[1.5, 1.0]]))  # The first ratio is clipped to 1.25.
      >>> clipped_policy_loss(
      ...     logprobs, old_logprobs, jnp.ones((1, 2)), mask, clip_low=0.25, clip_high=0.25
      ... )
      Array(-1.125, dtype=float32)
    """
    check_unit(clip_low=clip_low)
    check_not_negative(clip_high=clip_high)
    check_over_one(dual_clip=dual_clip)
    check_mask(mask, logprobs, old_logprobs, advantages)
    ratio = policy_ratio(logprobs, old_logprobs, mask)
    advantages = widen(advantages)
    clipped = jnp.clip(ratio, 1 - clip_low, 1 + clip_high)
    gain = jnp.minimum(ratio * advantages, clipped * advantages)
    if dual_clip is not None:
        gain = jnp.where(advantages < 0, jnp.maximum(gain, dual_clip * advantages), gain)
    return -aggregate(gain, mask)


class PolicyLossFn(Protocol):
    """Computes the loss of the policy, `[]` float32, from `[B, R]` arrays.

    `functools.partial(clipped_policy_loss, clip_low=0.2, clip_high=0.2)` is one; see there for the
    arrays. `aggregate` is the averaging rule. The loss must reduce its terms by
    `aggregate(terms, mask)`, so that it does not depend on micro-batches and devices.
    """

    def __call__(
        self,
        logprobs: Array,
        old_logprobs: Array,
        advantages: Array,
        mask: Array,
        *,
        aggregate: Aggregate,
    ) -> Array:
        """Return the loss."""


class ResponseLossFn(Protocol):
    """Computes a loss, `[]` float32, and its terms from `[B, R]` arrays; `ppo_loss` is one."""

    def __call__(
        self,
        logprobs: Array,
        values: Array,
        entropies: Array,
        *,
        old_logprobs: Array,
        old_values: Array,
        advantages: Array,
        returns: Array,
        mask: Array,
        value_mask: Array,
        aggregate: Aggregate,
        value_aggregate: Aggregate,
    ) -> tuple[Array, Metrics]:
        """Return the loss and its terms by name."""


def actor_critic_loss(
    logprobs: Array,
    values: Array,
    entropies: Array,
    *,
    policy_loss: PolicyLossFn,
    old_logprobs: Array,
    old_values: Array,
    advantages: Array,
    returns: Array,
    mask: Array,
    value_mask: Array,
    value_clip: float | None,
    vf_coef: float,
    entropy_coef: float | Array = 0.0,
    aggregate: Aggregate = masked_mean,
    value_aggregate: Aggregate | None = None,
) -> tuple[Array, Metrics]:
    """Combine any loss of the policy with the loss of the values and the entropy.

        L = L_policy + vf_coef · L_value - entropy_coef · H

    With its coefficients bound by `functools.partial`, it is a `ResponseLossFn`.

    Args:
      logprobs: `[B, R]` float32, see `ppo_loss`.
      values: `[B, R]` float32, see `ppo_loss`.
      entropies: `[B, R]` float32, see `ppo_loss`.
      policy_loss: the loss of the policy with its hyper-parameters bound, such as
        `functools.partial(cispo_loss, clip_low=1.0, clip_high=4.0)`.
      old_logprobs: `[B, R]` float32, see `ppo_loss`.
      old_values: `[B, R]` float32, see `ppo_loss`.
      advantages: `[B, R]` float32.
      returns: `[B, R]` float32, the targets of the values.
      mask: `[B, R]` bool, true for the tokens in the policy loss and the entropy.
      value_mask: `[B, R]` bool, true for the steps in the value loss.
      value_clip: the `clip` of `clipped_value_loss`.
      vf_coef: the weight of the value loss; 0 for methods without a critic.
      entropy_coef: the weight of the entropy, a number or `[]` float32.
      aggregate: reduces the terms of policy and entropy to one number.
      value_aggregate: reduces the terms of the value to one number. By default it is `aggregate`.

    Returns:
      The loss, `[]` float32, and its terms by name: `loss/policy`, `loss/value`,
      `policy/entropy` and, if `vf_coef` is not 0, `value/clipfrac`, `[]` float32 each.

    Raises:
      AssertionError: if the shapes differ, or a mask is not bool.
      ValueError: if a bound is out of its range.

    Source:
      Schulman et al. 2017 (https://arxiv.org/abs/1707.06347), eq. 9.

    Example:
      >>> x, mask = jnp.ones((1, 2)), jnp.ones((1, 2), bool)
      >>> reinforce = lambda logprobs, old, advantages, mask, *, aggregate: -aggregate(
      ...     logprobs * advantages, mask)
      >>> loss, terms = actor_critic_loss(
      ...     -x, x, x, policy_loss=reinforce, old_logprobs=-x, old_values=x, advantages=x,
      ...     returns=2 * x, mask=mask, value_mask=mask, value_clip=None, vf_coef=0.1)
      >>> loss
      Array(1.05, dtype=float32)
    """
    check_mask(value_mask, values, name="value_mask")
    policy = policy_loss(logprobs, old_logprobs, advantages, mask, aggregate=aggregate)
    average = value_aggregate or aggregate
    value = clipped_value_loss(
        values, old_values, returns, value_mask, clip=value_clip, aggregate=average
    )
    bonus = entropy_bonus(entropies, mask, aggregate=aggregate)
    loss = policy + vf_coef * value
    if isinstance(entropy_coef, Array) or entropy_coef:  # A weight of 0 needs no gradient.
        loss = loss - entropy_coef * bonus
    terms = {"loss/policy": policy, "loss/value": value, "policy/entropy": bonus}
    if vf_coef:
        terms["value/clipfrac"] = value_clipfrac(
            values, old_values, returns, value_mask, clip=value_clip, aggregate=average
        )
    return loss, terms


def ppo_loss(
    logprobs: Array,
    values: Array,
    entropies: Array,
    *,
    old_logprobs: Array,
    old_values: Array,
    advantages: Array,
    returns: Array,
    mask: Array,
    value_mask: Array,
    clip_low: float,
    clip_high: float,
    value_clip: float | None,
    vf_coef: float,
    entropy_coef: float | Array = 0.0,
    dual_clip: float | None = None,
    aggregate: Aggregate = masked_mean,
    value_aggregate: Aggregate | None = None,
) -> tuple[Array, Metrics]:
    """Compute the PPO loss of policy, value and entropy.

        L = L_policy + vf_coef · L_value - entropy_coef · H

    With its coefficients bound by `functools.partial`, it is a `ResponseLossFn`.

    Args:
      logprobs: `[B, R]` float32, of the policy that trains, in nats.
      values: `[B, R]` float32, of the critic that trains, in units of reward.
      entropies: `[B, R]` float32, of the policy that trains, in nats.
      old_logprobs: `[B, R]` float32, of the policy that sampled the tokens, in nats.
      old_values: `[B, R]` float32, the values that the advantages were computed with.
      advantages: `[B, R]` float32.
      returns: `[B, R]` float32, the targets of the values.
      mask: `[B, R]` bool, true for the tokens in the policy loss and the entropy.
      value_mask: `[B, R]` bool, true for the steps in the value loss.
      clip_low: see `clipped_policy_loss`.
      clip_high: see `clipped_policy_loss`.
      value_clip: the `clip` of `clipped_value_loss`.
      vf_coef: the weight of the value loss.
      entropy_coef: the weight of the entropy, a number or `[]` float32.
      dual_clip: see `clipped_policy_loss`.
      aggregate: reduces the terms of policy and entropy to one number.
      value_aggregate: reduces the terms of the value to one number. By default it is `aggregate`.

    Returns:
      The loss, `[]` float32, and its terms by name: `loss/policy`, `loss/value`,
      `policy/entropy` and, if `vf_coef` is not 0, `value/clipfrac`, `[]` float32 each.

    Raises:
      AssertionError: if the shapes differ, or a mask is not bool.
      ValueError: if a bound is out of its range.

    Source:
      Schulman et al. 2017 (https://arxiv.org/abs/1707.06347), eq. 9.

    Example:
      >>> x, mask = jnp.ones((1, 2)), jnp.ones((1, 2), bool)
      >>> loss, terms = ppo_loss(
      ...     -x, x, x, old_logprobs=-x, old_values=x, advantages=x, returns=2 * x, mask=mask,
      ...     value_mask=mask, clip_low=0.2, clip_high=0.2, value_clip=0.2, vf_coef=0.1,
      ... )
      >>> loss
      Array(-0.95, dtype=float32)
    """
    policy_loss = partial(
        clipped_policy_loss, clip_low=clip_low, clip_high=clip_high, dual_clip=dual_clip
    )
    return actor_critic_loss(
        logprobs,
        values,
        entropies,
        policy_loss=policy_loss,
        old_logprobs=old_logprobs,
        old_values=old_values,
        advantages=advantages,
        returns=returns,
        mask=mask,
        value_mask=value_mask,
        value_clip=value_clip,
        vf_coef=vf_coef,
        entropy_coef=entropy_coef,
        aggregate=aggregate,
        value_aggregate=value_aggregate,
    )
