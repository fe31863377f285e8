"""Attention of queries to keys and values, in the form that suits the platform and the length."""

from collections.abc import Iterable
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array

from ppo_jax.models.blockwise_attention import blockwise_attention
from ppo_jax.models.cache import block_diagonal, own_features
from ppo_jax.models.rounding import product, round_to
from ppo_jax.models.splash_attention import splash_attention
from ppo_jax.models.visible import PADDING, Visible, in_reach
from ppo_jax.sharding import platform

LONG = 1017
"""Passes over this many positions and more use `attend_long`. Padded to a multiple of eight, as in
bfloat16, these are 1,024 and more."""

# The matrix unit of a TPU multiplies tiles of eight rows. With fewer rows, the compiler uses the
# vector unit, which reads keys and values several times more slowly.
_TPU_ROWS = 8


def is_long(positions: int) -> bool:
    """Return whether a pass over so many positions uses `attend_long`."""
    return positions >= LONG


def soft_cap(x: Array, cap: float | None) -> Array:
    """Return `cap * tanh(x / cap)`, or `x` without a cap."""
    return x if cap is None else cap * jnp.tanh(x / cap)


def attended_slots(
    mask_BS: Array,
    mask_BN: Array,
    segments_BS: Array | None,
    start: Array | int,
    *,
    windows: Iterable[int | None],
    causal: bool,
) -> tuple[Array, dict[int | None, Array | Visible]]:
    """Return the positions of tokens, and which slots they attend to.

    The position of a token is the number of real tokens of its segment before it, so that padding
    does not change it.

    Args:
      mask_BS: bool, the real ones of the tokens.
      mask_BN: bool, the slots that hold a real token, those of the tokens included.
      segments_BS: int32, the segments of the tokens, or None if each row is one sequence.
      start: the slot of the first token; 0 if the slots are those of the tokens.
      windows: the windows of the layers, with repetitions.
      causal: whether later slots are out of reach.

    Returns:
      The positions `[B, S]`, and for each window the slots that each token attends to: a matrix
      `[B, S, N]` bool, or a `Visible` if there are so many tokens that `attend_long` is to be used.
    """
    S, N = mask_BS.shape[1], mask_BN.shape[1]
    if is_long(S):
        segments = jnp.zeros_like(mask_BS, jnp.int32) if segments_BS is None else segments_BS
        keys = jnp.zeros_like(mask_BN, jnp.int32) if segments_BS is None else segments_BS
        seen = Visible(
            segments,
            jnp.where(mask_BN, keys, PADDING),
            start=start if isinstance(start, Array) else None,
            causal=causal,
        )
        position_BS = seen.count_earlier()
        # Padding that sees no token sees padding instead, so that no kernel divides by 0.
        sees = mask_BS | (position_BS > 0)
        seen = seen.replace(queries=jnp.where(sees, segments, PADDING))
        return position_BS, {x: seen.replace(window=x) for x in dict.fromkeys(windows)}
    ago_SN = (start + jnp.arange(S))[:, None] - jnp.arange(N)[None, :]
    seen_BSN = mask_BN[:, None]
    if segments_BS is not None:
        seen_BSN = seen_BSN & (segments_BS[:, :, None] == segments_BS[:, None])
    position_BS = jnp.sum((ago_SN > 0)[None] & seen_BSN, axis=-1)
    return position_BS, {
        window: seen_BSN & in_reach(ago_SN, window, causal)[None]
        for window in dict.fromkeys(windows)
    }


def attend_long(
    q_BHSC: Array, k_BKNC: Array, v_BKNC: Array, visible: Visible, *, cap: float | None
) -> Array:
    """Attend to keys and values with memory that is linear in the number of positions.

    Args:
      q_BHSC: queries, scaled.
      k_BKNC: keys, each head of which serves `H / K` heads of queries.
      v_BKNC: values, whose dtype the results have.
      visible: the slots that each query attends to.
      cap: bound of the soft cap on the logits, or None.

    Returns:
      The results `[B, H, S, C]`. Those of padding are arbitrary.
    """
    on_tpu = platform() == "tpu" and visible.start is None
    form = splash_attention if on_tpu else blockwise_attention
    return form(q_BHSC, k_BKNC, v_BKNC, visible, cap)


def attend(
    q_BKQC: Array, k_BGNF: Array, v_BGNF: Array, allowed_BQN: Array, *, cap: float | None
) -> Array:
    """Attend to keys and values.

    Args:
      q_BKQC: queries, scaled; those of the heads that share a key head are rows of one matrix.
      k_BGNF: keys, in groups of key heads (see `models.cache`).
      v_BGNF: values, whose dtype probabilities and results are rounded to.
      allowed_BQN: bool, the slots that each query attends to.
      cap: bound of the soft cap on the logits, or None.

    Returns:
      The results `[B, K, Q, C]`.
    """
    K, groups = q_BKQC.shape[1], k_BGNF.shape[1]
    if groups != K:
        q, own = block_diagonal(q_BKQC, groups, _TPU_ROWS)
        allowed = jnp.tile(allowed_BQN, (1, own.shape[2], 1))
        return own_features(_attend(q, k_BGNF, v_BGNF, allowed, cap=cap), own, K)
    plain, arrays = partial(_attend, cap=cap), (q_BKQC, k_BGNF, v_BGNF, allowed_BQN)
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
