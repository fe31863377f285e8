"""The PPO losses. Each is a function of `[B, R]` arrays and a mask and gives one number to minimise.

`aggregate` says how tokens become one number: `masked_mean` (every token weighs alike) or `sequence_mean`. In a micro-batch,
`functools.partial(masked_mean, count=tokens_of_the_whole_batch)` makes the parts add up to the loss of the whole.
"""

import chex
import jax
import jax.numpy as jnp

from ppo_jax.ops.masked import Aggregate, masked_mean


def policy_ratio(logprobs: jax.Array, old_logprobs: jax.Array, mask: jax.Array) -> jax.Array:
    """Importance ratio `ρ_t = π(a_t|s_t) / π_old(a_t|s_t)`; 1 outside the mask, whatever stands there.

    The log-ratio is held within ±60, far beyond any clip, so that neither the ratio nor its gradient overflows.

    Args:
      logprobs: `[B, R]` float32, of the policy that learns, in nats.
      old_logprobs: `[B, R]` float32, of the policy that acted.
      mask: `[B, R]` bool.

    Returns:
      `[B, R]` float32.

    Example:
      >>> policy_ratio(jnp.array([[-1.0, jnp.nan]]), jnp.array([[-1.0, 0.0]]), jnp.array([[True, False]]))
      Array([[1., 1.]], dtype=float32)
    """
    chex.assert_equal_shape([logprobs, old_logprobs, mask])
    return jnp.exp(jnp.clip(jnp.where(mask, logprobs - old_logprobs, 0), -60, 60))


def clipped_policy_loss(
    logprobs: jax.Array,
    old_logprobs: jax.Array,
    advantages: jax.Array,
    mask: jax.Array,
    *,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None = None,
    aggregate: Aggregate = masked_mean,
) -> jax.Array:
    """The clipped surrogate objective, negated:

        ρ = π(a|s) / π_old(a|s),    L = -E[ min(ρ A, clip(ρ, 1 - clip_low, 1 + clip_high) A) ]

    With `dual_clip = c`, the term is at least `c A` where `A < 0`, which bounds the loss of a token that the policy now finds
    likely although it was bad.

    Args:
      logprobs: `[B, R]` float32, log π(a|s), which the gradient flows through.
      old_logprobs: `[B, R]` float32, of the policy that acted.
      advantages: `[B, R]` float32.
      mask: `[B, R]` bool, the tokens that count.
      clip_low: how far below 1 the ratio still pays, in [0, 1).
      clip_high: how far above 1 it does; PPO's ε sets both, "clip-higher" sets this one higher.
      dual_clip: c > 1, or `None`.
      aggregate: tokens to one number.

    Returns:
      `[]` float32.

    Source:
      Schulman et al. 2017 (https://arxiv.org/abs/1707.06347), eq. 7; dual clip: Ye et al. 2020
      (https://arxiv.org/abs/1912.09729), eq. 5; separate bounds: Yu et al. 2025 (https://arxiv.org/abs/2503.14476), eq. 10.

    Example:
      >>> old, mask = jnp.zeros((1, 2)), jnp.ones((1, 2), bool)
      >>> now = jnp.log(jnp.array([[1.5, 1.0]]))  # the first ratio counts as 1.25
      >>> clipped_policy_loss(now, old, jnp.ones((1, 2)), mask, clip_low=0.25, clip_high=0.25)
      Array(-1.125, dtype=float32)
    """
    chex.assert_equal_shape([logprobs, old_logprobs, advantages, mask])
    ratio = policy_ratio(logprobs, old_logprobs, mask)
    gain = jnp.minimum(
        ratio * advantages, jnp.clip(ratio, 1 - clip_low, 1 + clip_high) * advantages
    )
    if dual_clip is not None:
        gain = jnp.where(advantages < 0, jnp.maximum(gain, dual_clip * advantages), gain)
    return -aggregate(gain, mask)


def clipped_value_loss(
    values: jax.Array,
    old_values: jax.Array,
    returns: jax.Array,
    mask: jax.Array,
    *,
    clip: float | None,
    aggregate: Aggregate = masked_mean,
) -> jax.Array:
    """Half the squared error of the values, pessimistic about steps that leave the old values' neighbourhood:

        V_c = V_old + clip(V - V_old, ± clip),    L = ½ E[ max((V - G)², (V_c - G)²) ]

    Args:
      values: `[B, R]` float32, which the gradient flows through.
      old_values: `[B, R]` float32, those that the advantages were made with.
      returns: `[B, R]` float32, the targets G.
      mask: `[B, R]` bool.
      clip: the neighbourhood, in units of value; `None` for the plain squared error.
      aggregate: tokens to one number.

    Returns:
      `[]` float32.

    Source:
      `ppo2` of OpenAI baselines; Ziegler et al. 2019 (https://arxiv.org/abs/1909.08593), as in their code.

    Example:
      >>> one = jnp.ones((1, 1))
      >>> clipped_value_loss(one, 0 * one, 2 * one, one > 0, clip=0.5)
      Array(1.125, dtype=float32)
    """
    chex.assert_equal_shape([values, old_values, returns, mask])
    values, old_values, returns = (
        jnp.where(mask, x, 0) for x in (values, old_values, returns)
    )  # NaN there reaches no gradient
    error = (values - returns) ** 2
    if clip is not None:
        near = old_values + jnp.clip(values - old_values, -clip, clip)
        error = jnp.maximum(error, (near - returns) ** 2)
    return 0.5 * aggregate(error, mask)


def entropy_bonus(
    entropies: jax.Array, mask: jax.Array, *, aggregate: Aggregate = masked_mean
) -> jax.Array:
    """Mean entropy, the term that PPO may add to keep exploring (Schulman et al. 2017, eq. 9).

    Args:
      entropies: `[B, R]` float32, nats.
      mask: `[B, R]` bool.
      aggregate: tokens to one number.

    Returns:
      `[]` float32, to be *subtracted* from a loss.

    Example:
      >>> entropy_bonus(jnp.array([[1.0, 2.0]]), jnp.array([[True, True]]))
      Array(1.5, dtype=float32)
    """
    return aggregate(entropies, mask)


def ppo_loss(
    logprobs: jax.Array,
    values: jax.Array,
    entropies: jax.Array,
    *,
    old_logprobs: jax.Array,
    old_values: jax.Array,
    advantages: jax.Array,
    returns: jax.Array,
    mask: jax.Array,
    value_mask: jax.Array,
    clip_low: float,
    clip_high: float,
    value_clip: float | None,
    vf_coef: float,
    entropy_coef: float = 0.0,
    dual_clip: float | None = None,
    aggregate: Aggregate = masked_mean,
    value_aggregate: Aggregate | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """`L = L_policy + vf_coef · L_value - entropy_coef · H`, and its three terms.

    Args:
      logprobs, values, entropies: `[B, R]` float32, of the model that learns.
      old_logprobs, old_values, advantages, returns: `[B, R]` float32, fixed.
      mask: `[B, R]` bool, the tokens of the policy's and the entropy's terms.
      value_mask: `[B, R]` bool, the steps of the value's term.
      clip_low, clip_high, dual_clip: see `clipped_policy_loss`.
      value_clip: see `clipped_value_loss`.
      vf_coef, entropy_coef: weights of the terms.
      aggregate, value_aggregate: tokens to one number; the second is the first unless it counts otherwise.

    Returns:
      The loss, `[]` float32, and its terms `loss/policy`, `loss/value`, `policy/entropy`.

    Source:
      Schulman et al. 2017 (https://arxiv.org/abs/1707.06347), eq. 9.

    Example:
      >>> x, mask = jnp.ones((1, 2)), jnp.ones((1, 2), bool)
      >>> loss, terms = ppo_loss(-x, x, x, old_logprobs=-x, old_values=x, advantages=x, returns=2 * x, mask=mask,
      ...     value_mask=mask, clip_low=0.2, clip_high=0.2, value_clip=0.2, vf_coef=0.1)
      >>> loss
      Array(-0.95, dtype=float32)
    """
    policy = clipped_policy_loss(
        logprobs,
        old_logprobs,
        advantages,
        mask,
        clip_low=clip_low,
        clip_high=clip_high,
        dual_clip=dual_clip,
        aggregate=aggregate,
    )
    value = clipped_value_loss(
        values,
        old_values,
        returns,
        value_mask,
        clip=value_clip,
        aggregate=value_aggregate or aggregate,
    )
    bonus = entropy_bonus(entropies, mask, aggregate=aggregate)
    loss = policy + vf_coef * value
    if (
        not isinstance(entropy_coef, int | float) or entropy_coef != 0
    ):  # a term of weight 0 would still cost a gradient
        loss = loss - entropy_coef * bonus
    return loss, {"loss/policy": policy, "loss/value": value, "policy/entropy": bonus}
