"""Count the arithmetic of matrix products in a traced function.

The count is exact for the traced program, with its loops and the recomputation of activations.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.extend.core import Jaxpr, JaxprEqn, Literal, Var, jaxprs_in_params


def matmul_flops(
    function: Callable[..., Any], *args: Any, while_trips: int = 1, **kwargs: Any
) -> int:
    """Count the floating-point operations of all matrix products in one call of `function`.

    A multiply-add is two operations. Of the branches of a `cond`, the most expensive one counts.

    Args:
      function: a function that JAX can trace; it is not run.
      args: its positional arguments, as arrays or `jax.ShapeDtypeStruct`.
      while_trips: how often to count the body of a `while_loop`, whose number of steps is not in
        the trace. The length of a `scan` is.
      kwargs: its keyword arguments.

    Example:
      >>> import jax.numpy as jnp
      >>> matmul_flops(lambda a, b: a @ b, jnp.ones((2, 3)), jnp.ones((3, 5)))
      60
    """
    return jaxpr_flops(jax.make_jaxpr(function)(*args, **kwargs).jaxpr, while_trips)


def jaxpr_flops(jaxpr: Jaxpr, while_trips: int = 1) -> int:
    """Count the floating-point operations of all matrix products in a jaxpr, as `matmul_flops`."""
    total = 0
    for eqn in jaxpr.eqns:
        parts = [jaxpr_flops(part, while_trips) for part in jaxprs_in_params(eqn.params)]
        match eqn.primitive.name:
            case "dot_general":
                (contracted, _), _ = eqn.params["dimension_numbers"]
                depth = math.prod(_shape(eqn.invars[0])[i] for i in contracted)
                total += 2 * math.prod(_shape(eqn.outvars[0])) * depth
            case "cond":
                total += max(parts)
            case "scan":
                total += eqn.params["length"] * sum(parts)
            case "while":
                total += while_trips * sum(parts)
            case "shard_map":
                total += _mapped_devices(eqn) * sum(parts)
            case _:
                total += sum(parts)
    return total


def matmul_eqns(jaxpr: Jaxpr) -> Iterator[JaxprEqn]:
    """Yield the equations of a jaxpr that are matrix products, each once however often it runs."""
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            yield eqn
        for part in jaxprs_in_params(eqn.params):
            yield from matmul_eqns(part)


def _shape(x: Var | Literal) -> tuple[int, ...]:
    """Return the shape of an operand or result of a matrix product, which is always an array."""
    assert isinstance(x.aval, jax.core.ShapedArray)
    return x.aval.shape


def _mapped_devices(eqn: JaxprEqn) -> int:
    """Return over how many devices a `shard_map` spreads its body."""
    # The parameter has another name in older releases of JAX.
    name = "newly_manual_axes" if "newly_manual_axes" in eqn.params else "manual_axes"
    return math.prod(eqn.params["mesh"].shape[axis] for axis in eqn.params[name])
