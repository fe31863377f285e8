"""The decoder that every policy, critic and reward model is made of.

There is one decoder for all model families; `TransformerConfig` has a switch for everything in
which they differ. `language_model` turns it into the pure functions that the rest of the package
uses.
"""

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from ppo_jax.models.attention import attended_slots, soft_cap
from ppo_jax.models.cache import empty_cache
from ppo_jax.models.config import NormAt, TransformerConfig
from ppo_jax.models.layer_loop import layers_in_loop, loop_over_layers
from ppo_jax.models.layers import Block, Linear, Norm, apply_block, parameter
from ppo_jax.models.rounding import product, round_to
from ppo_jax.models.visible import Visible, since
from ppo_jax.sharding import BATCH, constrain, free_size, gather_rows, split_features
from ppo_jax.types import KVCache, LanguageModel, Params

# Tensor cores are slow at lengths that are not divisible by a power of two.
_ALIGNED = 8


class Decoder(nn.Module):
    """The transformer: from tokens to hidden states, and from hidden states to logits."""

    config: TransformerConfig

    def setup(self) -> None:
        """Create the parameters and the layers."""
        c = self.config
        init = nn.initializers.normal(c.init_std)
        table = lambda name, rows: parameter(self, name, init, (rows, c.width))
        block = nn.remat(Block) if c.remat else Block
        self.embedding = table("embedding", c.vocab_size)
        if c.learned_positions:
            self.position_embedding = table("position_embedding", c.positions + c.position_offset)
        if c.token_types:
            self.type_embedding = table("type_embedding", c.token_types)
        if c.embedding_norm:
            self.embedding_norm = Norm(c)
        self.blocks = [block(c, i, name=f"layer_{i}") for i in range(c.layers)]
        if c.norm_at is not NormAt.AFTER:
            self.final_norm = Norm(c)
        if not c.tied:
            self.unembedding = table("unembedding", c.vocab_size)
        if c.lm_transform:
            self.lm_dense, self.lm_norm = Linear(c.width, c), Norm(c)
            self.lm_bias = parameter(self, "lm_bias", nn.initializers.zeros, (c.vocab_size,))

    def __call__(
        self,
        tokens_BS: Array,
        mask_BS: Array,
        cache: KVCache | None = None,
        last: int | None = None,
        segments_BS: Array | None = None,
    ) -> tuple[Array, KVCache | None]:
        """Read tokens; the arguments and results are those of `types.HiddenFn`."""
        c = self.config
        S, aligned = tokens_BS.shape[1], _ALIGNED if c.low_precision else 1
        first = 0 if last is None else S - last
        if not 0 <= first < S:
            raise ValueError(f"last={last} must lie in 1 .. {S}, the positions of tokens.")
        slots = S if cache is None else cache.mask.shape[1]
        if slots > c.positions and segments_BS is None:
            raise ValueError(f"A sequence of {slots} tokens does not fit positions={c.positions}.")
        if cache is not None and segments_BS is not None:
            raise ValueError("Pass either a cache or segments, but not both.")
        # The last layer computes states from here on only, since nothing reads the earlier ones.
        begin = first // aligned * aligned
        start: Array | int = 0
        padding = ((0, 0), (0, -S % aligned))
        if cache is None:
            tokens_BS, mask_BS = jnp.pad(tokens_BS, padding), jnp.pad(mask_BS, padding)
            mask_BN = mask_BS
        else:
            start = cache.length
            mask_BN = jax.lax.dynamic_update_slice_in_dim(cache.mask, mask_BS, start, axis=1)
        if segments_BS is not None:
            segments_BS = jnp.pad(segments_BS, padding)
        position_BS, allowed = attended_slots(
            mask_BS, mask_BN, segments_BS, start, windows=c.layer_windows, causal=c.causal
        )
        angles = self._angles(position_BS)
        x_BSD = constrain(self._embed(tokens_BS, position_BS), BATCH)
        x_BSD, keys, values = self._layers(x_BSD, allowed, angles, cache, begin)
        if cache is not None:
            length = cache.length + tokens_BS.shape[1]
            cache = KVCache(tuple(keys), tuple(values), mask_BN, length)
        x_BSD = x_BSD[:, first - begin : S - begin]
        return x_BSD if c.norm_at is NormAt.AFTER else self.final_norm(x_BSD), cache

    def _layers(
        self,
        x_BSD: Array,
        allowed: dict[int | None, Array | Visible],
        angles: dict[int | None, Array | None],
        cache: KVCache | None,
        begin: int,
    ) -> tuple[Array, list[Array], list[Array]]:
        """Compute all layers, the last one from position `begin` on.

        The slots that positions attend to and the angles are given by the window of a layer.
        """
        c = self.config
        keys: list[Array] = []
        values: list[Array] = []
        loops = 0 if self.is_initializing() else layers_in_loop(c, x_BSD.shape[1])
        params = [self.variables["params"][f"layer_{i}"] for i in range(loops)]
        # Layers differ if only some of them have adapters.
        loops = loops if len(set(map(jax.tree.structure, params))) == 1 else 0
        if loops:
            block_fn = functools.partial(apply_block, c)
            x_BSD, keys, values = loop_over_layers(
                block_fn, params, x_BSD, allowed, angles, cache, c
            )
        for block, window in zip(self.blocks[loops:], c.layer_windows[loops:], strict=True):
            last = begin and block is self.blocks[-1]
            allowed_BSN = since(allowed[window], begin) if last else allowed[window]
            x_BSD, k, v = block(x_BSD, allowed_BSN, angles[window], cache)
            keys.append(k)
            values.append(v)
        return x_BSD, keys, values

    def _angles(self, position_BS: Array) -> dict[int | None, Array | None]:
        """Return the rotary angles `[B, S, W/2]` of layers, by their window."""
        c = self.config
        angles: dict[Any, Any] = {
            rotary: position_BS[..., None].astype(jnp.float32) * rotary.frequencies()[None, None]
            for rotary in (c.rotary, c.local_rotary)
            if rotary
        }
        of = lambda window: c.rotary if window is None else c.local_rotary or c.rotary
        return {window: angles.get(of(window)) for window in c.layer_windows}

    def _embed(self, tokens_BS: Array, position_BS: Array) -> Array:
        c = self.config

        def rows(table: Array, at: Array) -> Array:
            return round_to(table[at], c.dtype).astype(jnp.float32)

        # The table stays sharded and devices exchange what they look up: over the vocabulary while
        # decoding, otherwise over the features, so that none holds the gradient of a whole table.
        decoding = tokens_BS.shape[1] == 1
        axes = (("tensor", "fsdp"), None) if decoding else ("tensor", "fsdp")
        x_BSD = rows(constrain(self.embedding, *axes), tokens_BS)
        x_BSD = x_BSD if decoding else constrain(x_BSD, "data", None, "fsdp")
        if c.scale_embedding:
            x_BSD = x_BSD * jnp.sqrt(jnp.float32(c.width)).astype(c.dtype).astype(jnp.float32)
        if c.learned_positions:
            table = constrain(self.position_embedding, None)
            x_BSD = x_BSD + rows(table, position_BS + c.position_offset)
        if c.token_types:
            x_BSD = x_BSD + rows(self.type_embedding, jnp.zeros((1, 1), jnp.int32))
        return self.embedding_norm(x_BSD) if c.embedding_norm else round_to(x_BSD, c.dtype)

    def logits(self, hidden: Array) -> Array:
        """Map hidden states `[..., D]` to logits `[..., V]` float32."""
        c = self.config
        rows = hidden.reshape(-1, hidden.shape[-1])
        decoding = hidden.ndim == 2
        rows = gather_rows(rows) if decoding else rows
        if c.lm_transform:
            rows = c.activation(self.lm_dense(rows).astype(jnp.float32))
            rows = self.lm_norm(round_to(rows, c.dtype))
        matrix_VD = self.embedding if c.tied else self.unembedding
        if c.low_precision and len(rows) > 1024:
            # Tensor cores are fast if all sizes are multiples of 64.
            matrix_VD = jnp.pad(matrix_VD, ((0, -c.vocab_size % 64), (0, 0)))
            if free_size("fsdp") > 1:
                # Its gradient is sharded before the slice; libtpu 0.0.42 fails to fuse these two.
                matrix_VD = jax.lax.optimization_barrier(constrain(matrix_VD, "tensor", "fsdp"))
        out = soft_cap(product("nd,vd->nv", rows, matrix_VD)[:, : c.vocab_size], c.logit_cap)
        if c.lm_transform:
            out = out + self.lm_bias[None, :]
        if decoding:  # In two steps, because the compiler would gather the logits of all rows.
            out = constrain(constrain(split_features(out), BATCH, "tensor"), BATCH)
        return out.reshape(*hidden.shape[:-1], -1)


def init_params(config: TransformerConfig, key: Array) -> Params:
    """Return fresh parameters of a decoder.

    Weights are normal with `config.init_std`, biases are 0 and scales of norms are 1.

    Args:
      config: the configuration of the model.
      key: `[]` typed key, consumed.

    Returns:
      A nested dictionary of float32 arrays.

    Example:
      >>> config = TransformerConfig(
      ...     vocab_size=7, positions=8, width=4, layers=1, heads=2, mlp_width=16
      ... )
      >>> init_params(config, jax.random.key(0))["embedding"].shape
      (7, 4)
    """
    tokens, mask = jnp.zeros((1, 1), jnp.int32), jnp.ones((1, 1), bool)
    everything = lambda decoder, *inputs: decoder.logits(decoder(*inputs)[0])
    return Decoder(config).init(key, tokens, mask, method=everything)["params"]


def language_model(config: TransformerConfig) -> LanguageModel:
    """Return the decoder as pure functions of its parameters.

    Args:
      config: the configuration of the model.

    Returns:
      The functions of `ppo_jax.LanguageModel`, for parameters as from `init_params`. `hidden`
      raises ValueError if `last` is not between 1 and the number of positions of `tokens`, or if
      these, or the slots of the cache, are more than `config.positions`. With `segments`, only
      each segment must fit the positions, which is not checked.

    Example:
      >>> config = TransformerConfig(
      ...     vocab_size=7, positions=8, width=4, layers=1, heads=2, mlp_width=16
      ... )
      >>> model, params = language_model(config), init_params(config, jax.random.key(0))
      >>> hidden, _ = model.hidden(params, jnp.zeros((2, 3), jnp.int32), jnp.ones((2, 3), bool))
      >>> model.logits(params, hidden).shape
      (2, 3, 7)
    """
    return _language_model(config)


# Cached, because functions compare by identity: models of equal configs share compiled programs.
@functools.cache
def _language_model(config: TransformerConfig) -> LanguageModel:
    apply: Callable[..., Any] = Decoder(config).apply

    def hidden(
        params: Params,
        tokens: Array,
        mask: Array,
        cache: KVCache | None = None,
        last: int | None = None,
        segments: Array | None = None,
    ) -> tuple[Array, KVCache | None]:
        return apply({"params": params}, tokens, mask, cache, last, segments)

    return LanguageModel(
        hidden=hidden,
        logits=lambda params, hidden: apply({"params": params}, hidden, method="logits"),
        init_cache=functools.partial(empty_cache, config),
        rounded=lambda params: jax.tree.map(
            lambda x: round_to(x, config.dtype) if x.ndim > 1 else x, params
        ),
        # Runs of earlier versions, whose lora_scale was 1 without adapters, can still be resumed.
        about=repr(config if config.lora_scale else replace(config, lora_scale=1.0)),
        positions=config.positions,
    )
