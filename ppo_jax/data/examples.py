"""Training examples of the supervised stages: rows of texts or messages as padded arrays."""

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from ppo_jax.data import chat
from ppo_jax.data.rows import Row
from ppo_jax.data.text import encode_continuation, encode_text, end_id, pad

LearnFrom = Literal["pairs", "scores", "classes"]


def split(
    arrays: tuple[np.ndarray, ...], *, seed: int, fraction: float = 0.1
) -> tuple[tuple[np.ndarray, ...], tuple[np.ndarray, ...]]:
    """Hold out a random part of the rows, at least one.

    Args:
      arrays: `[n, ...]` each, with `n` of at least 2.
      seed: seed of the random choice.
      fraction: the share of the rows that is held out, between 0 and 1.

    Returns:
      The rows to learn from and the rows that are held out.

    Example:
      >>> [len(rows) for rows, in split((np.arange(20),), seed=0)]
      [18, 2]
    """
    order = np.random.default_rng(seed).permutation(len(arrays[0]))
    count = min(max(int(len(order) * fraction), 1), len(order) - 1)
    return tuple(x[order[count:]] for x in arrays), tuple(x[order[:count]] for x in arrays)


def encode_demonstrations(
    rows: Sequence[Row], tokenizer: Any, *, length: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tokenize prompts with their responses for supervised fine-tuning.

    A prompt and its response are tokenized as one text. A response ends with the tokenizer's end
    token or, if its prompt is a list of messages, with the token that ends a turn in the chat
    template. A row that is longer than `length` is cut at its end. A row of which only the prompt
    remains is left out, because it teaches nothing.

    Args:
      rows: dictionaries with a column `response` and optionally `prompt`, each a text or messages,
        and for messages optionally `tools` and `chat_template_kwargs`.
      tokenizer: the tokenizer.
      length: number of tokens that each row is cut or padded to.

    Returns:
      For the `n` rows that are kept, token ids `[n, length]` int32, their mask `[n, length]` bool,
      and the mask of the response's tokens `[n, length]` bool, from which the model learns.

    Raises:
      ValueError: if the chat template raises an exception.
    """
    ends = [i for i in [end_id(tokenizer)] if i is not None]
    turn_ends = list(chat.end_of_turn_ids(tokenizer)) or ends
    encoded, starts = [], []
    for row in rows:
        prompt, response, in_chat = _demonstration(row, tokenizer, turn_ends)
        ids, start = encode_continuation(
            tokenizer, prompt, response, add_special_tokens=not in_chat
        )
        ids = [*ids, *(turn_ends if in_chat else ends)][:length]
        if len(ids) > max(start, 1):  # Nothing predicts the first token of a row.
            encoded.append(ids)
            starts.append(start)
    tokens, mask = pad(encoded, length=length, pad_id=0, left=False)
    return tokens, mask, mask & (np.arange(length) >= np.array(starts, np.int32)[:, None])


def _demonstration(row: Row, tokenizer: Any, turn_ends: Sequence[int]) -> tuple[str, str, bool]:
    """Return the text before a response, the response's text, and whether they are a chat.

    The response is the last message of a conversation. If the prompt ends with the assistant's
    opening words, the response is what follows them.
    """
    prompt: Any = row.get("prompt")
    response = row["response"]
    messages = chat.join_messages(prompt, response)
    if messages is None:
        return prompt or "", response, False
    *earlier, last = messages
    text = chat.content_of(last)
    if not earlier:
        return "", text, False
    options = chat.template_options(row)
    before = chat.render_prompt(earlier, tokenizer, **options)
    if last.get("tool_calls"):
        return before, _tool_calls(messages, before, tokenizer, turn_ends, options), True
    opening = ""
    if chat.is_messages(prompt) and len(prompt) == len(messages) and prompt != messages:
        opening = chat.content_of(prompt[-1])
    return before + opening, text.removeprefix(opening), True


def _tool_calls(
    messages: Sequence[chat.Message],
    before: str,
    tokenizer: Any,
    turn_ends: Sequence[int],
    options: dict[str, Any],
) -> str:
    """Return the last message as the chat template writes it, without the mark of its end."""
    text = chat.render_conversation(None, list(messages), tokenizer, **options) or ""
    if not text.startswith(before):
        raise ValueError(
            "The tokenizer's chat template does not write tool calls as an answer of the "
            f"assistant, so they cannot be learned: {messages[-1]!r:.200}."
        )
    response = text.removeprefix(before)
    for mark in tokenizer.convert_ids_to_tokens(list(turn_ends)):
        response = response.rpartition(mark)[0] or response
    return response


def encode_answer(
    prompt: Any, answer: Any, tokenizer: Any, *, length: int, options: dict[str, Any] | None = None
) -> list[int]:
    """Tokenize a prompt and its answer as one text, as a reward model reads them.

    Args:
      prompt: a text, a list of messages, or None.
      answer: a text or a list of messages. If either is messages, the chat template renders both.
      tokenizer: the tokenizer of the reward model.
      length: greatest number of tokens; a longer text is cut at its beginning.
      options: what `chat.template_options` returns.

    Returns:
      The token ids.

    Raises:
      ValueError: if the chat template raises an exception.
    """
    rendered = chat.render_conversation(prompt, answer, tokenizer, **(options or {}))
    text = (prompt or "") + answer if rendered is None else rendered
    return encode_text(
        tokenizer, text, keep_end=True, length=length, add_special_tokens=rendered is None
    )


def answer_columns(learn_from: LearnFrom) -> tuple[str, ...]:
    """Return the columns of texts that a reward model learns from."""
    return ("chosen", "rejected") if learn_from == "pairs" else ("response",)


def encode_judgements(
    rows: Sequence[Row], tokenizer: Any, learn_from: LearnFrom, *, length: int
) -> tuple[np.ndarray, ...]:
    """Tokenize judged answers for the training of a reward model.

    A text that is longer than `length` is cut at its beginning, as when the model scores it. A pair
    whose two texts are then equal is left out, because it teaches nothing.

    Args:
      rows: dictionaries with the columns `answer_columns(learn_from)`, optionally `prompt`, and
        `score` unless the rows are pairs. For messages, `tools` and `chat_template_kwargs` may be
        given as well.
      tokenizer: the tokenizer.
      learn_from: "pairs" (a chosen and a rejected answer), "scores" (any number) or "classes" (a
        whole number from 0).
      length: number of tokens that each text is cut or padded to.

    Returns:
      For each column of texts, token ids `[n, length]` int32 and their mask `[n, length]` bool of
      the `n` rows that are kept. Then, unless the rows are pairs, the scores `[n]` float32 or the
      classes `[n]` int32.

    Raises:
      ValueError: if a text gives no token, a score is not a number of its kind, or the chat
        template raises an exception.
    """
    columns = answer_columns(learn_from)
    texts: list[list[list[int]]] = []
    for i, row in enumerate(rows):
        prompt, options = row.get("prompt"), chat.template_options(row)
        ids = [
            encode_answer(prompt, row[column], tokenizer, length=length, options=options)
            for column in columns
        ]
        if not all(ids):
            raise ValueError(f"Row {i} has no text in {columns[ids.index([])]!r}.")
        texts.append(ids)
    scores = [] if learn_from == "pairs" else [_scores(rows, classes=learn_from == "classes")]
    if learn_from == "pairs":
        texts = [ids for ids in texts if ids[0] != ids[1]]
    arrays: list[np.ndarray] = []
    for column in range(len(columns)):
        arrays += pad([ids[column] for ids in texts], length=length, pad_id=0, left=False)
    return (*arrays, *scores)


def _scores(rows: Sequence[Row], *, classes: bool) -> np.ndarray:
    """Return column `score`, `[n]` float32, or int32 if the scores are classes."""
    scores = []
    for i, row in enumerate(rows):
        try:
            score = float(row.get("score"))  # type: ignore[arg-type]  # None raises TypeError
        except (TypeError, ValueError):
            score = np.nan
        if not np.isfinite(score) or (classes and (score < 0 or score % 1)):
            kind = "class 0, 1, 2, ..." if classes else "number"
            advice = "; for words, pass --learn-from classes" if not classes else ""
            raise ValueError(
                f"Row {i} needs a {kind} in 'score', not {row.get('score')!r}{advice}."
            )
        scores.append(score)
    return np.asarray(scores, np.int32 if classes else np.float32)
