"""Attention of queries to keys and values, in the form that suits the platform."""

from functools import partial

import jax
import jax.numpy as jnp
from jax import Array

from ppo_jax.models.rounding import product, round_to

# The matrix unit of a TPU multiplies tiles of eight rows. With fewer rows, the compiler uses the
# vector unit, which reads keys and values several times more slowly.
_TPU_ROWS = 8


def soft_cap(x: Array, cap: float | None) -> Array:
    """Return `cap * tanh(x / cap)`, or `x` without a cap."""
    return x if cap is None else cap * jnp.tanh(x / cap)


def in_reach(ago_SN: Array, window: int | None, causal: bool) -> Array:
    """Return which slots a position may attend to by their distance, `[S, N]` bool."""
    reach = ago_SN >= 0 if causal else jnp.ones(ago_SN.shape, bool)
    return reach if window is None else reach & (jnp.abs(ago_SN) < window)


def attend(
    q_BKQC: Array, k_BKNC: Array, v_BKNC: Array, allowed_BQN: Array, *, cap: float | None
) -> Array:
    """Attend to keys and values.

    Args:
      q_BKQC: queries, scaled; those of the heads that share a key head are rows of one matrix.
      k_BKNC: keys.
      v_BKNC: values, whose dtype probabilities and results are rounded to.
      allowed_BQN: bool, the slots that each query attends to.
      cap: bound of the soft cap on the logits, or None.

    Returns:
      The results `[B, K, Q, C]`.
    """
    plain, arrays = partial(_attend, cap=cap), (q_BKQC, k_BKNC, v_BKNC, allowed_BQN)
    if q_BKQC.shape[2] >= _TPU_ROWS:
        return plain(*arrays)
    return jax.lax.platform_dependent(*arrays, tpu=partial(_attend_padded, cap=cap), default=plain)


def _attend_padded(
    q_BKQC: Array, k_BKNC: Array, v_BKNC: Array, allowed_BQN: Array, *, cap: float | None
) -> Array:
    """Compute `_attend` with rows of padding, which the matrix unit needs."""
    rows = (0, _TPU_ROWS - q_BKQC.shape[2])
    q = jnp.pad(q_BKQC, ((0, 0), (0, 0), rows, (0, 0)))
    allowed = jnp.pad(allowed_BQN, ((0, 0), rows, (0, 0)))
    return _attend(q, k_BKNC, v_BKNC, allowed, cap=cap)[:, :, : q_BKQC.shape[2]]


def _attend(
    q_BKQC: Array, k_BKNC: Array, v_BKNC: Array, allowed_BQN: Array, *, cap: float | None
) -> Array:
    logits_BKQN = product("bkqc,bknc->bkqn", q_BKQC, k_BKNC)
    # The minimum is finite, so that a position of padding that sees no slot does not give NaN.
    logits_BKQN = jnp.where(
        allowed_BQN[:, None], soft_cap(logits_BKQN, cap), jnp.finfo(jnp.float32).min
    )
    probs_BKQN = round_to(jax.nn.softmax(logits_BKQN), v_BKNC.dtype)
    return round_to(product("bkqn,bknc->bkqc", probs_BKQN, v_BKNC), v_BKNC.dtype)
