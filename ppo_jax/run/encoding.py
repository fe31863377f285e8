"""Tokens of prompts and of the ends of responses for a model, and checks against its vocabulary."""

from collections.abc import Sequence
from typing import Any

from ppo_jax import data
from ppo_jax.data.chat import end_of_turn_ids
from ppo_jax.data.prompts import LongPrompts
from ppo_jax.data.text import pad_id
from ppo_jax.models.config import TransformerConfig
from ppo_jax.models.io.pretrained import Pretrained


def encode_for(
    rows: Sequence[dict[str, Any]],
    tokenizer: Any,
    config: TransformerConfig,
    new_tokens: int,
    *,
    long_prompts: LongPrompts = "error",
    max_prompt_tokens: int | None = None,
    critic_positions: int | None = None,
    ref_positions: int | None = None,
) -> data.Prompts:
    """Tokenize prompts for a model, and check its vocabulary and its number of positions.

    Prompts that are too long for the critic are left out or cut like those that are too long for
    the policy. Those that are too long for the reference are an error.
    """
    if critic_positions is not None and long_prompts != "error":
        room = critic_positions - new_tokens
        max_prompt_tokens = room if max_prompt_tokens is None else min(max_prompt_tokens, room)
    prompts = data.encode_prompts(
        rows,
        tokenizer,
        positions=config.positions,
        new_tokens=new_tokens,
        pad_id=pad_id(tokenizer, config.vocab_size),
        long_prompts=long_prompts,
        max_prompt_tokens=max_prompt_tokens,
    )
    data.check_ids(prompts.tokens, config.vocab_size)
    longest = prompts.tokens.shape[1] + new_tokens
    for name, most in {"critic": critic_positions, "reference": ref_positions}.items():
        if most is not None and most < longest:
            raise ValueError(
                f"The {name} has {most} positions; the longest prompt and "
                f"max_new_tokens={new_tokens} need {longest}."
            )
    return prompts


def stop_ids(
    tokenizer: Any, policy: Pretrained, stop_tokens: Sequence[str] = ()
) -> tuple[int, ...]:
    """Token ids that end a response.

    These are the tokenizer's end token (or its separator if it has none), the end tokens that the
    model's files name, the token that ends a turn in the chat template, and `stop_tokens`.

    Raises:
      ValueError: if one of `stop_tokens` is not a single token of the tokenizer.
    """
    ids = [data.end_id(tokenizer), *policy.end_ids, *end_of_turn_ids(tokenizer)]
    for text in stop_tokens:
        token_ids = tokenizer(text, add_special_tokens=False).input_ids
        if len(token_ids) != 1:
            raise ValueError(
                f"stop_tokens: {text!r} is {len(token_ids)} tokens of this tokenizer, not one."
            )
        ids += token_ids
    return tuple(dict.fromkeys(i for i in ids if i is not None))


def check_top_k(top_k: int | None, config: TransformerConfig) -> None:
    """Raise ValueError if `top_k` is larger than the vocabulary."""
    if top_k is not None and not 1 <= top_k <= config.vocab_size:
        raise ValueError(
            f"top_k={top_k} must lie in 1 .. {config.vocab_size}, the size of the vocabulary."
        )
