"""Split a batch into parts that are computed one after the other, to bound memory."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


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
