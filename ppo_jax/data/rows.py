"""Rows of texts from a list, a file, a folder or a `datasets` data set."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ppo_jax.data.chat import is_messages
from ppo_jax.data.columns import COMMON_NAMES, choose_columns
from ppo_jax.data.files import Items, check_exists, is_table, read_file
from ppo_jax.data.tables import read_table

Row = dict[str, Any]


def read_rows(
    source: str | Path | Iterable[str | Row],
    *,
    columns: Sequence[str] = ("prompt",),
    optional: Sequence[str] = (),
    names: Mapping[str, Sequence[str]] = COMMON_NAMES,
) -> list[Row]:
    """Read rows from a list, a `datasets` data set, a file or a folder.

    Args:
      source: texts or rows in any iterable, or a name. A `.jsonl`, `.ndjson` or `.json` file holds
        one JSON object or string a line, or one list of them. A `.csv` or `.tsv` file begins with a
        line of column names; its cells are texts, and a cell may hold messages as JSON. A `.txt`
        file, or one without an ending, holds one text a line. Empty lines are skipped. `.parquet`
        files, folders that `save_to_disk` wrote and data sets of the Hugging Face hub are read by
        the library `datasets`, and `:SPLIT` or `:CONFIGURATION:SPLIT` may follow the name of a
        folder or data set. Other files are refused.
      columns: the columns that every row must have, each a text or a list of
        `{"role": ..., "content": ...}` messages, except that `score` may be anything. A row that is
        only a text becomes the first of these columns.
      optional: columns that a row may leave out, and otherwise are like `columns`.
      names: for each of these columns, the names that it may have in the data; the first that the
        data has is taken. A column that `names` does not have is read by its own name. Prompts from
        a column in `names["messages"]` are conversations: if the last message is the assistant's,
        it is left out.

    Returns:
      One dictionary a row, with all its columns.

    Raises:
      ValueError: if the data cannot be read, a column is missing or is neither a text nor messages,
        or there are no rows.

    Example:
      >>> read_rows(["2 + 2 =", {"prompt": "3 + 4 =", "answer": 7}])
      [{'prompt': '2 + 2 ='}, {'prompt': '3 + 4 =', 'answer': 7}]
    """
    name = str(source) if isinstance(source, str | Path) else "The given list"
    items = _items(source, columns)
    if not items:
        raise ValueError(f"There is no {columns[0]} in {name}.")
    rows: list[Row] = []
    for place, item in items:
        row = {columns[0]: item} if isinstance(item, str) else item
        if not isinstance(row, dict):
            raise ValueError(f"{place} of {name} needs columns with names, but is {row!r:.80}.")
        rows.append(row)
    found = dict.fromkeys(column for row in rows for column in row)
    chosen = choose_columns(found, columns, optional, names, name)
    for i, (place, _) in enumerate(items):
        # A column that is not to be read, such as a prompt that a text holds already, is left out.
        row = {k: v for k, v in rows[i].items() if k not in optional or k in chosen}
        for column, given in chosen.items():
            row[column] = value = rows[i].get(given)
            free = column == "score" or (column in optional and value is None)
            if not (free or isinstance(value, str) or is_messages(value)):
                has = ", ".join(map(repr, rows[i])) or "none"
                what = (
                    f"which is {value!r:.80}" if given in rows[i] else f"but its columns are: {has}"
                )
                raise ValueError(
                    f"{place} of {name} needs a text or messages in its column {given!r}, {what}."
                )
        if "prompt" in columns and chosen["prompt"] in names.get("messages", ()):
            row["prompt"] = _without_answer(row["prompt"])
        rows[i] = row
    return rows


def _items(source: str | Path | Iterable[str | Row], columns: Sequence[str]) -> Items:
    """Return the items of a source, each with the place where it stands."""
    if not isinstance(source, str | Path):
        return [(f"Row {i}", item) for i, item in enumerate(source)]
    check_exists(str(source))
    if not is_table(str(source)):
        return read_file(Path(source), columns)
    return [(f"Row {i}", row) for i, row in enumerate(read_table(str(source)))]


def _without_answer(value: Any) -> Any:
    """Leave out the assistant's message that ends a conversation."""
    ends = is_messages(value) and value[-1]["role"] == "assistant"
    return value[:-1] if ends and len(value) > 1 else value
