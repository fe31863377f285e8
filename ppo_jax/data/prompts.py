"""Tokenized prompts, and the shuffled order in which a run reads them."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ppo_jax.data import chat
from ppo_jax.data.rows import Row
from ppo_jax.data.text import encode_text, pad


@dataclass(frozen=True)
class Prompts:
    """A batch of `n` prompts, padded on the left to `P` positions.

    Attributes:
      rows: one dictionary a prompt. Column `prompt` holds its text, and further columns are passed
        to the reward. For a prompt that was a list of messages, `prompt` holds the text that the
        chat template made of them, and column `messages` holds the messages.
      tokens: `[n, P]` int32.
      mask: `[n, P]` bool, the real tokens.
      from_messages: `[n]` bool, whether the prompt was a list of messages; None means that no
        prompt was.

    Example:
      >>> mask = np.array([[False, True], [True, True]])
      >>> prompts = Prompts([{"prompt": "a"}, {"prompt": "b c"}], np.array([[0, 1], [2, 3]]), mask)
      >>> prompts.take(np.array([1])).texts
      ['b c']
    """

    rows: Sequence[Row]
    tokens: np.ndarray
    mask: np.ndarray
    from_messages: np.ndarray | None = None

    def __len__(self) -> int:
        """Return the number of prompts."""
        return len(self.rows)

    @property
    def texts(self) -> list[str]:
        """The text of each prompt."""
        return [row["prompt"] for row in self.rows]

    @property
    def messages(self) -> list[list[chat.Message] | None]:
        """The messages of each prompt, or None for a prompt that was a text."""
        flags = [False] * len(self) if self.from_messages is None else self.from_messages
        return [
            row["messages"] if flag else None for row, flag in zip(self.rows, flags, strict=True)
        ]

    def take(self, indices: np.ndarray) -> "Prompts":
        """Select the prompts with these row numbers, in this order."""
        flags = None if self.from_messages is None else self.from_messages[indices]
        rows = [self.rows[i] for i in indices]
        return Prompts(rows, self.tokens[indices], self.mask[indices], flags)

    def padded(self, positions: int) -> "Prompts":
        """Add padding on the left up to at least `positions` columns."""
        width = ((0, 0), (max(0, positions - self.tokens.shape[1]), 0))
        return replace(self, tokens=np.pad(self.tokens, width), mask=np.pad(self.mask, width))


def encode_prompts(
    rows: Sequence[Row], tokenizer: Any, *, positions: int, new_tokens: int, pad_id: int
) -> Prompts:
    """Tokenize prompts; prompts that are lists of messages go through the chat template first.

    Args:
      rows: one dictionary a prompt, as `read_rows` returns them, with the text or the messages in
        column `prompt`, and for messages optionally `tools` and `chat_template_kwargs`.
      tokenizer: a `transformers` tokenizer.
      positions: number of positions that the model has.
      new_tokens: greatest number of tokens of a response.
      pad_id: the token id written at padding positions.

    Returns:
      The prompts, padded on the left to the longest of them.

    Raises:
      ValueError: if a prompt is not a text that the tokenizer takes, gives no token, or leaves no
        room for `new_tokens` within `positions`; or if there are messages but no chat template, or
        the template raises an exception.

    Example:
      >>> from tokenizers import Tokenizer, models, pre_tokenizers
      >>> from transformers import PreTrainedTokenizerFast
      >>> words = Tokenizer(models.WordLevel({"?": 0, "a": 1, "b": 2}, unk_token="?"))
      >>> words.pre_tokenizer = pre_tokenizers.Whitespace()
      >>> tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="?")
      >>> rows = [{"prompt": "a b"}, {"prompt": "b"}]
      >>> encode_prompts(rows, tokenizer, positions=8, new_tokens=4, pad_id=0).tokens
      array([[1, 2],
             [0, 2]], dtype=int32)
    """
    encoded, ids, from_messages = [], [], []
    for i, row in enumerate(rows):
        in_chat = chat.is_messages(row["prompt"])
        if in_chat:
            if getattr(tokenizer, "chat_template", None) is None:
                raise ValueError(
                    "Prompts of messages need a tokenizer with a chat template; this one has none."
                )
            text = chat.render_prompt(row["prompt"], tokenizer, **chat.template_options(row))
            row = {**row, "prompt": text, "messages": row["prompt"]}
        text = row["prompt"]
        try:
            # A chat template writes the special tokens itself.
            prompt = encode_text(tokenizer, text, keep_end=False, add_special_tokens=not in_chat)
        except (TypeError, UnicodeError) as error:
            raise ValueError(
                f"Prompt {i} ({text!r:.80}) is not a text that the tokenizer takes: {error}."
            ) from error
        if not prompt:
            raise ValueError(f"Prompt {i} ({text!r}) has no token.")
        if len(prompt) + new_tokens > positions:
            raise ValueError(
                f"Prompt {i} has {len(prompt)} tokens; with max_new_tokens={new_tokens} it exceeds "
                f"the model's {positions} positions."
            )
        encoded.append(row)
        ids.append(prompt)
        from_messages.append(in_chat)
    return Prompts(encoded, *pad(ids, pad_id=pad_id, left=True), np.array(from_messages))


def batch_rows(n: int, batch_size: int, update: int, *, seed: int) -> np.ndarray:
    """Return the row numbers of the batch of one update, `[batch_size]`.

    The batches are cut from an endless stream of permutations of `n` rows, a new permutation for
    each pass. The result depends on the arguments alone, so a resumed run reads the same batches.

    Args:
      n: number of rows.
      batch_size: rows of a batch.
      update: number of the update, from 0.
      seed: seed of the permutations.

    Returns:
      `[batch_size]` int64 row numbers.

    Example:
      >>> sorted(np.concatenate([batch_rows(4, 2, u, seed=0) for u in (0, 1)]).tolist())
      [0, 1, 2, 3]
    """
    first = update * batch_size
    passes = range(first // n, (first + batch_size - 1) // n + 1)
    stream = np.concatenate([np.random.default_rng((seed, p)).permutation(n) for p in passes])
    return stream[first % n :][:batch_size]
