"""Texts into arrays: prompts from a list, a file or a `datasets` dataset; padding; shuffled batches that never repeat a key."""

import dataclasses
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ppo_jax import chat


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
        return Prompts([self.rows[i] for i in indices], self.tokens[indices], self.mask[indices], told)

    def padded(self, positions: int) -> "Prompts":
        """The same in at least so many positions, at their right end as before."""
        before = ((0, 0), (max(0, positions - self.tokens.shape[1]), 0))
        return Prompts(self.rows, np.pad(self.tokens, before), np.pad(self.mask, before), self.told)


def read_rows(source: str | Path | Iterable[str | dict[str, Any]], *, columns: Sequence[str] = ("prompt",)) -> list[dict[str, Any]]:
    """Rows of a list, a `datasets` dataset, a `.jsonl` file (one object a line) or a text file (one text a line).

    Args:
      source: any of those.
      columns: texts that every row must have (or lists of messages, `{"role": ..., "content": ...}`); a bare text is the first.

    Raises:
      ValueError: if the file cannot be read, a row lacks a column or has no text there, or nothing is there.
    """
    if isinstance(source, str | Path):
        path = Path(source)
        try:
            lines = [line for line in path.read_text(encoding="utf-8-sig").split("\n") if line.strip()]
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"{path} cannot be read: {error}.") from error
        items: Iterable = lines
        if path.suffix in (".jsonl", ".json"):
            try:
                items = [json.loads(line) for line in lines]
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{path} must hold one JSON object a line: {error}.") from error
    else:
        items = source
    rows = []
    for number, item in enumerate(items):
        row = {columns[0]: item} if isinstance(item, str) else item
        for column in columns:
            if not isinstance(row, dict) or not (isinstance(row.get(column), str) or chat.is_chat(row.get(column))):
                has = f"has {', '.join(map(repr, row)) or 'none'}" if isinstance(row, dict) else f"is {row!r:.60}"
                raise ValueError(f"Row {number} needs a text in its column {column!r}; it {has}.")
        rows.append(row)
    if not rows:
        raise ValueError(f"There is no {columns[0]} in {source if isinstance(source, str | Path) else 'the given list'}.")
    return rows


def pad(sequences: Sequence[Sequence[int]], *, length: int | None = None, pad_id: int, left: bool) -> tuple[np.ndarray, np.ndarray]:
    """Token lists to `[n, length]` int32 and their mask, padded on one side.

    Example:
      >>> pad([[1, 2], [3]], pad_id=0, left=True)[0]
      array([[1, 2],
             [0, 3]], dtype=int32)
    """
    length = max(map(len, sequences)) if length is None else length
    tokens, mask = np.full((len(sequences), length), pad_id, np.int32), np.zeros((len(sequences), length), bool)
    for i, ids in enumerate(sequences):
        at = slice(length - len(ids), length) if left else slice(0, len(ids))
        tokens[i, at], mask[i, at] = ids, True
    return tokens, mask


def encode_text(tokenizer: Any, text: str, *, closed: bool, **options: Any) -> list[int]:
    """Ids of a text between the marks that its tokenizer puts around it.

    The opening mark stands once, though the text (of a chat template) may begin with it too. `closed=False` leaves out those after
    the text, such as [SEP], so that the text can go on; one that the text itself holds stays.
    """
    coded = tokenizer(text, return_special_tokens_mask=True, **options)
    ids, marks = coded.input_ids, coded.special_tokens_mask
    end = len(ids)
    while not closed and end > 1 and marks[end - 1]:
        end -= 1
    twice = list(marks[:2]) == [1, 0] and ids[0] == ids[1]
    return list(ids[twice:end])


def end_id(tokenizer: Any) -> int | None:
    """The id that ends a text: the tokenizer's end token, or the separator where (as BERT's) it has none."""
    return tokenizer.sep_token_id if tokenizer.eos_token_id is None else tokenizer.eos_token_id


def encode_prompts(rows: Sequence[dict[str, Any]], tokenizer: Any, *, positions: int, new_tokens: int, pad_id: int) -> Prompts:
    """Tokenizes prompts, those of messages through the tokenizer's chat template.

    Raises:
      ValueError: if a prompt is empty, or leaves no room for a response within the model's positions.
    """
    told = [chat.is_chat(row["prompt"]) for row in rows]
    if any(told):
        if getattr(tokenizer, "chat_template", None) is None:
            raise ValueError("Prompts of messages need a tokenizer with a chat template; this one has none.")
        rows = [chat.through_template(row, tokenizer) if one else row for row, one in zip(rows, told, strict=True)]
    ids = []
    for i, row in enumerate(rows):
        try:  # a template writes its own special tokens
            ids.append(encode_text(tokenizer, row["prompt"], closed=False, add_special_tokens=not told[i]))
        except (TypeError, UnicodeError) as error:
            raise ValueError(f"Prompt {i} ({row['prompt']!r:.80}) is no text that the tokenizer takes: {error}.") from error
    for i, prompt in enumerate(ids):
        if not prompt:
            raise ValueError(f"Prompt {i} ({rows[i]['prompt']!r}) has no token.")
        if len(prompt) + new_tokens > positions:
            raise ValueError(
                f"Prompt {i} has {len(prompt)} tokens; with max_new_tokens={new_tokens} it exceeds the model's {positions} "
                "positions."
            )
    return Prompts(rows, *pad(ids, pad_id=pad_id, left=True), np.asarray(told))


def check_ids(tokens: np.ndarray, vocab_size: int) -> None:
    """Raises ValueError if there is an id that the model has no word for."""
    if tokens.size and tokens.max() >= vocab_size:
        row = int(np.argmax(tokens.max(axis=1)))
        raise ValueError(
            f"Text {row} holds the token {tokens.max()}, for which the model, with vocab_size={vocab_size}, has no word."
        )


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


def decode(tokenizer: Any, tokens: np.ndarray, mask: np.ndarray, *, start: int = 0) -> list[str]:
    """Texts of the real tokens of each row from column `start` on, as they read after those before; special tokens left out.

    Many tokenizers hold the space between words in the later word, or in none, and leave it out at the start of a text. So a
    response is decoded behind the end of its prompt, which is then cut off; alone where the prompt would read otherwise for it.
    """
    tokens, mask = np.asarray(tokens), np.asarray(mask)
    near = max(start - 16, 0)  # a prompt's last tokens tell, and a long one costs no time
    texts = lambda first, last: tokenizer.batch_decode(
        [row[real].tolist() for row, real in zip(tokens[:, first:last], mask[:, first:last], strict=True)], skip_special_tokens=True
    )
    if not len(tokens):  # some tokenizers give a text for no row
        return []
    alone = texts(start, None)
    if not start:
        return alone
    return [
        both[len(before) :] if both.startswith(before) else one
        for both, before, one in zip(texts(near, None), texts(near, start), alone, strict=True)
    ]
