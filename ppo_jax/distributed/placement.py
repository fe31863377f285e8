"""Arrays between the host and the devices of a mesh."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding

from ppo_jax.sharding import put, rows_sharding, shardings


def place(tree: Any, mesh: Mesh | None) -> Any:
    """Parameters, or a whole `PPOState`, where the rules of `models.sharding` want them."""
    if mesh is None:
        return tree
    return (jax.device_put if jax.process_count() == 1 else _put_everywhere)(
        tree, shardings(tree, mesh)
    )


def _put_everywhere(tree: Any, where: Any) -> Any:
    """`jax.device_put`, which in several processes takes neither keys nor arrays that each process has for itself."""

    def one(x: Any, sharding: NamedSharding) -> jax.Array:
        if isinstance(x, jax.Array) and not x.is_fully_addressable:
            return x if x.sharding == sharding else jax.jit(lambda x: x, out_shardings=sharding)(x)
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            return jax.random.wrap_key_data(put(np.asarray(jax.random.key_data(x)), sharding))
        return put(np.asarray(x), sharding)

    return jax.tree.map(one, tree, where)


def rows_here(mesh: Mesh | None, rows: int) -> np.ndarray:
    """Numbers of those rows of a batch that lie on this process's devices."""
    if mesh is None:
        return np.arange(rows)
    spread = rows_sharding(mesh).addressable_devices_indices_map((rows,))
    return np.unique(np.concatenate([np.arange(rows)[index[0]] for index in spread.values()]))


def to_mesh(tree: Any, mesh: Mesh | None) -> Any:
    """Host arrays `[B, ...]`, spread by rows; a process reads the rows that it holds."""
    if mesh is None:
        return tree
    spread = lambda x: jax.make_array_from_callback(
        x.shape, rows_sharding(mesh), lambda index: x[index]
    )
    return jax.tree.map(spread, tree)


def to_host(tree: Any, *, everywhere: bool = True) -> Any:
    """Numpy arrays, whole in every process, or in the first alone; the others then hold one at a time, and get None for each."""
    keep = everywhere or jax.process_index() == 0

    def whole(x: Any) -> Any:
        spread = isinstance(x, jax.Array) and not (x.is_fully_addressable or x.is_fully_replicated)
        x = multihost_utils.process_allgather(x, tiled=True) if spread else x
        return x if keep else None

    return jax.device_get(jax.tree.map(whole, tree))


def join_rows_here(tree: Any, mesh: Mesh | None, rows: int) -> Any:
    """Host arrays of this process's rows to those of all `rows` rows, in every process."""
    if jax.process_count() == 1:
        return tree
    numbers, parts = multihost_utils.process_allgather((rows_here(mesh, rows), tree))

    def join(x: np.ndarray) -> np.ndarray:
        whole = np.zeros((rows, *x.shape[2:]), x.dtype)
        whole[numbers.reshape(-1)] = x.reshape(-1, *x.shape[2:])
        return whole

    return jax.tree.map(join, parts)
