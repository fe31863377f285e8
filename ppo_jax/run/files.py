"""A run's folder: who may write to it, its files of JSON lines, and single files of JSON."""

import contextlib
import dataclasses
import enum
import json
import logging
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from filelock import BaseFileLock, FileLock, Timeout

LINES = ("metrics.jsonl", "samples.jsonl", "faults.jsonl")
_LOG = logging.getLogger(__name__)
_MARKS = (
    "config.json",
    "summary.json",
    "metrics.jsonl",
    "checkpoints/*",
)  # any of them means that a run was here


def check_free(folder: Path, *, resume: bool = False) -> None:
    """Writes nothing.

    Raises:
      ValueError: if the folder holds another run, unless that run is to be resumed; or if it is a file.
    """
    for place in (folder, folder / "checkpoints"):
        if place.exists() and not place.is_dir():
            raise ValueError(f"{place} is a file; the results need a folder.")
    if not resume and any(any(folder.glob(mark)) for mark in _MARKS):
        raise ValueError(
            f"{folder} holds another run; choose another folder, delete it, or go on with it by --resume auto."
        )


def claim(folder: Path, *, resume: bool = False) -> Path:
    """Makes a run's folder after `check_free`.

    Raises:
      ValueError: as that, or if the folder cannot be made.
    """
    check_free(folder, resume=resume)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"{folder} cannot be made: {error.strerror}.") from error
    return folder


def lock(folder: Path) -> BaseFileLock:
    """Keeps other processes from writing to a run's folder until it is released, or this process ends, however it does.

    Raises:
      ValueError: if another process holds it.
    """
    held = FileLock(folder / ".lock", timeout=0, thread_local=False, is_singleton=True)
    try:
        held.acquire()
    except Timeout as error:
        raise ValueError(
            f"Another process is writing to {folder}; wait for its end, stop it, or choose another folder."
        ) from error
    except (RuntimeError, OSError):  # a file system without locks, or one that is read-only
        _LOG.warning(
            "%s cannot be locked: nothing keeps another process from writing there.", folder
        )
    return held


def append_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Appends objects to a file of JSON lines, all or none.

    Raises:
      ValueError: if they cannot be written.
    """
    size = path.stat().st_size if path.exists() else 0
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    try:
        with path.open("ab") as file:
            file.write(
                lines.encode(errors="backslashreplace")
            )  # half a surrogate pair becomes an escape of JSON
    except OSError as error:
        with contextlib.suppress(OSError):
            os.truncate(path, size)
        raise ValueError(f"{path} cannot be written: {error.strerror}.") from error


def synced_size(path: Path) -> int:
    """Bytes of a file, none of which a power cut can take any more; 0, if there is none."""
    if not path.exists():
        return 0
    with path.open("ab") as file:
        os.fsync(file.fileno())
        return file.tell()


def cut_back(folder: Path, sizes: Mapping[str, int]) -> None:
    """Takes back all lines after a checkpoint, so that none stands twice, and the summary; files that `sizes` does not name go.

    Raises:
      ValueError: if a file is shorter than it was, or no line ends there.
    """
    other = " without its newest checkpoints it may go on from an earlier one."
    for name in LINES:
        path, size = folder / name, sizes.get(name, 0)
        if (path.stat().st_size if path.exists() else 0) < size:
            raise ValueError(
                f"{path} is shorter than at the checkpoint; lines of it were lost, so the run cannot go on there;{other}"
            )
        if size and not _ends_at(path, size):
            raise ValueError(
                f"{path} is not as it was at the checkpoint, where a line ended; the run cannot go on there;{other}"
            )
    (folder / "summary.json").unlink(missing_ok=True)
    for name in LINES:
        path = folder / name
        if path.exists() and sizes.get(name, 0) == 0:
            path.unlink()
        elif path.exists():
            os.truncate(path, sizes[name])


def _ends_at(path: Path, size: int) -> bool:
    """Whether the first `size` bytes are whole lines."""
    with path.open("rb") as file:
        file.seek(size - 1)
        return file.read(1) == b"\n"


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a file of JSON lines, but for one that is still half-written; none, if there is no file.

    Raises:
      ValueError: if a line is none.
    """
    try:  # what comes after the last line's end, a process left half-written
        whole = path.read_text(encoding="utf-8").split("\n")[:-1] if path.exists() else []
        lines = [json.loads(line) for line in whole if line]
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read: {error}.") from error
    if not all(isinstance(line, dict) and isinstance(line.get("update"), int) for line in lines):
        raise ValueError(
            f"{path} cannot be read: a line is no object with the number of an update."
        )
    return lines


def read_json(path: Path) -> Any:
    """Raises ValueError if there is no such file or it is no JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read: {error}.") from error


def write_json(path: Path, content: Any) -> None:
    """Writes all of it or nothing; ValueError if it cannot."""
    beside = path.with_name(path.name + ".tmp")
    try:
        beside.write_text(
            json.dumps(content, indent=2, ensure_ascii=False) + "\n",
            encoding="utf-8",
            errors="backslashreplace",
        )
        os.replace(beside, path)
    except OSError as error:
        raise ValueError(f"{path} cannot be written: {error.strerror}.") from error


def plain(x: Any) -> Any:
    """Settings as JSON knows them.

    Example:
      >>> plain({"at": Path("runs/a")})
      {'at': 'runs/a'}
    """
    if dataclasses.is_dataclass(x) and not isinstance(x, type):
        return {field.name: plain(getattr(x, field.name)) for field in dataclasses.fields(x)}
    if isinstance(x, enum.Enum):
        return x.value
    if isinstance(x, Mapping):
        return {str(k): plain(v) for k, v in x.items()}
    if isinstance(x, list | tuple):
        return [plain(v) for v in x]
    return x if isinstance(x, bool | int | float | str | None) else str(x)
