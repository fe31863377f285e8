"""Texts into arrays: prompts from a list, a file or a `datasets` dataset; padding; shuffled batches that never repeat a key."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from ppo_jax.data import chat
from ppo_jax.data.text import encode_text, pad


@dataclasses.dataclass(frozen=True)
class Prompts:
    """Left-padded prompts.

    Attributes:
      rows: what each came as, `{"prompt": text, ...}`; further columns are for the reward. A prompt that came as messages is the
        text that the chat template made of them, and they are in the column `messages`.
      tokens: `[n, P]` int32.
      mask: `[n, P]` bool.
      told: `[n]` bool, which came as messages; none, if it is None.
    """

    rows: Sequence[dict[str, Any]]
    tokens: np.ndarray
    mask: np.ndarray
    told: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def texts(self) -> list[str]:
        return [row["prompt"] for row in self.rows]

    @property
    def chats(self) -> list[list[dict[str, Any]] | None]:
        """The messages of those that came as such."""
        told = np.zeros(len(self), bool) if self.told is None else self.told
        return [row["messages"] if one else None for row, one in zip(self.rows, told, strict=True)]

    def take(self, indices: np.ndarray) -> "Prompts":
        told = None if self.told is None else self.told[indices]
        return Prompts(
            [self.rows[i] for i in indices], self.tokens[indices], self.mask[indices], told
        )

    def padded(self, positions: int) -> "Prompts":
        """The same in at least so many positions, at their right end as before."""
        before = ((0, 0), (max(0, positions - self.tokens.shape[1]), 0))
        return Prompts(self.rows, np.pad(self.tokens, before), np.pad(self.mask, before), self.told)


def encode_prompts(
    rows: Sequence[dict[str, Any]], tokenizer: Any, *, positions: int, new_tokens: int, pad_id: int
) -> Prompts:
    """Tokenizes prompts, those of messages through the tokenizer's chat template.

    Raises:
      ValueError: if a prompt is empty, or leaves no room for a response within the model's positions.
    """
    told = [chat.is_chat(row["prompt"]) for row in rows]
    if any(told):
        if getattr(tokenizer, "chat_template", None) is None:
            raise ValueError(
                "Prompts of messages need a tokenizer with a chat template; this one has none."
            )
        rows = [
            chat.through_template(row, tokenizer) if one else row
            for row, one in zip(rows, told, strict=True)
        ]
    ids = []
    for i, row in enumerate(rows):
        try:  # a template writes its own special tokens
            ids.append(
                encode_text(tokenizer, row["prompt"], closed=False, add_special_tokens=not told[i])
            )
        except (TypeError, UnicodeError) as error:
            raise ValueError(
                f"Prompt {i} ({row['prompt']!r:.80}) is no text that the tokenizer takes: {error}."
            ) from error
    for i, prompt in enumerate(ids):
        if not prompt:
            raise ValueError(f"Prompt {i} ({rows[i]['prompt']!r}) has no token.")
        if len(prompt) + new_tokens > positions:
            raise ValueError(
                f"Prompt {i} has {len(prompt)} tokens; with max_new_tokens={new_tokens} it exceeds the model's {positions} "
                "positions."
            )
    return Prompts(rows, *pad(ids, pad_id=pad_id, left=True), np.asarray(told))


def batch_rows(n: int, batch_size: int, update: int, *, seed: int) -> np.ndarray:
    """Row numbers of batch `update`, from a stream of permutations of `n` rows, a fresh one each pass: `[batch_size]`.

    A function of its arguments alone, so a run can go on from any update.

    Example:
      >>> sorted(np.concatenate([batch_rows(4, 2, u, seed=0) for u in (0, 1)]).tolist())
      [0, 1, 2, 3]
    """
    first = update * batch_size
    passes = range(first // n, (first + batch_size - 1) // n + 1)
    stream = np.concatenate([np.random.default_rng((seed, p)).permutation(n) for p in passes])
    start = first - passes[0] * n
    return stream[start : start + batch_size]
