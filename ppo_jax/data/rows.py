"""Rows of texts from a list, a file or a `datasets` dataset."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from ppo_jax.data.chat import is_messages
from ppo_jax.data.files import read_file

Row = dict[str, Any]


def read_rows(
    source: str | Path | Iterable[str | Row],
    *,
    columns: Sequence[str] = ("prompt",),
    optional: Sequence[str] = (),
) -> list[Row]:
    """Read rows from a list, a `datasets` dataset, a file of texts or JSON lines, or a table.

    Args:
      source: texts or rows in any iterable, or the path of a file. A `.jsonl`, `.ndjson` or `.json`
        file holds one JSON object or string a line, or one list of them. A `.csv` or `.tsv` file
        begins with a line of column names; its cells are texts, and a cell may hold messages as
        JSON. A `.txt` file, or one without an ending, holds one text a line. Empty lines are
        skipped. Other files are refused.
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
    if isinstance(source, str | Path):
        name, items = str(source), read_file(Path(source), columns)
    else:
        name, items = "the given list", [(f"Row {i}", item) for i, item in enumerate(source)]
    rows = []
    for place, item in items:
        row = {columns[0]: item} if isinstance(item, str) else item
        if not isinstance(row, dict):
            raise ValueError(f"{place} of {name} needs columns with names, but is {row!r:.80}.")
        for column in (*columns, *optional):
            value = row.get(column)
            left_out = column in optional and value is None
            if not (left_out or isinstance(value, str) or is_messages(value)):
                names = ", ".join(map(repr, row)) or "none"
                found = (
                    f"which is {value!r:.80}" if column in row else f"but its columns are: {names}"
                )
                raise ValueError(
                    f"{place} of {name} needs a text or messages in its column {column!r}, {found}."
                )
        rows.append(row)
    if not rows:
        raise ValueError(f"There is no {columns[0]} in {name}.")
    return rows
