"""Move arrays from the host to the devices of a mesh, and back.

Every function also works if there are several processes. Each process then holds only the rows of
the batch that are on its own devices; `local_rows` gives their numbers.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding

from ppo_jax.sharding import put, rows_sharding, shardings


def place(tree: Any, mesh: Mesh | None) -> Any:
    """Shard parameters, or a whole `PPOState`, over a mesh by the rules of `ppo_jax.sharding`.

    Args:
      tree: a pytree of arrays, the same in every process.
      mesh: the mesh; without one, `tree` is returned unchanged.

    Returns:
      The tree with arrays on the devices of the mesh.

    Raises:
      ValueError: if no sharding rule matches a parameter.
    """
    if mesh is None:
        return tree
    if jax.process_count() == 1:
        return jax.device_put(tree, shardings(tree, mesh))
    # In several processes `jax.device_put` takes neither typed keys nor process-local arrays.
    return jax.tree.map(_put_global, tree, shardings(tree, mesh))


def _put_global(x: Any, sharding: NamedSharding) -> Array:
    """Shard one array over the devices of all processes."""
    if isinstance(x, Array) and not x.is_fully_addressable:
        return x if x.sharding == sharding else jax.jit(lambda x: x, out_shardings=sharding)(x)
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        return jax.random.wrap_key_data(put(np.asarray(jax.random.key_data(x)), sharding))
    return put(np.asarray(x), sharding)


def local_rows(mesh: Mesh | None, rows: int) -> np.ndarray:
    """Return the numbers of the rows of a batch that are on the devices of this process.

    Args:
      mesh: the mesh, or None for one device, which has all rows.
      rows: number of rows of the whole batch.

    Returns:
      The numbers, `[n]` int64, in increasing order.
    """
    if mesh is None:
        return np.arange(rows)
    shards = rows_sharding(mesh).addressable_devices_indices_map((rows,))
    return np.unique(np.concatenate([np.arange(rows)[index] for index in shards.values()]))


def to_mesh(tree: Any, mesh: Mesh | None) -> Any:
    """Shard host arrays `[B, ...]` over a mesh by rows.

    Each process reads the rows of its own devices only. Without a mesh, `tree` is returned
    unchanged.
    """
    if mesh is None:
        return tree
    return jax.tree.map(lambda x: put(x, rows_sharding(mesh)), tree)


def to_host(tree: Any, *, everywhere: bool = True) -> Any:
    """Return the whole arrays of a tree as numpy arrays.

    Args:
      tree: a pytree of arrays, which may be sharded over several processes.
      everywhere: whether every process gets the arrays. If False, only the first process gets
        them, and the others get None for each array, so that they never hold more than one whole
        array.

    Returns:
      The tree with numpy arrays.
    """
    keep = everywhere or jax.process_index() == 0

    def gather(x: Any) -> Any:
        local = not isinstance(x, Array) or x.is_fully_addressable or x.is_fully_replicated
        x = x if local else multihost_utils.process_allgather(x, tiled=True)
        return x if keep else None

    return jax.device_get(jax.tree.map(gather, tree))


def gather_rows(tree: Any, mesh: Mesh | None, rows: int) -> Any:
    """Gather the rows that each process has into arrays of the whole batch, in every process.

    Args:
      tree: a pytree of numpy arrays whose rows are `local_rows(mesh, rows)`.
      mesh: the mesh.
      rows: number of rows of the whole batch.

    Returns:
      The tree with numpy arrays of `rows` rows.
    """
    if jax.process_count() == 1:
        return tree
    numbers, parts = multihost_utils.process_allgather((local_rows(mesh, rows), tree))

    def join(x: np.ndarray) -> np.ndarray:
        joined = np.zeros((rows, *x.shape[2:]), x.dtype)
        joined[numbers.reshape(-1)] = x.reshape(-1, *x.shape[2:])
        return joined

    return jax.tree.map(join, parts)
