"""Sentence embeddings from an encoder."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from ppo_jax import data
from ppo_jax.models.config import TransformerConfig
from ppo_jax.models.io import pretrained, scorers
from ppo_jax.models.transformer import language_model
from ppo_jax.types import Params

EmbeddingFn = Callable[[Params, Array, Array], Array]


def sentence_embedding(config: TransformerConfig) -> EmbeddingFn:
    """Return a function that embeds sentences: the mean of an encoder's hidden states, normalized.

    The mean is over the real tokens, and its length is normalized to 1.

    Source: Reimers & Gurevych 2019 (https://arxiv.org/abs/1908.10084), section 3.

    Args:
      config: the config of the encoder.

    Returns:
      `embed(params, tokens, mask)` from `[B, S]` int32 tokens and their `[B, S]` bool mask to
      `[B, D]` float32 embeddings.
    """
    model = language_model(config)

    def embed(params: Params, tokens: Array, mask: Array) -> Array:
        hidden, _ = model.hidden(params, tokens, mask)
        total = jnp.sum(jnp.where(mask[..., None], hidden.astype(jnp.float32), 0), axis=1)
        mean = total / jnp.sum(mask, axis=1)[:, None]
        return mean / jnp.maximum(jnp.linalg.norm(mean, axis=-1, keepdims=True), 1e-12)

    return embed


class Encoder(NamedTuple):
    """A sentence encoder with its tokenizer; call it on a list of texts.

    Attributes:
      embed: `sentence_embedding` of the model's config, jitted.
      params: the parameters of the model.
      tokenizer: a tokenizer of `transformers`.
      length: number of tokens that each text is truncated or padded to.

    Example::

        encoder = load_encoder("sentence-transformers/all-MiniLM-L6-v2")
        similarity = encoder(["a good film"]) @ encoder(["a bad film"]).T
    """

    embed: EmbeddingFn
    params: Params
    tokenizer: Any
    length: int

    def __call__(self, texts: list[str]) -> np.ndarray:
        """Return the `[n, D]` float32 embeddings of `n` texts.

        Raises:
          ValueError: if a text contains a token that the model does not have.
        """
        ids = self.tokenizer(texts, truncation=True, max_length=self.length).input_ids
        tokens, mask = data.pad(ids, length=self.length, pad_id=0, left=False)
        data.check_ids(tokens, len(self.params["embedding"]))
        return np.asarray(self.embed(self.params, jnp.asarray(tokens), jnp.asarray(mask)))


def load_encoder(model: str | Path, *, length: int = 64) -> Encoder:
    """Load a sentence encoder of the BERT family, such as all-MiniLM-L6-v2.

    Args:
      model: a folder or a Hugging Face id.
      length: number of tokens that a text is truncated to; at most the model's positions.

    Returns:
      The encoder; `encoder(texts)` gives the `[n, D]` embeddings of a list of texts.

    Raises:
      ValueError: if the model is a decoder, or cannot be loaded, or the tokenizer does not fit it.

    Example:
      >>> import tempfile
      >>> from ppo_jax.models.io import families
      >>> from ppo_jax.models.transformer import init_params
      >>> from tokenizers import Tokenizer, models
      >>> from transformers import PreTrainedTokenizerFast
      >>> hf = {"model_type": "bert", "vocab_size": 2, "hidden_size": 8, "num_hidden_layers": 1}
      >>> hf |= {"num_attention_heads": 2, "intermediate_size": 8}
      >>> config = families.config_of(hf)
      >>> params = init_params(config, jax.random.key(0))
      >>> words = Tokenizer(models.WordLevel({"yes": 0, "no": 1}, unk_token="no"))
      >>> tokenizer = PreTrainedTokenizerFast(tokenizer_object=words)
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     pretrained.save_policy(folder, pretrained.Pretrained(config, params, hf), tokenizer)
      ...     encoder = load_encoder(folder)
      >>> encoder(["yes", "no", "yes"]).shape
      (3, 8)
    """
    loaded = scorers.load_trunk(model)
    if loaded.config.causal:
        raise ValueError(f"{model} is a decoder; sentence embeddings need an encoder.")
    tokenizer = pretrained.load_tokenizer(model)
    pretrained.check_tokenizer(tokenizer, loaded.config)
    embed = jax.jit(sentence_embedding(loaded.config))
    return Encoder(embed, loaded.params, tokenizer, min(length, loaded.config.positions))
