"""Rows of texts from a list, a file or a `datasets` dataset."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from ppo_jax.data.chat import is_messages

Row = dict[str, Any]


def read_rows(
    source: str | Path | Iterable[str | Row],
    *,
    columns: Sequence[str] = ("prompt",),
    optional: Sequence[str] = (),
) -> list[Row]:
    """Read rows from a list, a `datasets` dataset, a `.jsonl` file or a text file.

    Args:
      source: texts or rows in any iterable, or the path of a file. A `.jsonl` or `.json` file holds
        one JSON object or string a line, and any other file one text a line. Empty lines are
        skipped.
      columns: the columns that every row must have, each a text or a list of
        `{"role": ..., "content": ...}` messages. A row that is only a text becomes the first of
        these columns.
      optional: columns that a row may leave out, and otherwise are like `columns`.

    Returns:
      One dictionary a row, with all its columns.

    Raises:
      ValueError: if the file cannot be read, a column is missing or is neither a text nor messages,
        or there are no rows.

    Example:
      >>> read_rows(["2 + 2 =", {"prompt": "3 + 4 =", "answer": 7}])
      [{'prompt': '2 + 2 ='}, {'prompt': '3 + 4 =', 'answer': 7}]
    """
    name, items = (
        (source, _read_file(Path(source)))
        if isinstance(source, str | Path)
        else ("the given list", source)
    )
    rows = []
    for number, item in enumerate(items):
        row = {columns[0]: item} if isinstance(item, str) else item
        for column in (*columns, *optional):
            value = row.get(column) if isinstance(row, dict) else None
            left_out = column in optional and value is None
            if not (left_out or isinstance(value, str) or is_messages(value)):
                raise ValueError(
                    f"Row {number} of {name} needs a text or messages in its column {column!r}, "
                    f"but is {row!r:.80}."
                )
        rows.append(row)
    if not rows:
        raise ValueError(f"There is no {columns[0]} in {name}.")
    return rows


def _read_file(path: Path) -> list[Any]:
    """Return the lines of a file that are not empty, decoded if they are JSON."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read: {error}.") from error
    # Not `splitlines`, which also splits at separators that may occur within a text.
    lines = [line for line in text.split("\n") if line.strip()]
    if path.suffix not in (".jsonl", ".json"):
        return lines
    try:
        return [json.loads(line) for line in lines]
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} must hold one JSON object a line: {error}.") from error
