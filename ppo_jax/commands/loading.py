"""What several commands read: a model with its tokenizer, prompts, a reward."""

from pathlib import Path
from typing import Any

import jax.numpy as jnp
from jax.sharding import Mesh

from ppo_jax import data
from ppo_jax.data.chat import as_chat, end_of_turn
from ppo_jax.data.text import pad_id
from ppo_jax.models.config import TransformerConfig
from ppo_jax.models.io import pretrained


def load_model(
    model: str,
    dtype: str = "float32",
    remat: bool = False,
    mesh: Mesh | None = None,
    *,
    causal: bool = True,
) -> tuple[pretrained.Pretrained, Any]:
    """A policy and its tokenizer, checked against each other; `causal`: an encoder will not do."""
    policy = pretrained.load_policy(model, dtype=jnp.dtype(dtype), remat=remat, mesh=mesh)
    if causal and not policy.config.causal:
        raise ValueError(
            f"{model} is an encoder, which sees the words to come; a policy must not (is_decoder in its config.json)."
        )
    tokenizer = pretrained.load_tokenizer(model)
    pretrained.check_tokenizer(tokenizer, policy.config)
    return policy, tokenizer


def stop_ids(
    tokenizer: Any, policy: pretrained.Pretrained, further: tuple[str, ...] = ()
) -> tuple[int, ...]:
    """Ids that end a response: the tokenizer's end token (or separator, where it has none), those that the model's files name, its
    chat template's end of a turn, and further ones.

    Raises:
      ValueError: if a text is not exactly one token.
    """
    ids = [data.end_id(tokenizer), *policy.end_ids, *end_of_turn(tokenizer)]
    for text in further:
        one = tokenizer(text, add_special_tokens=False).input_ids
        if len(one) != 1:
            raise ValueError(
                f"stop_tokens: {text!r} is {len(one)} tokens of this tokenizer, not one."
            )
        ids += one
    return tuple(dict.fromkeys(i for i in ids if i is not None))


def check_top_k(top_k: int | None, config: TransformerConfig) -> None:
    """Raises ValueError if there are fewer words than `top_k`."""
    if top_k is not None and not 1 <= top_k <= config.vocab_size:
        raise ValueError(
            f"top_k={top_k} must lie in 1 .. {config.vocab_size}, the model's vocabulary."
        )


def load_prompts(
    source: str | Path | list[Any],
    tokenizer: Any,
    policy: pretrained.Pretrained,
    new_tokens: int,
    chat: bool = False,
) -> data.Prompts:
    """Prompts of whatever `data.read_rows` takes, as a policy's tokens."""
    rows = data.read_rows(source)
    rows = as_chat(rows) if chat else rows
    config = policy.config
    prompts = data.encode_prompts(
        rows, tokenizer, positions=config.positions, new_tokens=new_tokens, pad_id=pad_id(tokenizer)
    )
    data.check_ids(prompts.tokens, config.vocab_size)
    return prompts
