"""Texts to token ids and back."""

from collections.abc import Sequence
from typing import Any

import numpy as np


def pad(
    sequences: Sequence[Sequence[int]], *, length: int | None = None, pad_id: int, left: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Token lists to `[n, length]` int32 and their mask, padded on one side.

    Example:
      >>> pad([[1, 2], [3]], pad_id=0, left=True)[0]
      array([[1, 2],
             [0, 3]], dtype=int32)
    """
    length = max(map(len, sequences)) if length is None else length
    tokens, mask = (
        np.full((len(sequences), length), pad_id, np.int32),
        np.zeros((len(sequences), length), bool),
    )
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


def check_ids(tokens: np.ndarray, vocab_size: int) -> None:
    """Raises ValueError if there is an id that the model has no word for."""
    if tokens.size and tokens.max() >= vocab_size:
        row = int(np.argmax(tokens.max(axis=1)))
        raise ValueError(
            f"Text {row} holds the token {tokens.max()}, for which the model, with vocab_size={vocab_size}, has no word."
        )


def decode(tokenizer: Any, tokens: np.ndarray, mask: np.ndarray, *, start: int = 0) -> list[str]:
    """Texts of the real tokens of each row from column `start` on, as they read after those before; special tokens left out.

    Many tokenizers hold the space between words in the later word, or in none, and leave it out at the start of a text. So a
    response is decoded behind the end of its prompt, which is then cut off; alone where the prompt would read otherwise for it.
    """
    tokens, mask = np.asarray(tokens), np.asarray(mask)
    near = max(start - 16, 0)  # a prompt's last tokens tell, and a long one costs no time
    texts = lambda first, last: tokenizer.batch_decode(
        [
            row[real].tolist()
            for row, real in zip(tokens[:, first:last], mask[:, first:last], strict=True)
        ],
        skip_special_tokens=True,
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


def pad_id(tokenizer: Any) -> int:
    """The tokenizer's pad id, or its end id, or 0: any will do, it is never read."""
    return next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)
