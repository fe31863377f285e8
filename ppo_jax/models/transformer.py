"""The decoder that every policy, critic and reward model is made of; its config says what differs between families.

Rounding. Old and new log-probs come from two compiled programs, a forward pass alone and one under a gradient. Left to
itself, a compiler keeps some bfloat16 intermediates in float32, and not the same ones in both programs; the ratio of a policy
with itself is then off by percents. So the points of rounding are part of the model: arithmetic runs in float32 between them,
and `round_to` marks them by `lax.reduce_precision`, which no compiler may drop. Matrix products take rounded operands and
accumulate in float32.
"""

import dataclasses
import enum
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from ppo_jax.types import KVCache, LanguageModel, Params


class Activation(enum.Enum):
    """The non-linearity of the MLP, by the names of Hugging Face configs."""

    GELU = "gelu"
    GELU_NEW = "gelu_new"
    RELU = "relu"
    SILU = "silu"
    TANH = "tanh"

    def __call__(self, x: jax.Array) -> jax.Array:
        match self:
            case Activation.GELU:
                return jax.nn.gelu(x, approximate=False)
            case Activation.GELU_NEW:
                return jax.nn.gelu(x, approximate=True)
            case Activation.RELU:
                return jax.nn.relu(x)
            case Activation.SILU:
                return jax.nn.silu(x)
            case Activation.TANH:
                return jnp.tanh(x)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TransformerConfig:
    """Everything that fixes a decoder's function and its shapes."""

    vocab_size: int  # V
    positions: int  # the longest sequence
    width: int  # D
    layers: int  # L
    heads: int  # H
    mlp_width: int
    activation: Activation = Activation.GELU_NEW
    norm_eps: float = 1e-5
    tied: bool = True  # the output matrix is the embedding
    scale_attention: bool = True  # logits of attention divided by √C
    scale_attention_by_layer: bool = False  # ... and by the layer's number, from 1
    init_std: float = 0.02
    dtype: Any = jnp.float32  # of activations and matrix products; parameters are float32
    remat: bool = False  # recompute each block in the backward pass instead of keeping it

    def __post_init__(self):
        if self.width % self.heads:
            raise ValueError(f"width={self.width} must be a multiple of heads={self.heads}.")

    @property
    def head_width(self) -> int:  # C
        return self.width // self.heads


def round_to(x: jax.Array, dtype: Any) -> jax.Array:
    """Rounds float32 `x` to `dtype`, at this very point of the program (see the top of this file)."""
    if jnp.dtype(dtype) == jnp.float32:
        return x
    info = jnp.finfo(dtype)
    return jax.lax.reduce_precision(x, exponent_bits=info.nexp, mantissa_bits=info.nmant).astype(dtype)


class Linear(nn.Module):
    """`x W + b`. Rows are flattened first: XLA's CPU compiler is slow at weight gradients that contract two axes."""

    features: int
    config: TransformerConfig
    init_std: float

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        kernel = self.param("kernel", nn.initializers.normal(self.init_std), (x.shape[-1], self.features))
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        rows = x.reshape(-1, x.shape[-1])
        out = jnp.dot(rows, round_to(kernel, self.config.dtype), preferred_element_type=jnp.float32) + bias[None, :]
        return round_to(out, self.config.dtype).reshape(*x.shape[:-1], self.features)


class LayerNorm(nn.Module):
    config: TransformerConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],))
        x = x.astype(jnp.float32)
        x = x - jnp.mean(x, axis=-1, keepdims=True)
        x = x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + self.config.norm_eps)
        over = (1,) * (x.ndim - 1) + (-1,)
        return round_to(x * scale.reshape(over) + bias.reshape(over), self.config.dtype)


class Attention(nn.Module):
    config: TransformerConfig
    layer: int

    @nn.compact
    def __call__(self, x_BSD: jax.Array, allowed_BSN: jax.Array, cache: KVCache | None):
        """Attends from the S new positions to N slots; gives the output and this layer's keys and values."""
        c = self.config
        B, S, D = x_BSD.shape
        linear = functools.partial(Linear, features=D, config=c)

        def heads(name: str) -> jax.Array:
            x_BSHC = linear(name=name, init_std=c.init_std)(x_BSD).reshape(B, S, c.heads, c.head_width)
            return x_BSHC.transpose(0, 2, 1, 3)

        scale = c.head_width**-0.5 if c.scale_attention else 1.0
        scale = scale / (self.layer + 1) if c.scale_attention_by_layer else scale

        def scaled(x: jax.Array) -> jax.Array:
            # Half of the scale on each side, as PyTorch does: a parameter whose gradient is small then steps as it does there.
            return round_to(x.astype(jnp.float32) * scale**0.5, c.dtype)

        q_BHSC, k_BKNC, v_BKNC = scaled(heads("q")), scaled(heads("k")), heads("v")
        if cache is not None:
            at = (0, 0, cache.length, 0)
            k_BKNC = jax.lax.dynamic_update_slice(cache.keys[self.layer], k_BKNC, at)
            v_BKNC = jax.lax.dynamic_update_slice(cache.values[self.layer], v_BKNC, at)
        logits_BHSN = jnp.einsum("bhsc,bhnc->bhsn", q_BHSC, k_BKNC, preferred_element_type=jnp.float32)
        logits_BHSN = jnp.where(allowed_BSN[:, None], logits_BHSN, jnp.finfo(jnp.float32).min)
        probs_BHSN = round_to(jax.nn.softmax(logits_BHSN), c.dtype)
        out_BHSC = jnp.einsum("bhsn,bhnc->bhsc", probs_BHSN, v_BKNC, preferred_element_type=jnp.float32)
        out_BSD = round_to(out_BHSC, c.dtype).transpose(0, 2, 1, 3).reshape(B, S, D)
        return linear(name="o", init_std=c.init_std * (2 * c.layers) ** -0.5)(out_BSD), k_BKNC, v_BKNC


class MLP(nn.Module):
    config: TransformerConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        c = self.config
        x = Linear(c.mlp_width, c, c.init_std, name="up")(x)
        x = round_to(c.activation(x.astype(jnp.float32)), c.dtype)
        return Linear(c.width, c, c.init_std * (2 * c.layers) ** -0.5, name="down")(x)


class Block(nn.Module):
    config: TransformerConfig
    layer: int

    @nn.compact
    def __call__(self, x_BSD: jax.Array, allowed_BSN: jax.Array, cache: KVCache | None):
        c = self.config

        def add(x, y):
            return round_to(x.astype(jnp.float32) + y.astype(jnp.float32), c.dtype)

        y_BSD, keys, values = Attention(c, self.layer, name="attn")(LayerNorm(c, name="attn_norm")(x_BSD), allowed_BSN, cache)
        x_BSD = add(x_BSD, y_BSD)
        return add(x_BSD, MLP(c, name="mlp")(LayerNorm(c, name="mlp_norm")(x_BSD))), keys, values


class Decoder(nn.Module):
    """Tokens to final hidden states, and hidden states to logits."""

    config: TransformerConfig

    def setup(self):
        c = self.config
        init = nn.initializers.normal(c.init_std)
        block = nn.remat(Block) if c.remat else Block
        self.embedding = self.param("embedding", init, (c.vocab_size, c.width))
        self.position_embedding = self.param("position_embedding", init, (c.positions, c.width))
        self.blocks = [block(c, i, name=f"layer_{i}") for i in range(c.layers)]
        self.final_norm = LayerNorm(c)
        if not c.tied:
            self.unembedding = self.param("unembedding", init, (c.vocab_size, c.width))

    def __call__(self, tokens_BS: jax.Array, mask_BS: jax.Array, cache: KVCache | None = None):
        """`[B, S]` tokens and mask, after what the cache holds, to `[B, S, D]` hidden states and the new cache."""
        start, mask_BN = 0, mask_BS
        if cache is not None:
            start = cache.length
            mask_BN = jax.lax.dynamic_update_slice(cache.mask, mask_BS, (0, start))
        slots_S = start + jnp.arange(tokens_BS.shape[1])
        causal_SN = jnp.arange(mask_BN.shape[1])[None, :] <= slots_S[:, None]
        allowed_BSN = causal_SN[None] & mask_BN[:, None]
        # A token's position is the number of real tokens before it, so padding shifts nothing.
        before_BS = jnp.sum(allowed_BSN, axis=-1) - mask_BS
        x_BSD = self.embedding[tokens_BS] + self.position_embedding[before_BS]
        x_BSD = round_to(x_BSD, self.config.dtype)
        keys, values = [], []
        for block in self.blocks:
            x_BSD, k, v = block(x_BSD, allowed_BSN, cache)
            keys.append(k)
            values.append(v)
        if cache is not None:
            cache = KVCache(tuple(keys), tuple(values), mask_BN, start + tokens_BS.shape[1])
        return self.final_norm(x_BSD), cache

    def logits(self, hidden: jax.Array) -> jax.Array:
        """`[..., D]` hidden states to `[..., V]` float32 logits."""
        matrix_VD = round_to(self.embedding if self.config.tied else self.unembedding, self.config.dtype)
        rows = hidden.reshape(-1, hidden.shape[-1])
        out = jnp.einsum("nd,vd->nv", rows, matrix_VD, preferred_element_type=jnp.float32)
        return out.reshape(*hidden.shape[:-1], -1)


def init_params(config: TransformerConfig, key: jax.Array) -> Params:
    """Fresh parameters, float32.

    Example:
      >>> config = TransformerConfig(vocab_size=7, positions=8, width=4, layers=1, heads=2, mlp_width=16)
      >>> init_params(config, jax.random.key(0))["embedding"].shape
      (7, 4)
    """
    one = jnp.zeros((1, 1), jnp.int32)
    return Decoder(config).init(key, one, one == 0)["params"]


def language_model(config: TransformerConfig) -> LanguageModel:
    """The decoder as pure functions of its parameters.

    Example:
      >>> config = TransformerConfig(vocab_size=7, positions=8, width=4, layers=1, heads=2, mlp_width=16)
      >>> model, params = language_model(config), init_params(config, jax.random.key(0))
      >>> hidden, _ = model.hidden(params, jnp.zeros((2, 3), jnp.int32), jnp.ones((2, 3), bool))
      >>> model.logits(params, hidden).shape
      (2, 3, 7)
    """
    decoder = Decoder(config)

    def hidden(params: Params, tokens: jax.Array, mask: jax.Array, cache: KVCache | None = None):
        return decoder.apply({"params": params}, tokens, mask, cache)

    def logits(params: Params, hidden: jax.Array) -> jax.Array:
        return decoder.apply({"params": params}, hidden, method="logits")

    def init_cache(batch_size: int, slots: int) -> KVCache:
        shape = (batch_size, config.heads, slots, config.head_width)
        empty = lambda: tuple(jnp.zeros(shape, config.dtype) for _ in range(config.layers))
        return KVCache(empty(), empty(), jnp.zeros((batch_size, slots), bool), jnp.int32(0))

    return LanguageModel(hidden, logits, init_cache)
