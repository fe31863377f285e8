"""Sentence embeddings from an encoder, and the reward that is likeness to a sentence."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ppo_jax import data
from ppo_jax.models.config import TransformerConfig
from ppo_jax.models.io import pretrained, scorers
from ppo_jax.models.transformer import language_model
from ppo_jax.types import Params


def sentence_embedding(
    config: TransformerConfig,
) -> Callable[[Params, jax.Array, jax.Array], jax.Array]:
    """The mean of an encoder's states over the real tokens, of length 1 (Reimers & Gurevych 2019, https://arxiv.org/abs/1908.10084).

    Returns:
      `embed(params, tokens [B, S], mask [B, S]) -> [B, D]` float32.
    """
    model = language_model(config)

    def embed(params: Params, tokens: jax.Array, mask: jax.Array) -> jax.Array:
        hidden, _ = model.hidden(params, tokens, mask)
        mean = (
            jnp.sum(jnp.where(mask[..., None], hidden.astype(jnp.float32), 0), axis=1)
            / jnp.sum(mask, axis=1)[:, None]
        )
        return mean / jnp.maximum(jnp.linalg.norm(mean, axis=-1, keepdims=True), 1e-12)

    return embed


class Encoder(NamedTuple):
    """A sentence encoder with its tokenizer; `embed(params, tokens, mask)` is jitted `sentence_embedding`."""

    embed: Callable[[Params, jax.Array, jax.Array], jax.Array]
    params: Params
    tokenizer: Any
    length: int  # tokens that a text is cut or padded to

    def __call__(self, texts: list[str]) -> np.ndarray:
        """`[n, D]` embeddings of texts."""
        ids = self.tokenizer(texts, truncation=True, max_length=self.length).input_ids
        tokens, mask = data.pad(ids, length=self.length, pad_id=0, left=False)
        data.check_ids(tokens, len(self.params["embedding"]))
        return np.asarray(self.embed(self.params, tokens, mask))


def load_encoder(model: str | Path, *, length: int = 64) -> Encoder:
    """An encoder of the BERT family, such as all-MiniLM-L6-v2, from a folder or a Hugging Face id.

    Raises:
      ValueError: if it is a decoder, or does not fit.
    """
    loaded = scorers.load_trunk(model)
    if loaded.config.causal:
        raise ValueError(f"{model} is a decoder; sentence embeddings need an encoder.")
    tokenizer = pretrained.load_tokenizer(model)
    pretrained.check_tokenizer(tokenizer, loaded.config)
    embed = jax.jit(sentence_embedding(loaded.config))
    return Encoder(embed, loaded.params, tokenizer, min(length, loaded.config.positions))
