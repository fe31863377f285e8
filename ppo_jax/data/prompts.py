"""Tokenized prompts, and the shuffled order in which a run reads them."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from ppo_jax.data import chat
from ppo_jax.data.rows import Row
from ppo_jax.data.text import encode_text, pad

LongPrompts = Literal["error", "drop", "truncate"]


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
      too_long: number of prompts that were dropped or cut because they were too long.

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
    too_long: int = 0

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
    rows: Sequence[Row],
    tokenizer: Any,
    *,
    positions: int,
    new_tokens: int,
    pad_id: int,
    long_prompts: LongPrompts = "error",
    max_prompt_tokens: int | None = None,
) -> Prompts:
    """Tokenize prompts; prompts that are lists of messages go through the chat template first.

    Args:
      rows: one dictionary a prompt, as `read_rows` returns them, with the text or the messages in
        column `prompt`, and for messages optionally `tools` and `chat_template_kwargs`.
      tokenizer: a `transformers` tokenizer.
      positions: number of positions that the model has.
      new_tokens: greatest number of tokens of a response.
      pad_id: the token id written at padding positions.
      long_prompts: what happens to prompts that are too long. "error" refuses them, "drop" leaves
        them out, and "truncate" cuts their tokens at the beginning, after the opening token. The
        text of a prompt that is cut stays whole.
      max_prompt_tokens: greatest number of tokens of a prompt; None, or a greater number than the
        room that `new_tokens` leave within `positions`, stands for that room.

    Returns:
      The prompts, padded on the left to the longest of them.

    Raises:
      ValueError: if a prompt is not a text that the tokenizer takes, gives no token, or is too long
        and `long_prompts` is "error"; if all prompts are too long to keep; or if there are messages
        but no chat template, or the template raises an exception.

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
    room = positions - new_tokens
    limit = room if max_prompt_tokens is None else min(max_prompt_tokens, room)
    encoded = [_encode_prompt(i, row, tokenizer) for i, row in enumerate(rows)]
    too_long = [i for i, (_, ids, _) in enumerate(encoded) if len(ids) > limit]
    if too_long and (long_prompts == "error" or limit < 1):
        first = len(encoded[too_long[0]][1])
        reason = (
            f"with max_new_tokens={new_tokens} it exceeds the model's {positions} positions"
            if limit == room
            else f"max_prompt_tokens={max_prompt_tokens} allows fewer"
        )
        keep = "pass --long-prompts drop or --long-prompts truncate"
        raise ValueError(
            f"Prompt {too_long[0]} has {first} tokens; {reason}. {len(too_long)} of {len(rows)} "
            f"prompts are too long; {keep if limit > 0 else 'choose a smaller max_new_tokens'}."
        )
    if long_prompts == "drop":
        if len(too_long) == len(rows):
            raise ValueError(
                f"All {len(rows)} prompts have more than {limit} tokens, so that --long-prompts "
                "drop leaves none; pass --long-prompts truncate."
            )
        dropped = set(too_long)
        encoded = [item for i, item in enumerate(encoded) if i not in dropped]
    elif too_long:
        for i in too_long:
            encoded[i] = _encode_prompt(i, rows[i], tokenizer, length=limit)
    kept, ids, from_messages = zip(*encoded, strict=True)
    tokens, mask = pad(ids, pad_id=pad_id, left=True)
    return Prompts(list(kept), tokens, mask, np.array(from_messages), len(too_long))


def _encode_prompt(
    i: int, row: Row, tokenizer: Any, length: int | None = None
) -> tuple[Row, list[int], bool]:
    """Return the row of prompt `i` with its text, its tokens, and whether it was messages."""
    in_chat = chat.is_messages(row["prompt"])
    if in_chat:
        if getattr(tokenizer, "chat_template", None) is None:
            raise ValueError(
                "Prompts of messages need a tokenizer with a chat template; this one has none. "
                "Put the template of another model, chat_template.jinja, into the model's folder."
            )
        text = chat.render_prompt(row["prompt"], tokenizer, **chat.template_options(row))
        row = {**row, "prompt": text, "messages": row["prompt"]}
    text = row["prompt"]
    try:
        # A chat template writes the special tokens itself.
        ids = encode_text(
            tokenizer, text, keep_end=False, length=length, add_special_tokens=not in_chat
        )
    except (TypeError, UnicodeError) as error:
        raise ValueError(
            f"Prompt {i} ({text!r:.80}) is not a text that the tokenizer takes: {error}."
        ) from error
    if not ids:
        raise ValueError(f"Prompt {i} ({text!r}) has no token.")
    return row, ids, in_chat


def batch_rows(
    n: int, batch_size: int, update: int, *, seed: int, group_size: int = 1
) -> np.ndarray:
    """Return the row numbers of the batch of one update, `[batch_size]`.

    The batches are cut from an endless stream of permutations of `n` rows, a new permutation for
    each pass. The result depends on the arguments alone, so a resumed run reads the same batches.

    Args:
      n: number of rows.
      batch_size: rows of a batch.
      update: number of the update, from 0.
      seed: seed of the permutations.
      group_size: how often each row is repeated in the batch; it must divide `batch_size`.

    Returns:
      `[batch_size]` int64 row numbers.

    Example:
      >>> sorted(np.concatenate([batch_rows(4, 2, u, seed=0) for u in (0, 1)]).tolist())
      [0, 1, 2, 3]
    """
    count = batch_size // group_size
    first = update * count
    passes = range(first // n, (first + count - 1) // n + 1)
    stream = np.concatenate([np.random.default_rng((seed, p)).permutation(n) for p in passes])
    return np.repeat(stream[first % n :][:count], group_size)
