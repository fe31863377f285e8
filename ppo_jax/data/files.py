"""Files of rows: texts, JSON and CSV, which the ending of the file's name tells apart."""

import csv
import io
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ppo_jax.data.chat import is_messages
from ppo_jax.data.columns import COMMON_NAMES
from ppo_jax.data.tables import PARQUET_ENDINGS, is_hub_id, is_saved
from ppo_jax.stores import check_local

TEXT_ENDINGS = ("", ".txt", ".text")
JSON_ENDINGS = (".jsonl", ".ndjson", ".json")
CSV_ENDINGS = (".csv", ".tsv")
# Files that people may name as rows, and that are refused by their names.
_OTHER_ENDINGS = (".md", ".rst", ".yaml", ".yml", ".xml", ".html", ".xlsx", ".docx", ".pdf", ".gz")
_FILE_ENDINGS = (*TEXT_ENDINGS[1:], *JSON_ENDINGS, *CSV_ENDINGS, *_OTHER_ENDINGS)
# Where an item stands in its file, such as "Line 3", and the item: a text or what JSON holds.
Items = list[tuple[str, Any]]


def names_a_file(text: str) -> bool:
    """Return whether a text is the name of rows that can be read rather than a prompt.

    That is the name of an existing file with an ending, a word with an ending of a file of rows, a
    folder that `save_to_disk` wrote, or a data set of the hub with its split.

    Example:
      >>> names_a_file("prompts.jsonl"), names_a_file("Continue prompts.jsonl")
      (True, False)
      >>> names_a_file("openai/gsm8k:main:test"), names_a_file("and/or")
      (True, False)
    """
    try:
        ending = Path(text).suffix.lower()
        if (ending and Path(text).is_file()) or is_saved(text.partition(":")[0]):
            return True
    except (OSError, ValueError):  # A long text is no path.
        return False
    if not text.strip() or any(sign.isspace() for sign in text):
        return False
    return ending in (*_FILE_ENDINGS, *PARQUET_ENDINGS) or (is_hub_id(text) and ":" in text)


def is_table(name: str) -> bool:
    """Return whether `datasets` reads what has this name: Parquet, a folder or a hub's data set.

    A name in a folder that exists is that of a file, unless a split follows it.

    Example:
      >>> is_table("a.parquet"), is_table("openai/gsm8k:main:test"), is_table("data/prompts.xlsx")
      (True, True, False)
    """
    path = Path(name)
    ending = path.suffix.lower()
    if ending in PARQUET_ENDINGS:
        return True
    if path.is_file() or ending in _FILE_ENDINGS:
        return False
    if Path(name.partition(":")[0]).is_dir():
        return True
    return is_hub_id(name) and (":" in name or not path.parent.is_dir())


def check_exists(name: str) -> None:
    """Check that rows may be read from a name, without reading them.

    Args:
      name: the name of a file, a folder or a data set of the hub, which is not looked for.

    Raises:
      ValueError: if there is no such file, or the name is an address in an object store.

    Example:
      >>> check_exists("nosuch.csv")
      Traceback (most recent call last):
      ValueError: nosuch.csv does not exist.
    """
    check_local(name, "rows are read from local files")
    path = Path(name)
    one_file = path.suffix.lower() in PARQUET_ENDINGS and not re.search(r"[*?\[:]", name)
    if path.exists() or (is_table(name) and not one_file):
        return
    advice = ""
    if is_hub_id(name) and not name.lower().endswith((*_FILE_ENDINGS, *PARQUET_ENDINGS)):
        advice = (
            f" For a data set of the Hugging Face hub, name its split too, such as {name}:train."
        )
    raise ValueError(f"{name} does not exist.{advice}")


def read_file(path: Path, columns: Sequence[str]) -> Items:
    """Read the items of a file, and where each of them stands.

    Args:
      path: the file. `.jsonl`, `.ndjson` and `.json` hold one JSON value a line, or one JSON list.
        `.csv` and `.tsv` begin with a line of column names. `.txt`, `.text` and a name without an
        ending hold one text a line. Empty lines are skipped.
      columns: the columns that every row must have; a file of texts must not begin with the name
        of the first, like a table.

    Returns:
      The items in the order of the file.

    Raises:
      ValueError: if the file is of another kind, cannot be read, or does not hold what its name
        says.
    """
    ending = path.suffix.lower()
    if path.is_file() and ending not in (*TEXT_ENDINGS, *JSON_ENDINGS, *CSV_ENDINGS):
        raise ValueError(
            f"{path} cannot be read, because {ending} is not the ending of a text file (.txt), of "
            "JSON lines (.jsonl) or of a table (.csv, .tsv, .parquet); convert it to one of these."
        )
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        number = error.object[: error.start].count(b"\n") + 1
        raise ValueError(
            f"{path} cannot be read, because line {number} is not UTF-8; save it as UTF-8."
        ) from error
    if "\0" in text:
        raise ValueError(f"{path} cannot be read, because it is not a file of text in UTF-8.")
    if ending in JSON_ENDINGS:
        return _read_json(path, text)
    if ending in CSV_ENDINGS:
        return _read_csv(path, text)
    return _read_texts(path, text, columns)


def _numbered_lines(text: str) -> list[tuple[int, str]]:
    """Return the lines that are not empty with their numbers from 1."""
    # Not `splitlines`, which also splits at separators that may occur within a text.
    return [(i, line) for i, line in enumerate(text.split("\n"), 1) if line.strip()]


def _read_texts(path: Path, text: str, columns: Sequence[str]) -> Items:
    """Read one text a line, and refuse JSON and tables under the name of a text file."""
    lines = _numbered_lines(text)
    first = lines[0][1] if lines else ""
    whole = _decoded(text)
    spread = isinstance(whole, list) and len(lines) > 1
    values = (whole, _decoded(first.rstrip().removesuffix(",")), *_as_list(whole))
    kind = None
    if spread or any(isinstance(value, dict) for value in values):
        kind = "JSON, whose name must end in .jsonl"
    elif _is_header(first, columns):
        kind = "a table, whose name must end in .csv or .tsv"
    if kind is not None:
        raise ValueError(
            f"{path} is read as one text a line, but it begins like {kind}: {first!r:.80}."
        )
    return [(f"Line {number}", line) for number, line in lines]


def _is_header(line: str, columns: Sequence[str]) -> bool:
    """Whether a line holds names of columns, at least one of them known, and nothing else."""
    known = {*columns, *(name for names in COMMON_NAMES.values() for name in names)}
    rows = ([cell.strip().strip('"') for cell in line.split(sign)] for sign in ",;\t")
    return any(
        len(cells) > 1
        and known & {cell.lower() for cell in cells}
        and all(re.fullmatch(r"[\w.-]*", cell) for cell in cells)
        for cells in rows
    )


def _decoded(text: str) -> Any:
    """Return what a text holds as JSON, or None if it is not JSON."""
    try:
        return json.loads(text) if text.lstrip()[:1] in ("{", "[") else None
    except (ValueError, RecursionError):
        return None


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _read_json(path: Path, text: str) -> Items:
    """Read one JSON value a line, or one JSON value that is the whole file."""
    whole = _decoded(text)
    if isinstance(whole, list):
        return [(f"Row {i}", item) for i, item in enumerate(whole)]
    if whole is not None:
        return [("Line 1", whole)]
    items: Items = []
    for number, line in _numbered_lines(text):
        try:
            items.append((f"Line {number}", json.loads(line)))
        except (ValueError, RecursionError) as error:
            # If this is the first line, the file may be one value that goes over several lines.
            number, reason = (number, error) if items else _first_error(text, number, error)
            raise ValueError(
                f"{path} must hold one JSON object a line, or one JSON list, but line {number} is "
                f"not JSON: {getattr(reason, 'msg', reason)}."  # `str` has a line number as well.
            ) from error
    return items


def _first_error(text: str, number: int, error: Exception) -> tuple[int, Exception]:
    """Return where a text that should be one JSON value is none, and why."""
    try:
        json.loads(text)
    except (ValueError, RecursionError) as found:
        return getattr(found, "lineno", number), found
    return number, error


def _read_csv(path: Path, text: str) -> Items:
    """Read a table whose first line holds the names of the columns."""
    header = text.lstrip().partition("\n")[0]
    delimiter = max("\t" if path.suffix.lower() == ".tsv" else ",;\t", key=header.count)
    limit = csv.field_size_limit(2**31 - 1)  # The default refuses texts of 128 Ki characters.
    items: Items = []
    try:
        table = csv.DictReader(io.StringIO(text.lstrip("\n")), delimiter=delimiter, strict=True)
        table.fieldnames = names = [name.strip() for name in table.fieldnames or ()]
        if twice := {name for name in names if names.count(name) > 1}:
            raise ValueError(f"{path} has several columns of the name {min(twice)!r}.")
        for row in table:
            if None in row or None in row.values():
                raise ValueError(
                    f"{path} must have {len(table.fieldnames)} cells in every row, as in its first "
                    f"line, but the row that ends in line {table.line_num} has more or fewer."
                )
            cells = {name: _cell(cell) for name, cell in row.items()}
            items.append((f"Line {table.line_num}", cells))
    except csv.Error as error:
        raise ValueError(
            f"{path} is not a table of the kind CSV: line {table.line_num}: {error}."
        ) from error
    finally:
        csv.field_size_limit(limit)
    return items


def _cell(cell: str) -> Any:
    """Return a cell's text, its messages if it holds those as JSON, or None if it is empty."""
    if not cell:
        return None
    value = _decoded(cell)
    return value if is_messages(value) else cell
