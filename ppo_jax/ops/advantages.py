"""Generalized advantage estimation over sequences with a mask."""

from functools import partial

import chex
import jax
import jax.numpy as jnp
from jax import Array

from ppo_jax.ops.masked import check_mask
from ppo_jax.ops.options import check_positive, check_unit

_Step = tuple[Array, Array]


def generalized_advantage_estimation(
    rewards: Array,
    values: Array,
    mask: Array | None = None,
    *,
    gamma: float | Array,
    lam: float | Array,
    bootstrap_value: Array | None = None,
) -> tuple[Array, Array]:
    """Estimate the advantage and the return of each step by generalized advantage estimation.

        δ_t = r_t + γ V(s_{t+1}) - V(s_t)
        A_t = δ_t + γ λ A_{t+1}
        G_t = A_t + V(s_t)

    The recursion runs over the real steps only: at a masked step it carries the value and the
    advantage of the next real step on. So the value after the last real token is 0 whatever the
    padding holds, and tokens on both sides of a masked span, such as the answer of a tool, are
    neighbours. The rewards of masked steps are ignored.

    Args:
      rewards: `[..., R]` float32, `r_t`, received after action `t`.
      values: `[..., R]` float32, `V(s_t)`, before action `t`, in units of reward.
      mask: `[..., R]` bool, true for real steps. By default all steps are real.
      gamma: γ, the discount per token: a number in 0 .. 1, or `[..., R]` float32 with 0 at steps
        that end an episode.
      lam: λ, the trade-off between bias (0) and variance (1): a number in 0 .. 1 or `[..., R]`
        float32.
      bootstrap_value: `[...]` float32, the value of the state after step `R - 1`, by default 0.

    Returns:
      Advantages and returns, `[..., R]` float32 or wider. Masked steps hold the advantage and the
      value that were carried over them.

    Raises:
      AssertionError: if shapes differ, or `mask` is not bool.
      ValueError: if γ or λ is a number outside 0 .. 1.

    Source:
      Schulman et al. 2015 (https://arxiv.org/abs/1506.02438), eq. 11-16.

    Example:
      >>> advantages, returns = generalized_advantage_estimation(
      ...     jnp.array([0.0, 0.0, 1.0]), jnp.array([0.5, 0.5, 0.5]), gamma=1.0, lam=0.5
      ... )
      >>> advantages
      Array([0.125, 0.25 , 0.5  ], dtype=float32)
      >>> returns
      Array([0.625, 0.75 , 1.   ], dtype=float32)
    """
    mask = jnp.ones(rewards.shape, bool) if mask is None else mask
    check_unit(gamma=gamma, lam=lam)
    check_mask(mask, rewards, values)
    dtype = jnp.promote_types(jnp.float32, jnp.result_type(rewards, values))
    zeros = jnp.zeros_like(values[..., :1]).sum(axis=-1)  # also if there is no step
    after = zeros if bootstrap_value is None else bootstrap_value
    chex.assert_equal_shape([after, zeros])

    def step(carry: _Step, inputs: tuple[Array, ...]) -> tuple[_Step, _Step]:
        value_tp1, advantage_tp1 = carry
        mask_t, r_t, value_t, gamma_t, lam_t = inputs
        delta_t = r_t + gamma_t * value_tp1 - value_t
        advantage_t = delta_t + gamma_t * lam_t * advantage_tp1
        advantage_t = jnp.where(mask_t, advantage_t, advantage_tp1)
        value_t = jnp.where(mask_t, value_t, value_tp1)
        return (value_t, advantage_t), (advantage_t, advantage_t + value_t)

    numbers = (
        jnp.broadcast_to(jnp.asarray(x, dtype), mask.shape) for x in (rewards, values, gamma, lam)
    )
    time_major = tuple(jnp.moveaxis(x, -1, 0) for x in (mask, *numbers))
    start = after.astype(dtype)
    _, outputs = jax.lax.scan(step, (start, jnp.zeros_like(start)), time_major, reverse=True)
    advantages, returns = (jnp.moveaxis(x, 0, -1) for x in outputs)
    return advantages, returns


def decoupled_gae(
    rewards: Array,
    values: Array,
    mask: Array | None = None,
    *,
    gamma: float | Array,
    lam_policy: float | Array,
    lam_value: float | Array = 1.0,
    bootstrap_value: Array | None = None,
) -> tuple[Array, Array]:
    """Estimate advantages with one λ and returns with another.

        A_t = Σ_k (γ λ_policy)^k δ_{t+k}
        G_t = V(s_t) + Σ_k (γ λ_value)^k δ_{t+k}

    With λ_value = 1 the critic learns from the sum of the rewards, without bias from its own
    values, while a smaller λ_policy keeps the variance of the policy gradient low.

    Args:
      rewards: `[..., R]` float32, see `generalized_advantage_estimation`.
      values: `[..., R]` float32, V, in units of reward.
      mask: `[..., R]` bool, true for real steps. By default all steps are real.
      gamma: γ, the discount per token: a number or `[..., R]` float32.
      lam_policy: λ of the advantages: a number or float32 that broadcasts to `[..., R]`, such as
        `length_adaptive_lambda` returns.
      lam_value: λ of the returns: a number or float32 that broadcasts to `[..., R]`.
      bootstrap_value: `[...]` float32, the value of the state after step `R - 1`, by default 0.

    Returns:
      Advantages and returns, `[..., R]` float32 or wider. Masked steps hold the advantage and the
      return of the next real step.

    Raises:
      AssertionError: if shapes differ, or `mask` is not bool.
      ValueError: if γ or λ is a number outside 0 .. 1.

    Source:
      Yuan et al. 2025, VC-PPO (https://arxiv.org/abs/2503.01491), decoupled GAE; Yue et al. 2025,
      VAPO (https://arxiv.org/abs/2504.05118). Checked against NeMo RL.

    Example:
      >>> rewards, values = jnp.array([[0.0, 1.0]]), jnp.array([[0.5, 0.5]])
      >>> decoupled_gae(rewards, values, gamma=1.0, lam_policy=0.5)
      (Array([[0.25, 0.5 ]], dtype=float32), Array([[1., 1.]], dtype=float32))
    """
    check_unit(lam_policy=lam_policy, lam_value=lam_value)
    estimate = partial(
        generalized_advantage_estimation,
        rewards,
        values,
        mask,
        gamma=gamma,
        bootstrap_value=bootstrap_value,
    )
    return estimate(lam=lam_policy)[0], estimate(lam=lam_value)[1]


def length_adaptive_lambda(mask: Array, *, alpha: float) -> Array:
    """Compute a λ that grows with the length of the response.

        λ = max(0, 1 - 1 / (α · length))

    The weights of the TD errors, λ^k, then sum to at most `α · length`: the share of a response
    that an advantage looks ahead does not depend on its length.

    Args:
      mask: `[B, R]` bool, true for real tokens.
      alpha: α, positive. VAPO uses 0.05.

    Returns:
      `[B, 1]` float32, the `lam` of `generalized_advantage_estimation` or the `lam_policy` of
      `decoupled_gae`; 0 for a response without a real token.

    Raises:
      AssertionError: if `mask` is not `[B, R]` bool.
      ValueError: if `alpha` is not positive.

    Source:
      Yue et al. 2025, VAPO (https://arxiv.org/abs/2504.05118), length-adaptive GAE. Checked against
      NeMo RL.

    Example:
      >>> length_adaptive_lambda(jnp.array([[True] * 4, [True] + [False] * 3]), alpha=0.5)
      Array([[0.5],
             [0. ]], dtype=float32)
    """
    check_positive(alpha=alpha)
    chex.assert_rank(mask, 2)
    check_mask(mask)
    length = mask.sum(axis=1, keepdims=True).astype(jnp.float32)
    return 1 - 1 / jnp.maximum(alpha * length, 1)


def discounted_returns(rewards: Array, mask: Array, *, gamma: float) -> Array:
    """Sum the discounted rewards from each step to the end of the response.

        G_t = r_t + γ G_{t+1}

    Args:
      rewards: `[B, R]` float32, `r_t`; those of masked steps are ignored.
      mask: `[B, R]` bool, true for real steps. The next step is the next real one.
      gamma: γ, the discount per token, in 0 .. 1.

    Returns:
      `[B, R]` float32; 0 outside the mask.

    Raises:
      AssertionError: if shapes differ, or `mask` is not bool.
      ValueError: if γ is not in 0 .. 1.

    Source:
      Williams 1992, "Simple Statistical Gradient-Following Algorithms for Connectionist
      Reinforcement Learning".

    Example:
      >>> mask = jnp.array([[True, True, False]])
      >>> discounted_returns(jnp.array([[1.0, 2.0, 4.0]]), mask, gamma=0.5)
      Array([[2., 2., 0.]], dtype=float32)
    """
    zeros = jnp.zeros_like(rewards)
    returns, _ = generalized_advantage_estimation(rewards, zeros, mask, gamma=gamma, lam=1.0)
    return jnp.where(mask, returns, 0)
