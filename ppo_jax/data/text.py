"""Conversion between texts and padded arrays of token ids."""

from collections.abc import Sequence
from typing import Any

import numpy as np


def pad(
    sequences: Sequence[Sequence[int]], *, length: int | None = None, pad_id: int, left: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Pad lists of token ids on one side to arrays of the same length.

    Args:
      sequences: `n` lists of token ids.
      length: number of columns; by default the length of the longest list.
      pad_id: the id written outside the mask.
      left: whether to pad on the left (prompts) or on the right (texts that are read whole).

    Returns:
      Token ids `[n, length]` int32 and the mask of the real tokens `[n, length]` bool.

    Example:
      >>> pad([[1, 2], [3]], pad_id=0, left=True)[0]
      array([[1, 2],
             [0, 3]], dtype=int32)
    """
    shape = (len(sequences), max(map(len, sequences)) if length is None else length)
    tokens, mask = np.full(shape, pad_id, np.int32), np.zeros(shape, bool)
    for i, ids in enumerate(sequences):
        columns = slice(shape[1] - len(ids), None) if left else slice(len(ids))
        tokens[i, columns], mask[i, columns] = ids, True
    return tokens, mask


def encode_text(tokenizer: Any, text: str, *, keep_end: bool, **options: Any) -> list[int]:
    """Tokenize a text, with exactly one opening token and with or without its closing tokens.

    A tokenizer may add special tokens before and after a text. If the text, for example one made by
    a chat template, already begins with the opening token, only one of the two is kept.

    Args:
      tokenizer: the tokenizer.
      text: the text.
      keep_end: whether to keep the special tokens that the tokenizer adds after the text, such as
        BERT's `[SEP]`. Without them the text can be continued. A special token that the text itself
        holds at its end is kept in both cases.
      **options: further arguments of the tokenizer, such as `add_special_tokens` or `truncation`.

    Returns:
      The token ids.
    """
    encoded = tokenizer(text, return_special_tokens_mask=True, **options)
    ids, added = encoded.input_ids, encoded.special_tokens_mask
    end = len(ids)
    while not keep_end and end > 1 and added[end - 1]:
        end -= 1
    opens_twice = list(added[:2]) == [1, 0] and ids[0] == ids[1]
    return list(ids[opens_twice:end])


def end_id(tokenizer: Any) -> int | None:
    """Return the id of the end token, or of the separator if, as in BERT, there is no end token."""
    return tokenizer.sep_token_id if tokenizer.eos_token_id is None else tokenizer.eos_token_id


def pad_id(tokenizer: Any, vocab_size: int) -> int:
    """Return the id to write at positions of padding; masks make any id safe as padding.

    Args:
      tokenizer: the tokenizer.
      vocab_size: number of tokens in the model's vocabulary.

    Returns:
      The tokenizer's pad id, else its end id, else 0; the first of them that the model has.
    """
    ids = (tokenizer.pad_token_id, tokenizer.eos_token_id)
    return next((i for i in ids if i is not None and i < vocab_size), 0)


def check_ids(tokens: np.ndarray, vocab_size: int) -> None:
    """Check that the model's vocabulary has every token.

    Args:
      tokens: `[n, length]` int32.
      vocab_size: number of tokens in the model's vocabulary.

    Raises:
      ValueError: if an id is `vocab_size` or greater.
    """
    if tokens.size and tokens.max() >= vocab_size:
        row = int(np.argmax(tokens.max(axis=1)))
        raise ValueError(
            f"Text {row} holds the token id {tokens.max()}, but the model's vocabulary has only "
            f"vocab_size={vocab_size} tokens."
        )


def decode(tokenizer: Any, tokens: np.ndarray, mask: np.ndarray, *, start: int = 0) -> list[str]:
    """Decode the real tokens of each row from column `start` on, without special tokens.

    Many tokenizers attach the space between two words to the second word, or to neither, and drop
    it at the start of a text. A response is therefore decoded together with the end of its prompt,
    and the prompt's text is cut off. It is decoded alone if the prompt's text would change with it.

    Args:
      tokenizer: the tokenizer.
      tokens: `[n, length]` int32.
      mask: `[n, length]` bool, the real tokens.
      start: the first column to decode; the columns before it hold the prompt.

    Returns:
      One text for each row.
    """
    tokens, mask = np.asarray(tokens), np.asarray(mask)
    if not len(tokens):  # Some tokenizers return one text for no rows.
        return []

    def decode_columns(first: int, last: int | None = None) -> list[str]:
        columns = zip(tokens[:, first:last], mask[:, first:last], strict=True)
        rows = [row[real].tolist() for row, real in columns]
        return tokenizer.batch_decode(rows, skip_special_tokens=True)

    alone = decode_columns(start)
    if not start:
        return alone
    near = max(start - 16, 0)  # The last tokens of a prompt suffice.
    return [
        text[len(prompt) :] if text.startswith(prompt) else response
        for text, prompt, response in zip(
            decode_columns(near), decode_columns(near, start), alone, strict=True
        )
    ]
