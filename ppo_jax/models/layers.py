"""A transformer block and its parts: linear layers, norms, attention and the MLP.

Activations are rounded to the type of the config at fixed points; `models.rounding` says why.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from ppo_jax.models.attention import attend, attend_long
from ppo_jax.models.cache import group_heads, separate_heads
from ppo_jax.models.config import NormAt, NormKind, TransformerConfig
from ppo_jax.models.rounding import mean, product, round_to
from ppo_jax.models.visible import Visible
from ppo_jax.sharding import BATCH, constrain, gather_rows, split_features
from ppo_jax.types import KVCache, Params


def parameter(
    module: nn.Module, name: str, init: nn.initializers.Initializer, shape: tuple[int, ...]
) -> Array:
    """Return a parameter of a module, as `Module.param` does, but several times as quickly.

    Flax traces the initialiser at each call in order to compare shapes.

    Args:
      module: the module that owns the parameter.
      name: name of the parameter.
      init: makes a fresh parameter.
      shape: shape of the parameter.
    """
    if module.has_variable("params", name):
        value: Array = module.get_variable("params", name)
        if value.shape == tuple(shape):
            return value
    return module.param(name, init, shape, jnp.float32)


class Linear(nn.Module):
    """A linear layer `x W + b`, plus `s (x A) B` if its parameters hold a low-rank adapter.

    Adapters are described in `models.lora`.

    Attributes:
      features: size of the output.
      config: the configuration of the model.
      use_bias: whether there is a bias.
      init_std: standard deviation of a fresh kernel. None means that of the config.
      output_axes: the mesh axes that shard the output while decoding on a mesh with `fsdp`, as in
        `sharding_rules.DECODING_RULES`.
    """

    features: int
    config: TransformerConfig
    use_bias: bool = True
    init_std: float | None = None
    output_axes: tuple[str, ...] = ("tensor", "fsdp")

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Map `[..., D]` to `[..., features]`."""
        c = self.config
        init = nn.initializers.normal(c.init_std if self.init_std is None else self.init_std)
        kernel = parameter(self, "kernel", init, (x.shape[-1], self.features))
        # Flattened, because XLA's CPU compiler is slow at weight gradients that contract two axes.
        rows = x.reshape(-1, x.shape[-1])
        decoding = x.ndim == 3 and x.shape[1] == 1  # The rows are smaller than the kernel.
        rows = gather_rows(rows) if decoding else rows
        out = product("nd,dv->nv", rows, kernel)
        if self.use_bias:
            bias = parameter(self, "bias", nn.initializers.zeros, (self.features,))
            out = out + bias[None, :]
        if self.has_variable("params", "lora_a"):
            if c.lora_scale is None:
                raise ValueError(
                    "The parameters hold adapters, but the model's config has no lora_scale; make "
                    "the model with dataclasses.replace(config, lora_scale=lora.scale), where lora "
                    "is the LoRA of the adapters."
                )
            down = product("nd,dv->nv", rows, self.get_variable("params", "lora_a"))
            out = out + c.lora_scale * product(
                "nd,dv->nv", round_to(down, c.dtype), self.get_variable("params", "lora_b")
            )
        out = round_to(out, c.dtype)
        out = split_features(out, self.output_axes) if decoding else out
        return out.reshape(*x.shape[:-1], self.features)


class Norm(nn.Module):
    """The normalisation of the config, over the last axis and computed in float32."""

    config: TransformerConfig

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Normalise `x`."""
        kind, over_last = self.config.norm, (1,) * (x.ndim - 1) + (-1,)
        init = nn.initializers.zeros if kind is NormKind.RMS_PLUS_1 else nn.initializers.ones
        scale = parameter(self, "scale", init, x.shape[-1:]).reshape(over_last)
        x = x.astype(jnp.float32)
        if kind is NormKind.LAYER:
            x = x - mean(x)
        x = x * jax.lax.rsqrt(mean(x * x) + self.config.norm_eps)
        x = x * (1 + scale if kind is NormKind.RMS_PLUS_1 else scale)
        if kind is NormKind.LAYER:
            bias = parameter(self, "bias", nn.initializers.zeros, x.shape[-1:])
            x = x + bias.reshape(over_last)
        return round_to(x, self.config.dtype)


def rotate(x: Array, angles: Array) -> Array:
    """Rotate each pair `(x_i, x_{i + W/2})` of the elements of a head by its angle.

    Args:
      x: `[B, H, S, C]` float32.
      angles: `[B, S, W/2]` float32, in radians, with `W <= C`. Elements from `W` on are kept.
    """
    cos, sin = jnp.cos(angles)[:, None], jnp.sin(angles)[:, None]
    half = angles.shape[-1]
    a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin, rest], axis=-1)


def last_positions(x: Array, count: int) -> Array:
    """Return the last `count` positions of `[B, S, ...]`."""
    return x if count == x.shape[1] else x[:, x.shape[1] - count :]


class Attention(nn.Module):
    """Attention with K key/value heads, each of which serves `H / K` query heads.

    Attributes:
      config: the configuration of the model.
      layer: index of the block, from 0.
    """

    config: TransformerConfig
    layer: int

    @nn.compact
    def __call__(
        self,
        x_BSD: Array,
        allowed_BSN: Array | Visible,
        angles: Array | None,
        cache: KVCache | None,
    ) -> tuple[Array, Array, Array]:
        """Attend from the last S of the new positions.

        Args:
          x_BSD: hidden states of all new positions, S or more.
          allowed_BSN: the slots that each of the last S positions attends to, as a matrix of bool
            or a `Visible`.
          angles: rotary angles `[B, S, W/2]` of all new positions, or None.
          cache: keys and values of the earlier positions, or None if there are none.

        Returns:
          The output `[B, S, D]`, and the keys and values `[B, K, N, C]` of this layer with those of
          the cache.
        """
        c = self.config
        B, S = allowed_BSN.shape[:2]
        H, K, C = c.heads, c.key_heads, c.head_width
        q_BHSC = self._scaled(self._heads("q", H, last_positions(x_BSD, S)), angles, "q_norm")
        k_BKNC = self._scaled(self._heads("k", K, x_BSD), angles, "k_norm")
        v_BKNC = self._heads("v", K, x_BSD)
        if cache is not None:
            k_BKNC, v_BKNC = (
                jax.lax.dynamic_update_slice_in_dim(
                    old, group_heads(new, old.shape[1]), cache.length, axis=2
                )
                for old, new in (
                    (cache.keys[self.layer], k_BKNC),
                    (cache.values[self.layer], v_BKNC),
                )
            )
        if isinstance(allowed_BSN, Visible):
            keys, values = separate_heads(k_BKNC, K), separate_heads(v_BKNC, K)
            out = attend_long(q_BHSC, keys, values, allowed_BSN, cap=c.attention_cap)
        else:
            # The query heads that share a key head become rows of one matrix product.
            q_BKQC = q_BHSC.reshape(B, K, H // K * S, C)
            allowed_BQN = jnp.tile(allowed_BSN, (1, H // K, 1))
            out = attend(q_BKQC, k_BKNC, v_BKNC, allowed_BQN, cap=c.attention_cap)
        out = out.reshape(B, H, S, C).transpose(0, 2, 1, 3).reshape(B, S, H * C)
        output = Linear(c.width, c, c.out_bias, c.residual_std, output_axes=("fsdp",), name="o")
        return output(out), k_BKNC, v_BKNC

    def _heads(self, name: str, count: int, x: Array) -> Array:
        """Project hidden states `[B, S, D]` to `[B, count, S, C]`."""
        C = self.config.head_width
        x = Linear(count * C, self.config, use_bias=self.config.qkv_bias, name=name)(x)
        x = x.reshape(*x.shape[:2], count, C)
        return constrain(x.transpose(0, 2, 1, 3), BATCH, "tensor")

    def _scaled(self, x: Array, angles: Array | None, norm: str) -> Array:
        """Normalise, scale and rotate queries or keys `[B, H, S, C]`."""
        c = self.config
        scale = c.head_width**-0.5 if c.attention_scale is None else c.attention_scale
        if c.scale_attention_by_layer:
            scale = scale / (self.layer + 1)
        if c.qk_norm:
            x = Norm(c, name=norm)(x)
        # Queries and keys are each multiplied by the square root of the scale, as in PyTorch. Small
        # gradients are then rounded as there, so that an optimizer takes the same steps.
        x = x.astype(jnp.float32) * scale**0.5
        if angles is not None:
            x = rotate(x, last_positions(angles, x.shape[2]))
        return round_to(x, c.dtype)


class MLP(nn.Module):
    """The feed-forward network of a block, with a gate if the config has one."""

    config: TransformerConfig

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Map hidden states `[..., D]` to `[..., D]`."""
        c = self.config

        def activate(up: Array, *gate: Array) -> Array:
            up = up.astype(jnp.float32)
            out = c.activation(gate[0].astype(jnp.float32)) * up if gate else c.activation(up)
            return round_to(out, c.dtype)

        # Recomputed in the backward pass, which then keeps the bfloat16 inputs of the activation
        # instead of its float32 intermediates, half of the memory.
        if c.low_precision:
            activate = jax.checkpoint(activate)
        names = ("up", "gate") if c.gated else ("up",)
        up = activate(
            *(Linear(c.mlp_width, c, use_bias=c.mlp_bias, name=name)(x) for name in names)
        )
        up = constrain(up, BATCH, *(None,) * (x.ndim - 2), "tensor")
        down = Linear(c.width, c, c.mlp_bias, c.residual_std, output_axes=("fsdp",), name="down")
        return down(up)


class Block(nn.Module):
    """Attention and an MLP, each added to the residual stream.

    Attributes:
      config: the configuration of the model.
      layer: index of the block, from 0.
    """

    config: TransformerConfig
    layer: int

    @nn.compact
    def __call__(
        self,
        x_BSD: Array,
        allowed_BSN: Array | Visible,
        angles: Array | None,
        cache: KVCache | None,
    ) -> tuple[Array, Array, Array]:
        """Return the new hidden states of the last S positions, and the keys and values.

        Arguments and results are those of `Attention`.
        """
        c = self.config

        def norm(name: str, x: Array, *places: NormAt) -> Array:
            return Norm(c, name=name)(x) if c.norm_at in places else x

        def add(name: str, x: Array, *ys: Array) -> Array:
            ys = tuple(norm(f"{name}_post_norm", y, NormAt.AROUND) for y in ys)
            total = sum((y.astype(jnp.float32) for y in ys), start=x.astype(jnp.float32))
            total = norm(f"{name}_norm", round_to(total, c.dtype), NormAt.AFTER)
            return constrain(total, BATCH)

        before = NormAt.BEFORE, NormAt.AROUND
        attention, mlp = Attention(c, self.layer, name="attn"), MLP(c, name="mlp")
        y_BSD, keys, values = attention(
            norm("attn_norm", x_BSD, *before), allowed_BSN, angles, cache
        )
        x_BSD = last_positions(x_BSD, allowed_BSN.shape[1])
        if c.parallel:
            x_BSD = add("attn", x_BSD, y_BSD, mlp(norm("mlp_norm", x_BSD, *before)))
        else:
            x_BSD = add("attn", x_BSD, y_BSD)
            x_BSD = add("mlp", x_BSD, mlp(norm("mlp_norm", x_BSD, *before)))
        return x_BSD, keys, values


def apply_block(config: TransformerConfig, layer: int, params: Params, *inputs: Any) -> Any:
    """Compute a block with given parameters."""
    return Block(config, layer, parent=None).apply({"params": params}, *inputs)
