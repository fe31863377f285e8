"""Arithmetic that gives the same bits in every compiled program.

PPO divides the probability of a token in a training pass by its probability in an earlier pass.
The two passes are two compiled programs, one of them under a gradient. By default a compiler keeps
some bfloat16 intermediates in float32, and not the same ones in both programs, so that the ratio of
a policy with itself would be off by several percent.

The points of rounding are therefore part of the model. Arithmetic between them is in float32, and
`round_to` marks them with `lax.reduce_precision`, which no compiler may remove. Matrix products
take rounded operands and accumulate in float32, in the gradient as well.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike


def round_to(x: Array, dtype: DTypeLike) -> Array:
    """Round float32 `x` to `dtype` at exactly this point of the program.

    The gradient is that of the identity.
    """
    return x if jnp.dtype(dtype) == jnp.float32 else _round(x, dtype)


@partial(jax.custom_jvp, nondiff_argnums=(1,))
def _round(x: Array, dtype: DTypeLike) -> Array:
    info = jnp.finfo(dtype)
    rounded = jax.lax.reduce_precision(x, exponent_bits=info.nexp, mantissa_bits=info.nmant)
    return rounded.astype(dtype)


@_round.defjvp
def _(dtype: DTypeLike, x: tuple[Array], tangent: tuple[Array]) -> tuple[Array, Array]:
    # By JAX's own rule, reduce_precision would be applied to the cotangent once more.
    return _round(*x, dtype), tangent[0].astype(dtype)


def product(spec: str, a: Array, b: Array) -> Array:
    """Return the `einsum` of `a`, and of `b` rounded to the type of `a`, in float32.

    Args:
      spec: subscripts of two operands. Each index of an operand must be in the result or in the
        other operand.
      a: the first operand, whose type is that of the products.
      b: the second operand, of the type of `a` or float32.
    """
    if a.dtype == jnp.float32:
        return jnp.einsum(spec, a, b, preferred_element_type=jnp.float32)
    return _rounded(spec, a, b)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _rounded(spec: str, a: Array, b: Array) -> Array:
    return jnp.einsum(spec, a, round_to(b, a.dtype), preferred_element_type=jnp.float32)


def _rounded_backward(spec: str, operands: tuple[Array, Array], out: Array) -> tuple[Array, Array]:
    """Round the cotangent `out` before the products of the gradient.

    JAX's own rule leaves it in float32, where products run at half the speed of a GPU or less.
    """
    (a, b), (left, right, result) = operands, spec.replace("->", ",").split(",")
    out, rounded = _cotangent(out, a.dtype), round_to(b, a.dtype)
    einsum = partial(jnp.einsum, preferred_element_type=jnp.float32)
    grad_a = einsum(f"{result},{right}->{left}", out, rounded)
    grad_b = einsum(f"{left},{result}->{right}", a, out)
    return grad_a.astype(a.dtype), grad_b.astype(b.dtype)


@partial(jax.jit, static_argnums=1)
def _cotangent(x: Array, dtype: DTypeLike) -> Array:
    """Round a cotangent, most of which are values of `dtype` that were widened to float32.

    A TPU's compiler removes a conversion there and back, but not `reduce_precision`, which takes as
    long as the product itself.
    """
    narrow = lambda x: x.astype(dtype)
    return jax.lax.platform_dependent(x, tpu=narrow, default=partial(round_to, dtype=dtype))


_rounded.defvjp(lambda spec, a, b: (_rounded(spec, a, b), (a, b)), _rounded_backward)


@jax.jit
def mean(x: Array) -> Array:
    """Return the mean of float32 `x` over the last axis, which is kept with size 1.

    XLA's CPU compiler changes the order of a sum when it fuses the sum with the operations before
    it. On a CPU the mean is therefore a matrix product, which is never fused, so that it has the
    same bits in every program.

    Example:
      >>> mean(jnp.array([[1.0, 3.0]]))
      Array([[2.]], dtype=float32)
    """
    share = 1 / x.shape[-1]
    by_product = lambda x: x @ jnp.full((x.shape[-1], 1), share, jnp.float32)
    # A division of the sum would be an operation of its own on a TPU.
    by_sum = lambda x: jnp.sum(x * share, axis=-1, keepdims=True)
    return jax.lax.platform_dependent(x, cpu=by_product, default=by_sum)
