"""Generalized advantage estimation over sequences with a mask."""

import chex
import jax
import jax.numpy as jnp
from jax import Array

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
      gamma: γ, the discount per token: a number, or `[..., R]` with 0 at steps that end an episode.
      lam: λ, the trade-off between bias (0) and variance (1): a number or `[..., R]`.
      bootstrap_value: `[...]` float32, the value of the state after step `R - 1`, by default 0.

    Returns:
      Advantages and returns, `[..., R]` float32 or wider. Masked steps hold the advantage and the
      value that were carried over them.

    Raises:
      AssertionError: if shapes differ, or if the arrays are not float, float and bool.

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
    chex.assert_equal_shape([rewards, values, mask])
    chex.assert_type([rewards, values, mask], [float, float, bool])
    dtype = jnp.promote_types(jnp.float32, jnp.result_type(rewards, values))
    after = jnp.zeros_like(values[..., 0]) if bootstrap_value is None else bootstrap_value
    chex.assert_equal_shape([after, values[..., 0]])

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
