"""Checks that the tests of every numeric module share: transformations, devices, and what stands under the mask."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, PartitionSpec

DEVICES = 8


def assert_jit_and_vmap_agree(
    function: Callable, *arrays, rtol: float = 1e-5, atol: float = 1e-6
) -> None:
    """`function` gives the same plainly, compiled, and mapped over a new leading axis (of the arrays and their rows reversed)."""
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=atol)
    arrays = tuple(jnp.asarray(x) for x in arrays)
    reversed_rows = tuple(x[::-1] for x in arrays)
    compiled = jax.jit(function)
    plain = [function(*arrays), compiled(*reversed_rows)]
    jax.tree.map(close, compiled(*arrays), plain[0])
    mapped = jax.jit(jax.vmap(function))(
        *(jnp.stack(pair) for pair in zip(arrays, reversed_rows, strict=True))
    )
    jax.tree.map(close, mapped, jax.tree.map(lambda *xs: jnp.stack(xs), *plain))


def on_devices(how: str, function: Callable, *arrays):
    """Runs `function` on 8 pieces of the arrays' rows, with the axis "devices" between them; the results have a leading 8."""
    pieces = [jnp.asarray(x).reshape(DEVICES, -1, *x.shape[1:]) for x in arrays]
    if how == "vmap":
        return jax.vmap(function, axis_name="devices")(*pieces)
    if how == "pmap":
        return jax.pmap(function, axis_name="devices")(*pieces)
    assert how == "shard_map", how
    mesh = jax.make_mesh((DEVICES,), ("devices",), axis_types=(AxisType.Auto,))
    spec = PartitionSpec("devices")
    one = lambda *xs: jax.tree.map(lambda y: y[None], function(*(x[0] for x in xs)))
    return jax.jit(jax.shard_map(one, mesh=mesh, in_specs=spec, out_specs=spec))(*pieces)


HOW = ("vmap", "pmap", "shard_map")


def assert_blind_under_mask(function: Callable, arrays: tuple, mask) -> None:
    """Whatever stands outside `mask` in any of the arrays: same value, same gradient, and no gradient there.

    The value must be free of NaN, and so must the gradient: a NaN that the forward pass drops comes back through the chain rule
    as `0 · NaN` unless it is replaced *before* the arithmetic.
    """
    mask = np.asarray(mask)
    run = jax.jit(jax.value_and_grad(function, argnums=tuple(range(len(arrays)))))
    fill = lambda what: tuple(jnp.asarray(np.where(mask, x, np.float32(what))) for x in arrays)
    value, gradients = run(*fill(0))
    assert np.isfinite(value)
    for what in (1e6, np.inf, np.nan):
        value_now, gradients_now = run(*fill(what))
        np.testing.assert_array_equal(value_now, value)
        for now, before in zip(gradients_now, gradients, strict=True):
            np.testing.assert_array_equal(now, before)
            np.testing.assert_array_equal(np.asarray(now)[~mask], 0)
