"""Generalized advantage estimation over masked, ragged sequences."""

import chex
import jax
import jax.numpy as jnp


def generalized_advantage_estimation(
    rewards: jax.Array,
    values: jax.Array,
    mask: jax.Array | None = None,
    *,
    gamma: float | jax.Array,
    lam: float | jax.Array,
    bootstrap_value: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Advantages and returns of each step, by one backward pass:

        δ_t = r_t + γ V(s_{t+1}) - V(s_t),    A_t = δ_t + γ λ A_{t+1},    G_t = A_t + V(s_t)

    A masked step is no step: the pass carries the value and the advantage of the next real step over it. So trailing padding
    counts for nothing (the value after the last real token is 0), and an interior masked token (a tool's answer, say) joins
    its neighbours. The reward of a masked step is ignored.

    Args:
      rewards: `[..., R]` float32, `r_t`, received after action `t`.
      values: `[..., R]` float32, `V(s_t)`, before action `t`.
      mask: `[..., R]` bool, the real steps; by default all.
      gamma: discount; a number, or `[..., R]` with 0 at steps that end an episode.
      lam: λ, the bias-variance trade; a number, or `[..., R]`.
      bootstrap_value: `[...]` value of the state after step `R - 1`, by default 0.

    Returns:
      `advantages` and `returns`, `[..., R]` float32 or wider. At masked steps: the advantage and value that are carried over.

    Source:
      Schulman et al. 2015 (https://arxiv.org/abs/1506.02438), eq. 11-16.

    Example:
      >>> advantages, returns = generalized_advantage_estimation(
      ...     jnp.array([0.0, 0.0, 1.0]), jnp.array([0.5, 0.5, 0.5]), gamma=1.0, lam=0.5)
      >>> advantages
      Array([0.125, 0.25 , 0.5  ], dtype=float32)
      >>> returns
      Array([0.625, 0.75 , 1.   ], dtype=float32)
    """
    mask = jnp.ones(rewards.shape, bool) if mask is None else mask
    chex.assert_equal_shape([rewards, values, mask])
    chex.assert_type([rewards, values, mask], [float, float, bool])
    rewards, values = (
        x.astype(jnp.promote_types(jnp.float32, jnp.result_type(rewards, values)))
        for x in (rewards, values)
    )
    after = jnp.zeros_like(values[..., 0]) if bootstrap_value is None else bootstrap_value
    chex.assert_equal_shape([after, values[..., 0]])

    def step(carry, inputs):
        value_tp1, advantage_tp1 = carry
        r_t, value_t, mask_t, gamma_t, lam_t = inputs
        delta_t = r_t + gamma_t * value_tp1 - value_t
        advantage_t = delta_t + gamma_t * lam_t * advantage_tp1
        advantage_t = jnp.where(mask_t, advantage_t, advantage_tp1)
        value_t = jnp.where(mask_t, value_t, value_tp1)
        return (value_t, advantage_t), (advantage_t, advantage_t + value_t)

    gamma, lam = (
        jnp.broadcast_to(jnp.asarray(x, rewards.dtype), rewards.shape) for x in (gamma, lam)
    )
    time_major = jax.tree.map(lambda x: jnp.moveaxis(x, -1, 0), (rewards, values, mask, gamma, lam))
    after = after.astype(values.dtype)
    _, (advantages, returns) = jax.lax.scan(
        step, (after, jnp.zeros_like(after)), time_major, reverse=True
    )
    return jnp.moveaxis(advantages, 0, -1), jnp.moveaxis(returns, 0, -1)
