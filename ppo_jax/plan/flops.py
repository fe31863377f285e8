"""Count the arithmetic of matrix products in a traced function.

The count is exact for the traced program and includes loops and recomputed activations.
"""

import math
import re
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.extend.core import Jaxpr, JaxprEqn, Literal, Var, jaxprs_in_params


def matmul_flops(function: Callable[..., Any], *args: Any, **kwargs: Any) -> int:
    """Count the floating-point operations of all matrix products in one call of `function`.

    A multiply-add is counted as two operations, and a `cond` as its most expensive branch. The
    traced program contains the number of iterations of a `scan`, but not of a `while_loop`. It is
    counted once, unless the scope that it is called in is named after the number, as in
    `jax.named_scope("trips=5")`. A Pallas kernel is counted for every step of its grid.

    Args:
      function: a function that JAX can trace; it is not run.
      args: its positional arguments, as arrays or `jax.ShapeDtypeStruct`.
      kwargs: its keyword arguments.

    Returns:
      The number of operations.

    Example:
      >>> import jax.numpy as jnp
      >>> matmul_flops(lambda a, b: a @ b, jnp.ones((2, 3)), jnp.ones((3, 5)))
      60
    """
    return jaxpr_flops(jax.make_jaxpr(function)(*args, **kwargs).jaxpr)


def jaxpr_flops(jaxpr: Jaxpr) -> int:
    """Count the floating-point operations of all matrix products in a jaxpr, as `matmul_flops`."""
    total = 0
    for eqn in jaxpr.eqns:
        parts = [jaxpr_flops(part) for part in jaxprs_in_params(eqn.params)]
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
                named = re.search(r"trips=(\d+)$", str(eqn.source_info.name_stack))
                total += (int(named.group(1)) if named else 1) * sum(parts)
            case "pallas_call":
                # Every step of the grid counts, those that the kernel skips included.
                total += math.prod(eqn.params["grid_mapping"].grid) * sum(parts)
            case "shard_map":
                total += _mapped_devices(eqn) * sum(parts)
            case _:
                total += sum(parts)
    return total


def matmul_eqns(jaxpr: Jaxpr) -> Iterator[JaxprEqn]:
    """Yield the matrix products of a jaxpr. One in the body of a loop is yielded once."""
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
    """Return the number of devices that each execute the body of a `shard_map`."""
    # The parameter has another name in older releases of JAX.
    name = "newly_manual_axes" if "newly_manual_axes" in eqn.params else "manual_axes"
    return math.prod(eqn.params["mesh"].shape[axis] for axis in eqn.params[name])
