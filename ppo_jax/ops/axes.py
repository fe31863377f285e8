"""Sums over a mapped axis (of `vmap`, `pmap` or `shard_map`) with the gradient of the whole batch.

A loss that is averaged over shards is one number, which every shard holds. With `jax.lax.psum`
alone its gradient would be right under `shard_map`, which knows that the shards hold the same
number, and too large by the number of shards under `vmap`, `pmap` and `shard_map` with
`check_vma=False`, which do not. The functions here give the same gradient under all of them.
"""

from functools import partial
from typing import TypeVar

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import AxisType

from ppo_jax.types import AxisName

Tree = TypeVar("Tree")


def separate(tree: Tree, axis_name: AxisName | None) -> Tree:
    """Give each shard its own copy of arrays that all shards hold, without linking the gradients.

    Under a checked `shard_map`, the gradient with respect to an array that all shards hold is
    already summed over the shards. With respect to the copy it is that of the shard alone, as it
    always is under `vmap` and `pmap`.

    Args:
      tree: a pytree of arrays.
      axis_name: the mapped axis or axes; None if there is none, and nothing to do.

    Returns:
      The same values.

    Example:
      >>> jax.vmap(lambda x: separate(x, "shards"), axis_name="shards")(jnp.arange(3))
      Array([0, 1, 2], dtype=int32)
    """
    if axis_name is None:
        return tree
    mesh = jax.sharding.get_abstract_mesh()
    kinds = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    names = (axis_name,) if isinstance(axis_name, str) else axis_name
    manual = tuple(name for name in names if kinds.get(name) is AxisType.Manual)
    if not manual:
        return tree  # Under `vmap`, a copy would cost a TPU another layout of embedding tables.
    # Choosing by the index of the shard changes no value, but JAX then takes the result to differ
    # from shard to shard.
    here = jax.lax.axis_index(manual) >= 0
    return jax.tree.map(lambda x: jnp.where(here, x, x), tree)


def sum_shards(x: Array, axis_name: AxisName | None) -> Array:
    """Sum an array over the shards. The gradient counts the sum, which all shards hold, once.

    Args:
      x: an array of each shard.
      axis_name: the mapped axis or axes; None if there is none, and nothing to do.

    Returns:
      The sum, of the shape of `x`, equal on all shards.

    Example:
      >>> square = lambda x: sum_shards(x**2, "shards")
      >>> jax.vmap(jax.grad(square), axis_name="shards")(jnp.array([1.0, 2.0]))
      Array([2., 4.], dtype=float32)
    """
    return x if axis_name is None else _sum(separate(x, axis_name), axis_name)


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def _sum(x: Array, axis_name: AxisName) -> Array:
    return jax.lax.psum(x, axis_name)


def _sum_forward(x: Array, axis_name: AxisName) -> tuple[Array, None]:
    return jax.lax.psum(x, axis_name), None


def _sum_backward(axis_name: AxisName, _: None, cotangent: Array) -> tuple[Array]:
    return (separate(cotangent, axis_name),)


_sum.defvjp(_sum_forward, _sum_backward)


def share(x: Array, axis_name: AxisName | None) -> Array:
    """Use a number that all shards hold, such as a `sum_shards`, together with the rows of each.

    The gradient of the result is summed over the shards, because all of them depend on `x`.

    Args:
      x: an array that is equal on all shards.
      axis_name: the mapped axis or axes; None if there is none, and nothing to do.

    Returns:
      The same values.

    Example:
      >>> centred = lambda x: x - share(sum_shards(x, "shards") / 2, "shards")
      >>> jax.vmap(jax.grad(centred), axis_name="shards")(jnp.array([1.0, 2.0]))
      Array([0., 0.], dtype=float32)
    """
    return x if axis_name is None else _share(x, axis_name)


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def _share(x: Array, axis_name: AxisName) -> Array:
    return separate(x, axis_name)


def _share_forward(x: Array, axis_name: AxisName) -> tuple[Array, None]:
    return separate(x, axis_name), None


def _share_backward(axis_name: AxisName, _: None, cotangent: Array) -> tuple[Array]:
    return (jax.lax.psum(cotangent, axis_name),)


_share.defvjp(_share_forward, _share_backward)
