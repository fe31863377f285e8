"""The parts of a block: linear layers, norms, rotary positions, attention, MLP.

Rounding. Old and new log-probs come from two compiled programs, a forward pass alone and one under a gradient. Left to
itself, a compiler keeps some bfloat16 intermediates in float32, and not the same ones in both programs; the ratio of a policy
with itself is then off by percents. So the points of rounding are part of the model: arithmetic runs in float32 between them,
and `round_to` marks them by `lax.reduce_precision`, which no compiler may drop. Matrix products take rounded operands and
accumulate in float32, in the gradient too.
"""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from ppo_jax.models.config import NormKind, TransformerConfig
from ppo_jax.sharding import BATCH, constrain
from ppo_jax.types import KVCache


def round_to(x: jax.Array, dtype: Any) -> jax.Array:
    """Rounds float32 `x` to `dtype`, at this very point of the program (see the top of this file); its gradient passes."""
    return x if jnp.dtype(dtype) == jnp.float32 else _round(x, dtype)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def _round(x: jax.Array, dtype: Any) -> jax.Array:
    info = jnp.finfo(dtype)
    return jax.lax.reduce_precision(x, exponent_bits=info.nexp, mantissa_bits=info.nmant).astype(
        dtype
    )


@_round.defjvp
def _(dtype: Any, x: tuple[jax.Array], tangent: tuple[jax.Array]) -> tuple[jax.Array, jax.Array]:
    return _round(*x, dtype), tangent[0].astype(
        dtype
    )  # without this rule the cotangent, rounded already, is rounded again


def product(spec: str, a: jax.Array, b: jax.Array) -> jax.Array:
    """`einsum` of `a` and of `b` rounded to the type of `a`, in float32; each index is in the result or in both."""
    return (
        jnp.einsum(spec, a, b, preferred_element_type=jnp.float32)
        if a.dtype == jnp.float32
        else _rounded(spec, a, b)
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _rounded(spec: str, a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.einsum(spec, a, round_to(b, a.dtype), preferred_element_type=jnp.float32)


def _rounded_backward(
    spec: str, operands: tuple[jax.Array, jax.Array], out: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """JAX's own rule would multiply the float32 cotangent as it is, in products that run at half the speed of a GPU or less."""
    (a, b), (left, right, result) = operands, spec.replace("->", ",").split(",")
    out, rounded = round_to(out, a.dtype), round_to(b, a.dtype)
    grad_a = jnp.einsum(
        f"{result},{right}->{left}", out, rounded, preferred_element_type=jnp.float32
    )
    grad_b = jnp.einsum(f"{left},{result}->{right}", a, out, preferred_element_type=jnp.float32)
    return grad_a.astype(a.dtype), grad_b.astype(b.dtype)


_rounded.defvjp(lambda spec, a, b: (_rounded(spec, a, b), (a, b)), _rounded_backward)


class Linear(nn.Module):
    """`x W + b`, and `+ s (x A) B` where the parameters hold a low-rank part (see `models.lora`).

    Rows are flattened first: XLA's CPU compiler is slow at weight gradients that contract two axes.
    """

    features: int
    config: TransformerConfig
    use_bias: bool = True
    init_std: float | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        c = self.config
        init = nn.initializers.normal(c.init_std if self.init_std is None else self.init_std)
        kernel = self.param("kernel", init, (x.shape[-1], self.features))
        rows = x.reshape(-1, x.shape[-1])
        out = product("nd,dv->nv", rows, kernel)
        if self.use_bias:
            out = out + self.param("bias", nn.initializers.zeros, (self.features,))[None, :]
        if self.has_variable("params", "lora_a"):
            down = round_to(
                product("nd,dv->nv", rows, self.get_variable("params", "lora_a")), c.dtype
            )
            out = out + c.lora_scale * product(
                "nd,dv->nv", down, self.get_variable("params", "lora_b")
            )
        return round_to(out, c.dtype).reshape(*x.shape[:-1], self.features)


@jax.jit
def mean(x: jax.Array) -> jax.Array:
    """Over the last axis, which stays, of float32.

    XLA's CPU compiler adds in another order where it fuses the sum with what comes before it. So a matrix product, which fuses with
    nothing, adds there: the same bits in every program.

    Example:
      >>> mean(jnp.array([[1.0, 3.0]]))
      Array([[2.]], dtype=float32)
    """
    by_product = lambda x: x @ jnp.full((x.shape[-1], 1), 1 / x.shape[-1], jnp.float32)
    return jax.lax.platform_dependent(
        x, cpu=by_product, default=functools.partial(jnp.mean, axis=-1, keepdims=True)
    )


class Norm(nn.Module):
    """Over the last axis, in float32."""

    config: TransformerConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        kind, over = self.config.norm, (1,) * (x.ndim - 1) + (-1,)
        first = nn.initializers.zeros if kind is NormKind.RMS_PLUS_1 else nn.initializers.ones
        scale = self.param("scale", first, (x.shape[-1],)).reshape(over)
        x = x.astype(jnp.float32)
        if kind is NormKind.LAYER:
            x = x - mean(x)
        x = x * jax.lax.rsqrt(mean(x * x) + self.config.norm_eps)
        x = x * (1 + scale if kind is NormKind.RMS_PLUS_1 else scale)
        if kind is NormKind.LAYER:
            x = x + self.param("bias", nn.initializers.zeros, (x.shape[-1],)).reshape(over)
        return round_to(x, self.config.dtype)


def rotate(x: jax.Array, angles: jax.Array) -> jax.Array:
    """Turns each pair `(x_i, x_{i + W/2})` of a head by its angle: `x [B, H, S, C]` float32, `angles [B, S, W/2]`, `W <= C`."""
    cos, sin = jnp.cos(angles)[:, None], jnp.sin(angles)[:, None]
    half = angles.shape[-1]
    a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin, rest], axis=-1)


def last_positions(x: jax.Array, count: int) -> jax.Array:
    """`[B, S, ...]` to `[B, count, ...]`."""
    return x if count == x.shape[1] else x[:, x.shape[1] - count :]


def soft_cap(x: jax.Array, cap: float | None) -> jax.Array:
    """`cap · tanh(x / cap)`."""
    return x if cap is None else cap * jnp.tanh(x / cap)


class Attention(nn.Module):
    """`K` key/value heads, each of which serves `H / K` query heads."""

    config: TransformerConfig
    layer: int

    @nn.compact
    def __call__(
        self,
        x_BSD: jax.Array,
        allowed_BSN: jax.Array,
        angles: jax.Array | None,
        cache: KVCache | None,
    ):
        """Attends from the last S of the new positions to N slots; gives the output and this layer's keys and values."""
        c = self.config
        B, S = allowed_BSN.shape[:2]
        H, K, C = c.heads, c.key_heads, c.head_width

        def heads(name: str, count: int, x: jax.Array) -> jax.Array:
            x = Linear(count * C, c, use_bias=c.qkv_bias, name=name)(x).reshape(
                B, x.shape[1], count, C
            )
            return constrain(x.transpose(0, 2, 1, 3), BATCH, "tensor")

        scale = C**-0.5 if c.attention_scale is None else c.attention_scale
        scale = scale / (self.layer + 1) if c.scale_attention_by_layer else scale

        def place(x: jax.Array, name: str) -> jax.Array:
            x = Norm(c, name=name)(x) if c.qk_norm else x
            # Half of the scale on each side, as PyTorch does: a parameter whose gradient is small then steps as it does there.
            x = x.astype(jnp.float32) * scale**0.5
            return round_to(
                x if angles is None else rotate(x, last_positions(angles, x.shape[2])), c.dtype
            )

        q_BHSC = place(heads("q", H, last_positions(x_BSD, S)), "q_norm")
        k_BKNC, v_BKNC = place(heads("k", K, x_BSD), "k_norm"), heads("v", K, x_BSD)
        if cache is not None:
            at = (0, 0, cache.length, 0)
            k_BKNC = jax.lax.dynamic_update_slice(cache.keys[self.layer], k_BKNC, at)
            v_BKNC = jax.lax.dynamic_update_slice(cache.values[self.layer], v_BKNC, at)
        # Query heads that share a key head stand as rows of one matrix product.
        q_BKQC, allowed_BQN = (
            q_BHSC.reshape(B, K, H // K * S, C),
            jnp.tile(allowed_BSN, (1, H // K, 1)),
        )
        logits_BKQN = product("bkqc,bknc->bkqn", q_BKQC, k_BKNC)
        logits_BKQN = jnp.where(
            allowed_BQN[:, None], soft_cap(logits_BKQN, c.attention_cap), jnp.finfo(jnp.float32).min
        )
        probs_BKQN = round_to(jax.nn.softmax(logits_BKQN), c.dtype)
        out_BKQC = product("bkqn,bknc->bkqc", probs_BKQN, v_BKNC)
        out = (
            round_to(out_BKQC, c.dtype)
            .reshape(B, H, S, C)
            .transpose(0, 2, 1, 3)
            .reshape(B, S, H * C)
        )
        out_BSD = Linear(
            c.width, c, use_bias=c.out_bias, init_std=c.init_std * (2 * c.layers) ** -0.5, name="o"
        )(out)
        return out_BSD, k_BKNC, v_BKNC


class MLP(nn.Module):
    config: TransformerConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        c = self.config

        def activate(up: jax.Array, *gate: jax.Array) -> jax.Array:
            up = up.astype(jnp.float32)
            return round_to(
                c.activation(gate[0].astype(jnp.float32)) * up if gate else c.activation(up),
                c.dtype,
            )

        names = ("up", "gate") if c.gated else ("up",)
        if (
            jnp.dtype(c.dtype) != jnp.float32
        ):  # the gradient reads what the activation read: half as much as it would keep
            activate = jax.checkpoint(activate)
        up = activate(
            *(Linear(c.mlp_width, c, use_bias=c.mlp_bias, name=name)(x) for name in names)
        )
        up = constrain(up, BATCH, *(None,) * (x.ndim - 2), "tensor")
        std = c.init_std * (2 * c.layers) ** -0.5
        return Linear(c.width, c, use_bias=c.mlp_bias, init_std=std, name="down")(up)
