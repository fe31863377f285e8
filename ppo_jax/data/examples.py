"""Training examples of the supervised stages: rows of texts or messages as padded arrays."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ppo_jax.data import chat
from ppo_jax.data.rows import Row, read_rows
from ppo_jax.data.text import encode_text, end_id, pad

LearnFrom = Literal["pairs", "scores", "classes"]


def read_split(
    path: Path, eval_path: Path | None, columns: Sequence[str], *, seed: int
) -> tuple[list[Row], list[Row]]:
    """Read training rows and held-out rows, which may have a column `prompt`.

    Args:
      path: file of the training rows.
      eval_path: file of the held-out rows. If it is None, a random tenth of the training rows, at
        least one, is held out instead.
      columns: the columns that every row must have, each a text or a list of messages.
      seed: seed of the random choice.

    Returns:
      The rows to learn from and the rows that are held out.

    Raises:
      ValueError: if `read_rows` raises it, or a single row cannot be split.
    """
    read = partial(read_rows, columns=columns, optional=("prompt",))
    rows = read(path)
    if eval_path is not None:
        return rows, read(eval_path)
    if len(rows) < 2:
        raise ValueError(
            f"{path} holds one row; one more is needed to be held out, or pass --eval-data."
        )
    shuffled = [rows[i] for i in np.random.default_rng(seed).permutation(len(rows))]
    count = max(len(rows) // 10, 1)
    return shuffled[count:], shuffled[:count]


def encode_demonstrations(
    rows: Sequence[Row], tokenizer: Any, *, length: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tokenize prompts with their responses for supervised fine-tuning.

    The opening token of the tokenizer is written once, at the beginning of a row. A response ends
    with the tokenizer's end token, or, if its prompt is a list of messages, with the token that
    ends a turn in the chat template.

    Args:
      rows: dictionaries with a column `response` and optionally `prompt`, each a text or messages.
      tokenizer: the tokenizer.
      length: number of tokens that each row is cut or padded to.

    Returns:
      Token ids `[n, length]` int32, their mask `[n, length]` bool, and the mask of the response's
      tokens `[n, length]` bool, from which the model learns.

    Raises:
      ValueError: if the chat template raises an exception, or a response's last message has no
        text.
    """
    ends = [i for i in [end_id(tokenizer)] if i is not None]
    turn_ends = chat.end_of_turn_ids(tokenizer) or ends
    ids, starts = [], []
    for row in rows:
        prompt, response = _split_response(row)
        in_chat = chat.is_messages(prompt)
        text = chat.render_prompt(prompt, tokenizer) if in_chat else prompt
        before = (
            encode_text(tokenizer, text, keep_end=False, add_special_tokens=not in_chat)
            if text
            else []
        )
        after = encode_text(tokenizer, response, keep_end=False, add_special_tokens=not before)
        ids.append([*before, *after, *(turn_ends if in_chat else ends)][:length])
        starts.append(len(before))
    tokens, mask = pad(ids, length=length, pad_id=0, left=False)
    return tokens, mask, mask & (np.arange(length) >= np.array(starts)[:, None])


def _split_response(row: Row) -> tuple[Any, str]:
    """Return the prompt and the response, which is the last message of a conversation."""
    messages = chat.join_messages(row.get("prompt"), row["response"])
    if messages is None:
        return row.get("prompt"), row["response"]
    response = messages[-1]["content"]
    if not isinstance(response, str):
        raise ValueError(
            f"A response's last message needs a text as its content, not {response!r:.60}."
        )
    return messages[:-1] or row.get("prompt"), response


def encode_answer(prompt: Any, answer: Any, tokenizer: Any, **options: Any) -> list[int]:
    """Tokenize a prompt and its answer as one text, as a reward model reads them.

    Args:
      prompt: a text, a list of messages, or None.
      answer: a text or a list of messages. If either is messages, the chat template renders both.
      tokenizer: the tokenizer of the reward model.
      **options: further arguments of the tokenizer, such as `truncation`.

    Returns:
      The token ids.

    Raises:
      ValueError: if the chat template raises an exception.
    """
    rendered = chat.render_conversation(prompt, answer, tokenizer)
    text = (prompt or "") + answer if rendered is None else rendered
    return encode_text(
        tokenizer, text, keep_end=True, add_special_tokens=rendered is None, **options
    )


def answer_columns(learn_from: LearnFrom) -> tuple[str, ...]:
    """Return the columns of texts that a reward model learns from."""
    return ("chosen", "rejected") if learn_from == "pairs" else ("response",)


def encode_judgements(
    rows: Sequence[Row], tokenizer: Any, learn_from: LearnFrom, *, length: int
) -> tuple[np.ndarray, ...]:
    """Tokenize judged answers for the training of a reward model.

    Args:
      rows: dictionaries with the columns `answer_columns(learn_from)`, optionally `prompt`, and
        `score` unless the rows are pairs.
      tokenizer: the tokenizer.
      learn_from: "pairs" (a chosen and a rejected answer), "scores" (any number) or "classes" (a
        whole number from 0).
      length: number of tokens that each text is cut or padded to.

    Returns:
      For each column of texts, token ids `[n, length]` int32 and their mask `[n, length]` bool.
      Then, unless the rows are pairs, the scores `[n]` float32 or the classes `[n]` int32.

    Raises:
      ValueError: if a text gives no token, a score is not a number of its kind, or the chat
        template raises an exception.
    """
    arrays: list[np.ndarray] = []
    for column in answer_columns(learn_from):
        ids = [encode_answer(row.get("prompt"), row[column], tokenizer)[:length] for row in rows]
        if not all(ids):
            raise ValueError(f"Row {ids.index([])} has no text in {column!r}.")
        arrays += pad(ids, length=length, pad_id=0, left=False)
    if learn_from != "pairs":
        arrays.append(_scores(rows, classes=learn_from == "classes"))
    return tuple(arrays)


def _scores(rows: Sequence[Row], *, classes: bool) -> np.ndarray:
    """Return column `score`, `[n]` float32, or int32 if the scores are classes."""
    scores = [row.get("score") for row in rows]
    for i, score in enumerate(scores):
        if not (
            isinstance(score, int | float)
            and np.isfinite(score)
            and not (classes and (score < 0 or score % 1))
        ):
            kind = "class 0, 1, 2, ..." if classes else "number"
            raise ValueError(f"Row {i} needs a {kind} in 'score', not {score!r}.")
    return np.asarray(scores, np.int32 if classes else np.float32)
