"""Attention by the splash kernel of JAX, which is written in Pallas for TPUs."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental.pallas.ops.tpu import splash_attention as splash

from ppo_jax.models.visible import PADDING, Visible
from ppo_jax.sharding import on_shards

_LANES, _BLOCK = 128, 512


def splash_attention(
    q_BHSC: Array,
    k_BKNC: Array,
    v_BKNC: Array,
    visible: Visible,
    cap: float | None,
    interpret: bool = False,
) -> Array:
    """Compute what `blockwise_attention` does, with the splash kernel.

    Under a mesh, every device attends with its own rows and heads.

    Args:
      q_BHSC: queries, scaled; `H / K` heads in a row share a key head.
      k_BKNC: keys.
      v_BKNC: values, whose dtype the result has.
      visible: the slots that each query attends to; its `start` must be None, because the kernel
        needs to know which blocks are within reach.
      cap: bound of the soft cap on the logits, or None.
      interpret: whether to run the kernel without a TPU, which is slow.

    Returns:
      The results `[B, H, S, C]`. Those of a query that sees no slot are arbitrary.
    """
    _, S, N = visible.shape
    block_q, block_k = (min(_BLOCK, -(-n // _LANES) * _LANES) for n in (S, N))
    queries, keys = -(-S // block_q) * block_q, -(-N // block_k) * block_k

    def attend(q_BHSC: Array, k_BKNC: Array, v_BKNC: Array, q_ids: Array, k_ids: Array) -> Array:
        kernel = _kernel(
            q_BHSC.shape[1],
            (queries, keys),
            (block_q, block_k),
            visible.offset,
            visible.window,
            visible.causal,
            cap,
            interpret,
        )
        return jax.vmap(kernel)(q_BHSC, k_BKNC, v_BKNC, splash.SegmentIds(q_ids, k_ids))

    along = lambda x, n: jnp.pad(x, ((0, 0), (0, 0), (0, n - x.shape[2]), (0, 0)))
    ids = lambda x, n: jnp.pad(x, ((0, 0), (0, n - x.shape[1])), constant_values=PADDING)
    out = on_shards(
        attend,
        (along(q_BHSC, queries), along(k_BKNC, keys), along(v_BKNC, keys)),
        (ids(visible.queries, queries), ids(visible.keys, keys)),
    )
    return out[:, :, :S]


def _kernel(
    heads: int,
    lengths: tuple[int, int],
    blocks: tuple[int, int],
    offset: int,
    window: int | None,
    causal: bool,
    cap: float | None,
    interpret: bool,
) -> Callable[..., Array]:
    """Return the kernel for one row of a batch."""
    before = None if window is None else window - 1
    local = splash.LocalMask(lengths, (before, 0 if causal else before), offset)
    mask = local if causal or window else splash.FullMask(lengths)
    q, k = blocks
    sizes = splash.BlockSizes(
        block_q=q,
        block_kv=k,
        # Packed sequences begin at multiples of this, and do not depend on where they lie.
        block_kv_compute=_LANES,
        block_q_dkv=q,
        block_kv_dkv=k,
        block_kv_dkv_compute=_LANES,
        block_q_dq=q,
        block_kv_dq=k,
    )
    return splash.make_splash_mha(
        splash.MultiHeadMask([mask] * heads),
        block_sizes=sizes,
        head_shards=1,
        q_seq_shards=1,
        attn_logits_soft_cap=cap,
        interpret=interpret,
    )
