"""Arithmetic of matrix products in a function, counted in its jaxpr: exact, loops and recomputation included."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr


def matmul_flops(function: Callable, *args: Any, while_trips: int = 1, **more: Any) -> int:
    """Floating-point operations of all matrix products in one call of `function`, two for each multiply-add.

    Args:
      function: traced, not run.
      args, more: its arguments; shapes suffice (`jax.ShapeDtypeStruct`).
      while_trips: how often the body of a `while_loop` runs; a scan says so itself.

    Example:
      >>> import jax.numpy as jnp
      >>> matmul_flops(lambda a, b: a @ b, jnp.ones((2, 3)), jnp.ones((3, 5)))
      60
    """
    return _count(
        jax.make_jaxpr(lambda args, more: function(*args, **more))(args, more).jaxpr, while_trips
    )


def _count(jaxpr: Jaxpr, trips: int) -> int:
    total = 0
    for eqn in jaxpr.eqns:
        name = eqn.primitive.name
        if name == "dot_general":
            (contracted, _), _ = eqn.params["dimension_numbers"]
            depth = math.prod(eqn.invars[0].aval.shape[i] for i in contracted)
            total += 2 * math.prod(eqn.outvars[0].aval.shape) * depth
            continue
        inner = [_count(part, trips) for part in _parts(eqn.params)]
        times = (
            {"scan": eqn.params.get("length", 1), "while": trips}.get(name, 1)
            if name != "shard_map"
            else _devices(eqn)
        )
        total += times * (max(inner, default=0) if name == "cond" else sum(inner))
    return total


def products(jaxpr: Jaxpr) -> Iterator[Any]:
    """The matrix products that a jaxpr holds, each once however often it runs."""
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            yield eqn
        for part in _parts(eqn.params):
            yield from products(part)


def _devices(eqn: Any) -> int:
    """Over how many devices a `shard_map` spreads its body."""
    axes = eqn.params[
        "newly_manual_axes" if "newly_manual_axes" in eqn.params else "manual_axes"
    ]  # the newer JAX, the older
    return math.prod(eqn.params["mesh"].shape[axis] for axis in axes)


def _parts(params: dict[str, Any]) -> Iterator[Jaxpr]:
    for value in params.values():
        for part in value if isinstance(value, tuple | list) else (value,):
            if isinstance(part, ClosedJaxpr):
                yield part.jaxpr
            elif isinstance(part, Jaxpr):
                yield part
