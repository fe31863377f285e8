"""The decoder that every policy, critic and reward model is made of; its config says what differs between families."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from ppo_jax.models.config import NormAt, TransformerConfig
from ppo_jax.models.layers import (
    MLP,
    Attention,
    Linear,
    Norm,
    last_positions,
    product,
    round_to,
    soft_cap,
)
from ppo_jax.sharding import BATCH, constrain
from ppo_jax.types import KVCache, LanguageModel, Params

_ALIGNED = 8  # positions: tensor cores are slow at lengths that no power of two divides


class Block(nn.Module):
    """Attention and MLP, each added to what it read; the states of the last S positions, as many as `allowed_BSN` lets attend."""

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
        c = self.config

        def before(x: jax.Array, name: str) -> jax.Array:
            return x if c.norm_at is NormAt.AFTER else Norm(c, name=f"{name}_norm")(x)

        def add(x: jax.Array, *ys: jax.Array, name: str) -> jax.Array:
            if c.norm_at is NormAt.AROUND:
                ys = tuple(Norm(c, name=f"{name}_post_norm")(y) for y in ys)
            total = round_to(
                sum((y.astype(jnp.float32) for y in ys), start=x.astype(jnp.float32)), c.dtype
            )
            total = Norm(c, name=f"{name}_norm")(total) if c.norm_at is NormAt.AFTER else total
            return constrain(total, BATCH)

        attention, mlp = Attention(c, self.layer, name="attn"), MLP(c, name="mlp")
        y_BSD, keys, values = attention(before(x_BSD, "attn"), allowed_BSN, angles, cache)
        x_BSD = last_positions(x_BSD, allowed_BSN.shape[1])
        if c.parallel:
            return add(x_BSD, y_BSD, mlp(before(x_BSD, "mlp")), name="attn"), keys, values
        x_BSD = add(x_BSD, y_BSD, name="attn")
        return add(x_BSD, mlp(before(x_BSD, "mlp")), name="mlp"), keys, values


class Decoder(nn.Module):
    """Tokens to final hidden states, and hidden states to logits."""

    config: TransformerConfig

    def setup(self):
        c = self.config
        init = nn.initializers.normal(c.init_std)
        block = nn.remat(Block) if c.remat else Block
        self.embedding = self.param("embedding", init, (c.vocab_size, c.width))
        if c.learned_positions:
            self.position_embedding = self.param(
                "position_embedding", init, (c.positions + c.position_offset, c.width)
            )
        if c.token_types:
            self.type_embedding = self.param("type_embedding", init, (c.token_types, c.width))
        if c.embedding_norm:
            self.embedding_norm = Norm(c)
        self.blocks = [block(c, i, name=f"layer_{i}") for i in range(c.layers)]
        if c.norm_at is not NormAt.AFTER:
            self.final_norm = Norm(c)
        if not c.tied:
            self.unembedding = self.param("unembedding", init, (c.vocab_size, c.width))
        if c.lm_transform:
            self.lm_dense, self.lm_norm = Linear(c.width, c), Norm(c)
            self.lm_bias = self.param("lm_bias", nn.initializers.zeros, (c.vocab_size,))

    def __call__(
        self,
        tokens_BS: jax.Array,
        mask_BS: jax.Array,
        cache: KVCache | None = None,
        last: int | None = None,
    ):
        """`[B, S]` tokens and mask, after what the cache holds, to `[B, S, D]` hidden states, or the last, and the new cache."""
        c = self.config
        S, aligned = tokens_BS.shape[1], 1 if jnp.dtype(c.dtype) == jnp.float32 else _ALIGNED
        first = 0 if last is None else S - last
        if not 0 <= first < S:
            raise ValueError(f"last={last} must lie in 1 .. {S}, the positions of tokens.")
        begin = (
            first // aligned * aligned
        )  # where the last layer begins; nothing reads its states before
        if cache is None:
            tokens_BS, mask_BS = (
                jnp.pad(x, ((0, 0), (0, -S % aligned))) for x in (tokens_BS, mask_BS)
            )
        start, mask_BN = 0, mask_BS
        if cache is not None:
            start = cache.length
            mask_BN = jax.lax.dynamic_update_slice(cache.mask, mask_BS, (0, start))
        slots_S = start + jnp.arange(tokens_BS.shape[1])
        ago_SN = slots_S[:, None] - jnp.arange(mask_BN.shape[1])[None, :]
        # A token's position is the number of real tokens before it, so padding shifts nothing.
        position_BS = jnp.sum((ago_SN > 0)[None] & mask_BN[:, None], axis=-1)
        reach = {
            window: mask_BN[:, None] & _reach(ago_SN, window, c.causal)[None]
            for window in dict.fromkeys(c.layer_windows)
        }
        turn = {rotary: _angles(rotary, position_BS) for rotary in (c.rotary, c.local_rotary)}
        x_BSD, keys, values = constrain(self._embed(tokens_BS, position_BS), BATCH), [], []
        for block, window in zip(self.blocks, c.layer_windows, strict=True):
            rotary = c.rotary if window is None or c.local_rotary is None else c.local_rotary
            allowed_BSN = (
                reach[window][:, begin:] if block is self.blocks[-1] and begin else reach[window]
            )
            x_BSD, k, v = block(x_BSD, allowed_BSN, turn[rotary], cache)
            keys.append(k)
            values.append(v)
        if cache is not None:
            cache = KVCache(tuple(keys), tuple(values), mask_BN, start + tokens_BS.shape[1])
        x_BSD = x_BSD[:, first - begin : S - begin]
        return x_BSD if c.norm_at is NormAt.AFTER else self.final_norm(x_BSD), cache

    def _embed(self, tokens_BS: jax.Array, position_BS: jax.Array) -> jax.Array:
        c = self.config

        def rows(table: jax.Array, at: jax.Array) -> jax.Array:
            return round_to(table[at], c.dtype).astype(jnp.float32)

        x_BSD = rows(constrain(self.embedding, "tensor", None), tokens_BS)
        if c.scale_embedding:
            x_BSD = x_BSD * jnp.sqrt(jnp.float32(c.width)).astype(c.dtype).astype(jnp.float32)
        if c.learned_positions:
            x_BSD = x_BSD + rows(
                constrain(self.position_embedding, None), position_BS + c.position_offset
            )
        if c.token_types:
            x_BSD = x_BSD + rows(self.type_embedding, jnp.zeros((1, 1), jnp.int32))
        return self.embedding_norm(x_BSD) if c.embedding_norm else round_to(x_BSD, c.dtype)

    def logits(self, hidden: jax.Array) -> jax.Array:
        """`[..., D]` hidden states to `[..., V]` float32 logits."""
        c = self.config
        rows = hidden.reshape(-1, hidden.shape[-1])
        if c.lm_transform:
            rows = self.lm_norm(
                round_to(c.activation(self.lm_dense(rows).astype(jnp.float32)), c.dtype)
            )
        matrix_VD = self.embedding if c.tied else self.unembedding
        if (
            jnp.dtype(c.dtype) != jnp.float32 and len(rows) > 1024
        ):  # tensor cores are fast where all lengths are multiples of 64
            matrix_VD = jnp.pad(matrix_VD, ((0, -c.vocab_size % 64), (0, 0)))
        out = soft_cap(product("nd,vd->nv", rows, matrix_VD)[:, : c.vocab_size], c.logit_cap)
        out = out + self.lm_bias[None, :] if c.lm_transform else out
        return out.reshape(*hidden.shape[:-1], -1)

    def everything(self, tokens_BS: jax.Array, mask_BS: jax.Array) -> jax.Array:
        """Touches every parameter, so that `init` makes them all."""
        return self.logits(self(tokens_BS, mask_BS)[0])


def _reach(ago_SN: jax.Array, window: int | None, causal: bool) -> jax.Array:
    """Which slots a position may see, `[S, N]` bool, by how many positions ago each was."""
    reach = ago_SN >= 0 if causal else jnp.ones(ago_SN.shape, bool)
    return reach if window is None else reach & (jnp.abs(ago_SN) < window)


def _angles(rotary, position_BS: jax.Array) -> jax.Array | None:
    """`[B, S, W/2]` float32 radians."""
    return (
        None
        if rotary is None
        else position_BS[..., None].astype(jnp.float32) * rotary.frequencies()[None, None, :]
    )


def init_params(config: TransformerConfig, key: jax.Array) -> Params:
    """Fresh parameters, float32.

    Example:
      >>> config = TransformerConfig(vocab_size=7, positions=8, width=4, layers=1, heads=2, mlp_width=16)
      >>> init_params(config, jax.random.key(0))["embedding"].shape
      (7, 4)
    """
    one = jnp.zeros((1, 1), jnp.int32)
    return Decoder(config).init(key, one, one == 0, method="everything")["params"]


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

    def hidden(
        params: Params,
        tokens: jax.Array,
        mask: jax.Array,
        cache: KVCache | None = None,
        last: int | None = None,
    ):
        return decoder.apply({"params": params}, tokens, mask, cache, last)

    def logits(params: Params, hidden: jax.Array) -> jax.Array:
        return decoder.apply({"params": params}, hidden, method="logits")

    def rounded(params: Params) -> Params:
        return jax.tree.map(lambda x: round_to(x, config.dtype) if x.ndim > 1 else x, params)

    def init_cache(batch_size: int, slots: int) -> KVCache:
        shape = (batch_size, config.key_heads, slots, config.head_width)
        empty = lambda: tuple(
            constrain(jnp.zeros(shape, config.dtype), BATCH, "tensor") for _ in range(config.layers)
        )
        return KVCache(empty(), empty(), jnp.zeros((batch_size, slots), bool), jnp.int32(0))

    return LanguageModel(hidden, logits, init_cache, rounded, about=repr(config))
