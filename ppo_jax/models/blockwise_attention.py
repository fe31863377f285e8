"""Attention over blocks of queries and keys, whose memory is linear in the number of positions.

The softmax is computed online: each query keeps the largest logit so far, and sums relative to it.
The backward pass computes the logits of each block again. Blocks that the causal mask or the
window hides entirely are skipped, unless the position of the queries is only known at run time.

Source: Dao 2023, "FlashAttention-2" (https://arxiv.org/abs/2307.08691); the online softmax is that
of Milakov and Gimelshein 2018 (https://arxiv.org/abs/1805.02867).
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import DTypeLike

from ppo_jax.models.rounding import round_to
from ppo_jax.models.visible import PADDING, Visible, in_reach
from ppo_jax.sharding import BATCH, constrain

QUERIES = 128
"""The number of queries in a block."""

KEYS = 128
"""The number of keys in a block. Sequences that share a row and begin at multiples of this number
do not change each other's results, because their keys are then divided into the same blocks."""

_Three = tuple[Array, Array, Array]


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def blockwise_attention(
    q_BHSC: Array, k_BKNC: Array, v_BKNC: Array, visible: Visible, cap: float | None
) -> Array:
    """Attend to keys and values, block by block.

    Args:
      q_BHSC: queries, scaled. Each group of `H / K` consecutive query heads shares one key head.
      k_BKNC: keys.
      v_BKNC: values, whose dtype the result has.
      visible: the slots that each query attends to. A query that sees none gets 0.
      cap: bound of the soft cap on the logits, or None.

    Returns:
      The results `[B, H, S, C]`.
    """
    return _forward(q_BHSC, k_BKNC, v_BKNC, visible, cap)[0]


def _forward(
    q_BHSC: Array, k_BKNC: Array, v_BKNC: Array, visible: Visible, cap: float | None
) -> tuple[Array, tuple]:
    dtype, blocks = v_BKNC.dtype, _Blocks(visible, q_BHSC.shape[1] // k_BKNC.shape[1])
    q, k, v = blocks.of_queries(q_BHSC), blocks.of_keys(k_BKNC), blocks.of_keys(v_BKNC)

    def step(carry: _Three, pair: Array) -> tuple[_Three, None]:
        i, j = pair
        sums, total, largest = carry
        logits, _ = _capped(_product("bkqc,bknc->bkqn", q[i], k[j], dtype), cap)
        logits = jnp.where(blocks.seen(pair), logits, -jnp.inf)
        new_largest = jnp.maximum(largest[i], jnp.max(logits, axis=-1))
        # A finite number for queries that have seen no slot yet, so that nothing is NaN.
        shift = jnp.where(new_largest == -jnp.inf, 0, new_largest)
        scale, weights = jnp.exp(largest[i] - shift), jnp.exp(logits - shift[..., None])
        new = _product("bkqn,bknc->bkqc", weights, v[j], dtype)
        return (
            sums.at[i].set(sums[i] * scale[..., None] + new),
            total.at[i].set(total[i] * scale + jnp.sum(weights, axis=-1)),
            largest.at[i].set(new_largest),
        ), None

    zeros = jnp.zeros_like(q, jnp.float32)
    start = zeros, zeros[..., 0], zeros[..., 0] - jnp.inf
    (sums, total, largest), _ = jax.lax.scan(step, start, blocks.pairs)
    out = round_to(sums / jnp.where(total > 0, total, 1)[..., None], dtype)
    # The weights of a query that sees no slot are 0 in the backward pass as well.
    log_total = jnp.where(total > 0, largest + jnp.log(total), jnp.inf)
    out_BHSC = blocks.from_queries(out)
    return out_BHSC, (q_BHSC, k_BKNC, v_BKNC, visible, out_BHSC, log_total)


def _backward(cap: float | None, saved: tuple, cotangent: Array) -> tuple:
    q_BHSC, k_BKNC, v_BKNC, visible, out_BHSC, log_total = saved
    dtype, blocks = v_BKNC.dtype, _Blocks(visible, q_BHSC.shape[1] // k_BKNC.shape[1])
    q, k, v = blocks.of_queries(q_BHSC), blocks.of_keys(k_BKNC), blocks.of_keys(v_BKNC)
    grad, out = blocks.of_queries(cotangent), blocks.of_queries(out_BHSC)
    # The part of the gradient of the logits that comes from the softmax's denominator.
    shared = jnp.sum(grad.astype(jnp.float32) * out.astype(jnp.float32), axis=-1)

    def step(carry: _Three, pair: Array) -> tuple[_Three, None]:
        i, j = pair
        logits, slope = _capped(_product("bkqc,bknc->bkqn", q[i], k[j], dtype), cap)
        logits = jnp.where(blocks.seen(pair), logits, -jnp.inf)
        weights = jnp.exp(logits - log_total[i][..., None])
        of_weights = _product("bkqc,bknc->bkqn", grad[i], v[j], dtype)
        of_logits = weights * (of_weights - shared[i][..., None]) * slope
        of_q = _product("bkqn,bknc->bkqc", of_logits, k[j], dtype)
        of_k = _product("bkqn,bkqc->bknc", of_logits, q[i], dtype)
        of_v = _product("bkqn,bkqc->bknc", weights, grad[i], dtype)
        in_q, in_k, in_v = carry
        return (in_q.at[i].add(of_q), in_k.at[j].add(of_k), in_v.at[j].add(of_v)), None

    zeros = lambda x: jnp.zeros_like(x, jnp.float32)
    (of_q, of_k, of_v), _ = jax.lax.scan(step, (zeros(q), zeros(k), zeros(v)), blocks.pairs)
    to = lambda x, like: x.astype(like.dtype)
    return (
        to(blocks.from_queries(of_q), q_BHSC),
        to(blocks.from_keys(of_k), k_BKNC),
        to(blocks.from_keys(of_v), v_BKNC),
        None,
    )


blockwise_attention.defvjp(_forward, _backward)


class _Blocks:
    """Arrays of queries and of keys in blocks, and the pairs of blocks within reach."""

    def __init__(self, visible: Visible, group: int) -> None:
        """Divide positions and slots; `group` query heads share a key head."""
        _, S, N = visible.shape
        self.visible, self.group, self.length, self.slots = visible, group, S, N
        self.pairs = jnp.asarray(_pairs(visible), jnp.int32)
        self.ids_q = _split(visible.queries, QUERIES)
        self.ids_k = _split(visible.keys, KEYS, fill=PADDING)
        self.at_q = _split(visible.slots[None], QUERIES)

    def of_queries(self, x_BHSC: Array) -> Array:
        """Return `[B, H, S, C]` as `[blocks, B, K, group * QUERIES, C]`."""
        B, H, _, C = x_BHSC.shape
        x = _split(x_BHSC, QUERIES, axis=2).reshape(-1, B, H // self.group, self.group * QUERIES, C)
        return constrain(x, None, BATCH, "tensor")

    def from_queries(self, x: Array) -> Array:
        """Undo `of_queries`."""
        n, B, K, _, C = x.shape
        return _join(x.reshape(n, B, K * self.group, QUERIES, C), axis=2)[:, :, : self.length]

    def of_keys(self, x_BKNC: Array) -> Array:
        """Return `[B, K, N, C]` as `[blocks, B, K, KEYS, C]`."""
        return constrain(_split(x_BKNC, KEYS, axis=2), None, BATCH, "tensor")

    def from_keys(self, x: Array) -> Array:
        """Undo `of_keys`."""
        return _join(x, axis=2)[:, :, : self.slots]

    def seen(self, pair: Array) -> Array:
        """Return which keys the queries of two blocks see, `[B, 1, group * QUERIES, KEYS]`."""
        i, j = pair
        ago = self.at_q[i][0, :, None] - (j * KEYS + jnp.arange(KEYS))[None]
        keys = self.ids_k[j][:, None]
        seen = (self.ids_q[i][:, :, None] == keys) & (keys != PADDING)
        seen = seen & in_reach(ago, self.visible.window, self.visible.causal)[None]
        return jnp.tile(seen, (1, self.group, 1))[:, None]


def _pairs(visible: Visible) -> np.ndarray:
    """Return the numbers `[n, 2]` of the blocks of queries and of keys that are within reach."""
    _, S, N = visible.shape
    i, j = np.mgrid[: -(-S // QUERIES), : -(-N // KEYS)].reshape(2, -1)
    if visible.start is not None:
        return np.stack([i, j], axis=1)  # It is not known which blocks are in reach.
    first = visible.offset + i * QUERIES
    last = np.minimum(first + QUERIES, visible.offset + S) - 1
    least, most = first - np.minimum(j * KEYS + KEYS, N) + 1, last - j * KEYS  # slots ago
    reach = most >= 0 if visible.causal else np.ones(len(i), bool)
    if visible.window is not None:
        reach = reach & (least < visible.window) & (most > -visible.window)
    return np.stack([i, j], axis=1)[reach]


def _split(x: Array, size: int, axis: int = 1, fill: int = 0) -> Array:
    """Return blocks of an axis, stacked in front; the last one is filled up."""
    count = -(-x.shape[axis] // size)
    pad = [(0, 0)] * x.ndim
    pad[axis] = (0, count * size - x.shape[axis])
    x = jnp.pad(x, pad, constant_values=fill)
    return jnp.moveaxis(x.reshape(*x.shape[:axis], count, size, *x.shape[axis + 1 :]), axis, 0)


def _join(x: Array, axis: int) -> Array:
    """Undo `_split` of an axis, without removing what fills the last block."""
    x = jnp.moveaxis(x, 0, axis)
    return x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])


def _product(spec: str, a: Array, b: Array, dtype: DTypeLike) -> Array:
    """Round both arrays to `dtype`, and return their einsum in float32."""
    return jnp.einsum(
        spec, round_to(a, dtype), round_to(b, dtype), preferred_element_type=jnp.float32
    )


def _capped(logits: Array, cap: float | None) -> tuple[Array, Array | float]:
    """Return logits after the soft cap, and their derivatives with respect to those before."""
    if cap is None:
        return logits, 1.0
    share = jnp.tanh(logits / cap)
    return cap * share, 1 - share * share
