"""Rules for sharding arrays over a mesh of devices with the axes `data`, `fsdp` and `tensor`.

The rows of a batch are sharded over `data` and `fsdp` together. Each parameter is sharded over
`fsdp` and gathered when its layer is computed, except while decoding, and over `tensor`, which
splits attention by heads and the MLP by its hidden width. An array dimension that is not divisible
by the size of its mesh axis stays replicated over that axis.

The table `sharding_rules.RULES` gives the mesh axes of every parameter.
"""

import math
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import numpy as np
from jax import Array
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec, Sharding

from ppo_jax.sharding_rules import RULES, Axes, ShardRule, axes_of
from ppo_jax.types import Params

AXES = ("data", "fsdp", "tensor")
"""Names of the mesh axes, in the order in which every mesh of this package has them."""

BATCH = ("data", "fsdp")
"""The mesh axes over which the rows of a batch are sharded."""

Tree = TypeVar("Tree")
Result = TypeVar("Result")


def shardings(tree: Any, mesh: Mesh | AbstractMesh, rules: tuple[ShardRule, ...] = RULES) -> Any:
    """Return the sharding of every array of a tree of parameters.

    The tree may also be an optimizer state or a whole `PPOState`. Scalars are replicated.

    Args:
      tree: a tree of arrays, or of anything else with a `shape`.
      mesh: a mesh with the axes `AXES`.
      rules: the rules; the first one that matches a parameter is used.

    Returns:
      A tree of `jax.sharding.NamedSharding` with the structure of `tree`.

    Raises:
      ValueError: if no rule matches a parameter, or the matching rule has another number of
        dimensions. The message names the parameter.

    Example:
      >>> mesh = AbstractMesh((1, 2, 2), AXES, axis_types=(AxisType.Auto,) * 3)
      >>> params = {"attn": {"q": {"kernel": jax.ShapeDtypeStruct((4, 6), "float32")}}}
      >>> shardings(params, mesh)["attn"]["q"]["kernel"].spec
      P('fsdp', 'tensor')
    """

    def sharding(path: tuple[Any, ...], x: Any) -> NamedSharding:
        axes = axes_of(path, len(x.shape), rules) if x.shape else ()
        return NamedSharding(mesh, fit(axes, x.shape, mesh))

    return jax.tree_util.tree_map_with_path(sharding, tree)


def placed(shapes: Any, mesh: Mesh | None) -> Any:
    """Add to each shape of a tree of parameters its sharding on a mesh.

    Args:
      shapes: a tree of `jax.ShapeDtypeStruct`, as from `jax.eval_shape`.
      mesh: a mesh with the axes `AXES`, or None.

    Returns:
      The tree with a sharding in every shape. Without a mesh, `shapes` itself.

    Raises:
      ValueError: if a parameter has no sharding rule, as in `shardings`.

    Example:
      >>> mesh = jax.make_mesh((1, 1, 1), AXES, axis_types=(AxisType.Auto,) * 3)
      >>> shapes = {"lm_bias": jax.ShapeDtypeStruct((8,), "float32")}
      >>> placed(shapes, mesh)["lm_bias"].sharding.spec
      P('tensor',)
    """
    if mesh is None:
        return shapes
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        shapes,
        shardings(shapes, mesh),
    )


def put(x: np.ndarray, sharding: Sharding | None) -> Array:
    """Copy a host array to the devices of a sharding.

    With several processes, each process copies only the shards of its own devices.

    Args:
      x: the whole array, the same in every process.
      sharding: the sharding of the result. None puts the array on the default device.

    Returns:
      The array on the devices.

    Example:
      >>> put(np.arange(3), None)
      Array([0, 1, 2], dtype=int32)
    """
    if sharding is None:
        return jax.device_put(x)
    return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])


def rows_sharding(mesh: Mesh | AbstractMesh) -> NamedSharding:
    """Return the sharding of arrays whose first dimension is the rows of a batch."""
    return NamedSharding(mesh, PartitionSpec(BATCH))


def constrain(x: Array, *axes: Any) -> Array:
    """Constrain the sharding of an array inside a compiled function.

    The constraint refers to the mesh of `jax.set_mesh`. Axes that the mesh does not have, that do
    not divide their dimension, or over which the code is already mapped by `jax.vmap`, `shard_map`
    or `pmap` are left out. Without a mesh this function does nothing.

    Args:
      x: the array.
      *axes: for each dimension, from the first on, an entry of `Axes`. Dimensions without an entry
        are not sharded.

    Returns:
      `x` with the constraint.

    Example:
      >>> mesh = jax.make_mesh((1, 1, 1), AXES, axis_types=(AxisType.Auto,) * 3)
      >>> with jax.set_mesh(mesh):
      ...     jax.jit(lambda x: constrain(2 * x, BATCH, "tensor"))(np.ones((2, 2), np.float32))
      Array([[2., 2.],
             [2., 2.]], dtype=float32)
    """
    mesh = automatic_mesh()
    return x if mesh is None else jax.lax.with_sharding_constraint(x, fit(axes, x.shape, mesh))


def constrain_rows(tree: Tree) -> Tree:
    """Constrain a tree of arrays whose first dimension is the rows of a batch."""
    return jax.tree.map(lambda x: constrain(x, BATCH), tree)


def constrain_params(tree: Tree, rules: tuple[ShardRule, ...] = RULES) -> Tree:
    """Constrain a tree of parameters or gradients by rules."""
    if automatic_mesh() is None:
        return tree
    return jax.tree_util.tree_map_with_path(
        lambda path, x: constrain(x, *axes_of(path, x.ndim, rules)), tree
    )


def gather_rows(x: Array) -> Array:
    """Gather rows `[B, D]` over `fsdp`, for a product with parameters laid by `DECODING_RULES`."""
    return constrain(x, "data", PartitionSpec.UNCONSTRAINED) if free_size("fsdp") > 1 else x


def split_features(x: Array, axes: Axes = ("tensor", "fsdp")) -> Array:
    """Shard the features `[B, F]` that such a product gives, so that its parameters stay.

    Args:
      x: the result of the product.
      axes: the mesh axes that shard the output of its kernel.

    Returns:
      `x` with the constraint.
    """
    return constrain(x, "data", axes) if free_size("fsdp") > 1 else x


def free_size(axis: str) -> int:
    """Return the size of a mesh axis at this point of a program, or 1 if it is not free."""
    return _free_axes(jax.sharding.get_abstract_mesh()).get(axis, 1)


def platform() -> str:
    """Return the platform of the mesh of `jax.set_mesh`, such as `tpu`, or else JAX's default."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


def row_shards(*counts: int) -> int:
    """Return how many devices the rows of a batch are sharded over at this point of a program.

    Args:
      *counts: numbers of rows. Rows whose number is not divisible are replicated, so the result is
        then 1.
    """
    free = _free_axes(jax.sharding.get_abstract_mesh())
    shards = math.prod(free.get(axis, 1) for axis in BATCH)
    return 1 if any(count % shards for count in counts) else shards


def map_over_data(
    function: Callable[[Params, Any, str | None], Result],
    params: Params,
    rows: Any,
    *,
    parts: int | None,
    split_result: bool = False,
) -> Result:
    """Call a function once for each shard of the rows over the mesh axis `data`.

    This is for a function that computes `parts` parts one after the other and sums them, such as
    the gradients of the micro-batches of a minibatch. It gives one all-reduce over `data` per
    minibatch, not one per micro-batch. The axes `fsdp` and `tensor` are left to the compiler, which
    reduce-scatters the gradient of each part over `fsdp`, to save the memory of a whole one.

    `function` is called once, with all rows and None as the axis name, if `data` has size 1 or is
    already mapped, or if there is one part and `fsdp` or `tensor` is larger than 1.

    Args:
      function: called as `function(params, rows, axis_name)`. It must reduce its results over
        `axis_name`, by `jax.lax.psum` for example, so that they are equal on all shards.
      params: passed whole to every call.
      rows: a tree of arrays whose first dimension is the rows of a batch.
      parts: how many parts `function` splits its rows into; None if that is data, not a shape.
      split_result: whether `function` returns rows, which are joined, instead of reduced results.

    Returns:
      What `function` returns.

    Raises:
      ValueError: if the number of rows is not a multiple of `parts` times the size of `data`.
    """
    free = _free_axes(jax.sharding.get_abstract_mesh())
    shards, count = free.get("data", 1), len(jax.tree.leaves(rows)[0])
    if shards == 1 or (parts == 1 and any(free.get(axis, 1) > 1 for axis in ("fsdp", "tensor"))):
        return function(params, rows, None)
    if count % (shards * (parts or 1)):
        raise ValueError(
            f"A batch of {count} rows does not divide into {parts or 1} micro-batches on"
            f" data={shards}; its rows must be a multiple of {shards * (parts or 1)}."
        )
    split = jax.tree.map(
        lambda x: constrain(x.reshape(shards, -1, *x.shape[1:]), "data", "fsdp"), rows
    )
    on_shard, out_axes = lambda rows: function(params, rows, "data"), 0 if split_result else None
    out = jax.vmap(on_shard, out_axes=out_axes, axis_name="data", spmd_axis_name="data")(split)
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), out) if split_result else out


def automatic_mesh() -> AbstractMesh | None:
    """Return the mesh of `jax.set_mesh` if the compiler chooses shardings on it, else None."""
    mesh = jax.sharding.get_abstract_mesh()
    return mesh if AxisType.Auto in mesh.axis_types else None


def _free_axes(mesh: Mesh | AbstractMesh) -> dict[str, int]:
    """Return the sizes of the mesh axes that a sharding constraint may use at this point."""
    axes = zip(mesh.axis_names, mesh.axis_sizes, mesh.axis_types, strict=True)
    return {
        name: size for name, size, kind in axes if kind is AxisType.Auto and not _is_mapped(name)
    }


def _is_mapped(axis: str) -> bool:
    """Return whether this code runs inside a `vmap`, `pmap` or `shard_map` over `axis`."""
    try:
        return jax.lax.axis_size(axis) > 0
    except NameError:
        return False


def fit(axes: Axes, shape: tuple[int, ...], mesh: Mesh | AbstractMesh) -> PartitionSpec:
    """Drop the axes that are not free on the mesh or do not divide their dimension."""
    free = _free_axes(mesh)
    fitted: list[Any] = []
    for axis, size in zip(axes, shape, strict=False):
        if axis is PartitionSpec.UNCONSTRAINED:
            fitted.append(axis)
            continue
        names = tuple(
            name for name in ((axis,) if isinstance(axis, str) else axis or ()) if name in free
        )
        fitted.append(None if size % math.prod(free[name] for name in names) else names)
    return PartitionSpec(*fitted)
