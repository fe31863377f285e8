"""Attention by the splash kernel of JAX, which is written in Pallas for TPUs."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental.pallas.ops.tpu import splash_attention as splash
from jax.sharding import AxisType, PartitionSpec

from ppo_jax.models.visible import PADDING, Visible
from ppo_jax.sharding import BATCH, automatic_mesh, fit

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


def on_shards(
    function: Callable[..., Array], arrays: tuple[Array, ...], rows: tuple[Array, ...]
) -> Array:
    """Call a function on each shard of the rows and heads of arrays.

    This is for kernels that the compiler cannot split over the devices of a mesh by itself.

    Args:
      function: called with the shards of `arrays` and `rows`; it returns an array `[B, H, ...]`.
      arrays: arrays `[B, heads, ...]`. Heads are split if the numbers of heads of all of them can
        be divided by the size of the mesh axis `tensor`.
      rows: arrays `[B, ...]`.

    Returns:
      The result for all rows and heads, `[B, H, ...]`.
    """
    mesh = automatic_mesh()
    if mesh is None:
        return function(*arrays, *rows)
    by_rows = fit((BATCH,), rows[0].shape, mesh)
    heads = {fit(("tensor",), x.shape[1:2], mesh)[0] for x in arrays}
    by_heads = PartitionSpec(*by_rows, heads.pop() if len(heads) == 1 else None)
    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
    return jax.shard_map(
        function,
        mesh=mesh,
        in_specs=(*(by_heads for _ in arrays), *(by_rows for _ in rows)),
        out_specs=by_heads,
        axis_names={name for name, kind in kinds if kind is AxisType.Auto},
        check_vma=False,  # A kernel does not say over which axes its results vary.
    )(*arrays, *rows)
