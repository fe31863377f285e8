"""Rows of texts from a list, a file or a `datasets` dataset."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from ppo_jax.data import chat


def read_rows(
    source: str | Path | Iterable[str | dict[str, Any]], *, columns: Sequence[str] = ("prompt",)
) -> list[dict[str, Any]]:
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
            lines = [
                line for line in path.read_text(encoding="utf-8-sig").split("\n") if line.strip()
            ]
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
            if not isinstance(row, dict) or not (
                isinstance(row.get(column), str) or chat.is_chat(row.get(column))
            ):
                has = (
                    f"has {', '.join(map(repr, row)) or 'none'}"
                    if isinstance(row, dict)
                    else f"is {row!r:.60}"
                )
                raise ValueError(f"Row {number} needs a text in its column {column!r}; it {has}.")
        rows.append(row)
    if not rows:
        raise ValueError(
            f"There is no {columns[0]} in {source if isinstance(source, str | Path) else 'the given list'}."
        )
    return rows
