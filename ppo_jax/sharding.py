"""Where each parameter and activation lies on a mesh of devices with the axes `data`, `fsdp` and `tensor`.

Rows of a batch are spread over `data` and `fsdp`. A parameter is cut over `fsdp` (each layer is gathered when it is used) and over
`tensor` (heads, and the MLP's width, are computed apart). An axis that does not divide a dimension leaves it whole.
"""

import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

AXES = ("data", "fsdp", "tensor")
BATCH = ("data", "fsdp")


class ShardRule(NamedTuple):
    """Axes of the dimensions of a parameter whose path ends in `path`, a regular expression."""

    path: str
    axes: tuple[str | None, ...]


# The decoder is the same for all families, so its table is too; parameters of an optimizer end in the same paths.
RULES = (
    ShardRule(r"(embedding|unembedding)", ("tensor", "fsdp")),
    ShardRule(r"(position|type)_embedding", (None, "fsdp")),
    ShardRule(
        r"(attn/(q|k|v)|mlp/(up|gate)|lm_dense|pooler|pre_classifier)/kernel", ("fsdp", "tensor")
    ),
    ShardRule(r"(attn/(q|k|v)|mlp/(up|gate)|lm_dense|pooler|pre_classifier)/bias", ("tensor",)),
    ShardRule(r"(attn/o|mlp/down)/kernel", ("tensor", "fsdp")),
    ShardRule(r"(attn/o|mlp/down)/bias", (None,)),
    ShardRule(
        r"(attn/(q|k|v)|mlp/(up|gate)|lm_dense|pooler|pre_classifier)/lora_a", ("fsdp", None)
    ),
    ShardRule(
        r"(attn/(q|k|v)|mlp/(up|gate)|lm_dense|pooler|pre_classifier)/lora_b", (None, "tensor")
    ),
    ShardRule(r"(attn/o|mlp/down)/lora_a", ("tensor", None)),
    ShardRule(r"(attn/o|mlp/down)/lora_b", (None, "fsdp")),
    ShardRule(r"\w*norm/(scale|bias)", (None,)),
    ShardRule(r"lm_bias", ("tensor",)),
    ShardRule(r"head/kernel", (None, None)),
    ShardRule(r"head/bias", (None,)),
)


def shardings(tree: Any, mesh: Any, rules: tuple[ShardRule, ...] = RULES) -> Any:
    """The sharding of each array of a tree: parameters, an optimizer's state, a whole `PPOState`. Scalars are everywhere.

    Args:
      tree: of anything with a `shape`.
      mesh: a `jax.sharding.Mesh` with the axes `AXES`.
      rules: the first whose path fits counts.

    Raises:
      ValueError: naming a parameter that no rule matches.

    Example:
      >>> mesh = jax.make_mesh((1, 1, 1), AXES, axis_types=(AxisType.Auto,) * 3)
      >>> tuple(shardings({"attn": {"q": {"kernel": jax.ShapeDtypeStruct((4, 6), "float32")}}}, mesh)["attn"]["q"]["kernel"].spec)
      ('fsdp', 'tensor')
    """

    def place(path: Any, x: Any) -> NamedSharding:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        return NamedSharding(
            mesh,
            PartitionSpec()
            if not x.shape
            else _fit(_axes_of(name, len(x.shape), rules), x.shape, mesh),
        )

    return jax.tree_util.tree_map_with_path(place, tree)


def placed(shapes: Any, mesh: Any) -> Any:
    """Shapes of parameters that say where each is to lie; as they are, without a mesh."""
    if mesh is None:
        return shapes
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        shapes,
        shardings(shapes, mesh),
    )


def put(x: np.ndarray, sharding: Any) -> jax.Array:
    """A host array onto its devices; each process reads the parts that lie on its own."""
    return (
        jax.device_put(x)
        if sharding is None
        else jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])
    )


def rows_sharding(mesh: Any) -> NamedSharding:
    """Of arrays whose first dimension is the rows of a batch."""
    return NamedSharding(mesh, PartitionSpec(BATCH))


def constrain(x: jax.Array, *axes: str | tuple[str, ...] | None) -> jax.Array:
    """Says how an array inside a compiled function lies on the mesh of `jax.set_mesh`; without one, nothing."""
    mesh = jax.sharding.get_abstract_mesh()
    if not _is_auto(mesh):
        return x
    return jax.lax.with_sharding_constraint(x, _fit(axes, x.shape, mesh))


def constrain_rows(tree: Any) -> Any:
    """`constrain` for arrays whose first dimension is the rows of a batch."""
    return jax.tree.map(lambda x: constrain(x, BATCH), tree)


def constrain_params(tree: Any) -> Any:
    """`constrain` by the rules, for parameters and gradients."""
    if not _is_auto(jax.sharding.get_abstract_mesh()):
        return tree

    def place(path: Any, x: jax.Array) -> jax.Array:
        return constrain(
            x, *_axes_of(jax.tree_util.keystr(path, simple=True, separator="/"), x.ndim, RULES)
        )

    return jax.tree_util.tree_map_with_path(place, tree)


def map_over_data(function: Callable, params: Any, rows: Any, *, parts: int) -> Any:
    """`function(params, rows, axis_name)` with the rows of each place on `data`; it sums over `parts` parts of them.

    What it returns must be the same everywhere, by its own reductions over `axis_name`: a sum over many parts is then reduced over
    `data` once, at its end, where the compiler would reduce each part. `fsdp` and `tensor` stay the compiler's, which scatters each
    part's gradient over `fsdp`: to keep it whole would undo what `fsdp` is for. Where nothing is to be gained, `axis_name` is None.
    """
    ours = _free_axes(jax.sharding.get_abstract_mesh())
    places, count = ours.get("data", 1), len(jax.tree.leaves(rows)[0])
    if places == 1 or (parts == 1 and any(ours.get(axis, 1) > 1 for axis in ("fsdp", "tensor"))):
        return function(params, rows, None)
    if count % (places * parts):
        raise ValueError(
            f"A minibatch of {count} rows does not divide into {parts} micro-batches on data={places}."
        )
    cut = jax.tree.map(
        lambda x: constrain(x.reshape(places, -1, *x.shape[1:]), "data", "fsdp"), rows
    )
    own = lambda rows: function(params, rows, "data")
    return jax.vmap(own, out_axes=None, axis_name="data", spmd_axis_name="data")(cut)


def _is_auto(mesh: Any) -> bool:
    return AxisType.Auto in mesh.axis_types


def _free_axes(mesh: Any) -> dict[str, int]:
    """Sizes of the axes that are the compiler's to use here."""
    named = zip(mesh.axis_names, mesh.axis_sizes, mesh.axis_types, strict=True)
    return {
        name: size for name, size, kind in named if kind is AxisType.Auto and not _is_mapped(name)
    }


def _is_mapped(axis: str) -> bool:
    """Whether the code that asks runs once for each place on an axis, so that its arrays have no dimension to lie there."""
    try:
        return jax.lax.axis_size(axis) > 0
    except NameError:
        return False


def _axes_of(name: str, rank: int, rules: tuple[ShardRule, ...]) -> tuple[str | None, ...]:
    for rule in rules:
        if re.fullmatch(rf"(.*/)?{rule.path}", name):
            if len(rule.axes) != rank:
                raise ValueError(
                    f"The sharding rule {rule.path!r} has {len(rule.axes)} axes; the parameter {name} has {rank}."
                )
            return rule.axes
    raise ValueError(
        f"No sharding rule matches the parameter {name}; add one to ppo_jax/models/sharding.py."
    )


def _fit(axes: tuple, shape: tuple[int, ...], mesh: Any) -> PartitionSpec:
    """Without the axes that the mesh does not have, that are mapped, and those that do not divide."""
    ours = _free_axes(mesh)
    fitted = []
    for axis, size in zip(axes, shape, strict=False):
        names = tuple(
            name for name in ((axis,) if isinstance(axis, str) else axis or ()) if name in ours
        )
        count = 1
        for name in names:
            count *= ours[name]
        fitted.append(None if not names or size % count else names if len(names) > 1 else names[0])
    return PartitionSpec(*fitted)
