"""A new model: a tokenizer that is trained on texts, and a GPT-2 with random parameters."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from jax import Array

from ppo_jax.models.config import TransformerConfig
from ppo_jax.models.io.families import gpt2
from ppo_jax.models.io.pretrained import Pretrained
from ppo_jax.models.transformer import init_params

_END = "<|endoftext|>"


def new_model(
    texts: Sequence[str], config: TransformerConfig, key: Array
) -> tuple[Pretrained, Any]:
    """Train a tokenizer on texts, and make a model for it with random parameters.

    The tokenizer is a byte-level BPE, as GPT-2's, with one special token that ends a text and fills
    padding. The same texts give the same tokenizer.

    Args:
      texts: the texts.
      config: the configuration of the model, with the architecture of GPT-2. Its `vocab_size` is
        the greatest number of tokens, of which there are fewer if the texts are few.
      key: `[]` typed key, consumed.

    Returns:
      The model, as `load_model` returns it, with as many tokens as the tokenizer has, and the
      tokenizer of `transformers`. `save_policy` writes both.

    Raises:
      ValueError: if `config.vocab_size` has no room for the 256 bytes and the special token.

    Example:
      >>> import jax
      >>> config = TransformerConfig(
      ...     vocab_size=260, positions=8, width=4, layers=1, heads=2, mlp_width=16
      ... )
      >>> model, tokenizer = new_model(["to be or not to be"], config, jax.random.key(0))
      >>> tokenizer.convert_ids_to_tokens(tokenizer("to be").input_ids)
      ['to', 'Ġbe']
      >>> model.config.vocab_size
      260
    """
    tokenizer = _train_tokenizer(texts, config.vocab_size)
    config = replace(config, vocab_size=len(tokenizer))
    hf_config = gpt2.config_to_hf(config, end_id=tokenizer.eos_token_id)
    return Pretrained(config, init_params(config, key), hf_config), tokenizer


def _train_tokenizer(texts: Sequence[str], vocab_size: int) -> Any:
    """Train a byte-level BPE tokenizer."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if vocab_size <= len(alphabet):
        raise ValueError(f"vocab_size={vocab_size} must be larger than {len(alphabet)}, the bytes.")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[_END], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=_END, pad_token=_END)
