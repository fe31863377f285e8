"""Split a batch into parts that are computed one after the other."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.custom_batching import custom_vmap

from ppo_jax.sharding import constrain_rows, row_shards


def split_rows(tree: Any, parts: int) -> Any:
    """Reshape `[B, ...]` arrays to `[parts, B / parts, ...]`.

    Part `i` holds rows `i, i + parts, i + 2 * parts, ...`. If the batch is sharded over devices in
    contiguous blocks of rows, each part then has rows on all devices.

    Args:
      tree: pytree of `[B, ...]` arrays.
      parts: number of parts; it must divide `B`.

    Returns:
      The same pytree, with arrays of shape `[parts, B / parts, ...]`.

    Example:
      >>> split_rows(jnp.arange(4), 2)
      Array([[0, 2],
             [1, 3]], dtype=int32)
    """
    return jax.tree.map(
        lambda x: jnp.moveaxis(x.reshape(x.shape[0] // parts, parts, *x.shape[1:]), 1, 0), tree
    )


def map_rows(function: Callable[[Any], Any], tree: Any, size: int | None) -> Any:
    """Apply a function to `size` rows at a time and return its results in the order of the rows.

    Args:
      function: maps a pytree of `[size, ...]` arrays to another, and treats each row independently.
      tree: pytree of `[B, ...]` arrays.
      size: number of rows at a time. `None`, or `B` and more (which happens where a device holds
        only a share of the batch), calls `function` once.

    Returns:
      What `function(tree)` would return.
    """
    count = len(jax.tree.leaves(tree)[0])
    if size is None or size >= count:
        return function(tree)
    parts = jax.lax.map(function, split_rows(tree, count // size))
    return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1).reshape(-1, *x.shape[2:]), parts)


def map_chosen(function: Callable[..., Any], chosen: Array, *arrays: Array, size: int) -> Any:
    """Call a function on the chosen entries of arrays, `size` at a time, and not on the others.

    Args:
      function: maps arrays `[size, ...]` to a pytree of arrays `[size]`, each entry by itself.
      chosen: `[N]` bool.
      *arrays: `[N, ...]` arrays.
      size: number of entries at a time on each device that rows are sharded over.

    Returns:
      The results, `[N]`; 0 where `chosen` is false.

    Example:
      >>> x = jnp.array([1.0, 2.0, 3.0, 4.0])
      >>> map_chosen(jnp.sqrt, x > 2, x, size=2).round(2)
      Array([0.  , 0.  , 1.73, 2.  ], dtype=float32)
    """
    size = size * row_shards()
    parts = -(-len(chosen) // size)
    order = jnp.argsort(~chosen, stable=True)
    order = jnp.pad(order, (0, parts * size - len(chosen))).reshape(parts, size)
    total = jnp.sum(chosen)
    most = _largest_mapped(total)

    def part(inputs: tuple[Array, Array]) -> Any:
        begin, rows = inputs
        taken = constrain_rows(tuple(x[rows] for x in arrays))
        shapes = jax.eval_shape(function, *taken)
        # Computed from `chosen`, so that a `shard_map` takes it to differ between shards as well.
        zero = 0 * total
        none = lambda *_: jax.tree.map(lambda x: jnp.full(x.shape, zero, x.dtype), shapes)
        return jax.lax.cond(begin < most, function, none, *taken)

    out = jax.lax.map(part, (size * jnp.arange(parts), order))
    rank = jnp.maximum(jnp.cumsum(chosen) - 1, 0)
    return jax.tree.map(lambda x: jnp.where(chosen, x.reshape(-1)[rank], 0), out)


@custom_vmap
def _largest_mapped(x: Array) -> Array:
    """Return a number, or its largest value over an axis that `jax.vmap` maps.

    A `cond` on the result stays one under `jax.vmap`, which would compute both branches if the
    condition differed from one mapped value to another.
    """
    return x


@_largest_mapped.def_vmap
def _(axis_size: int, in_batched: list[bool], x: Array) -> tuple[Array, bool]:
    return x.max(axis=0), False
