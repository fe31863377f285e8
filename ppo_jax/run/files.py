"""The files of a run's folder: the check that it is free, its lock, JSON lines and JSON files."""

import contextlib
import json
import logging
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from filelock import BaseFileLock, FileLock, Timeout

from ppo_jax.stores import store_url

LINES = ("metrics.jsonl", "samples.jsonl", "evaluations.jsonl", "faults.jsonl")
_LOG = logging.getLogger(__name__)
# A folder with any of these files holds a run.
_MARKS = ("config.json", "run.json", "summary.json", "metrics.jsonl", "checkpoints/*")

# The file with the settings of a supervised run, whose folder is a model with a config.json.
SUPERVISED = "run.json"


def config_file(folder: Path) -> str:
    """Return the name of the file that holds the settings of the run in a folder."""
    return SUPERVISED if (folder / SUPERVISED).exists() else "config.json"


def check_free(folder: Path, *, resume: bool | None = None) -> None:
    """Check that results may be written to a folder, and write nothing.

    Args:
      folder: the folder.
      resume: whether a run in the folder is to be resumed; None if what writes there cannot resume.

    Raises:
      ValueError: if the folder is a file, or holds another run that is not to be resumed, or if it
        is, or is below, a link to something that does not exist.
    """
    check_links(folder)
    for place in (folder, folder / "checkpoints"):
        if place.exists() and not place.is_dir():
            raise ValueError(f"{place} is a file; the results need a folder.")
    if not resume and any(any(folder.glob(mark)) for mark in _MARKS):
        advice = (
            "choose another folder, or delete it."
            if resume is None
            else "choose another folder, delete it, or continue that run with --resume auto."
        )
        raise ValueError(f"{folder} holds another run; {advice}")


def check_links(path: Path) -> None:
    """Raise ValueError if a path is, or is below, a link to something that does not exist.

    A path in an object store is refused as well.
    """
    if url := store_url(path):
        raise ValueError(
            f"{url} is in an object store, where only the folder of ppo-jax train can be; choose a "
            "local place."
        )
    for place in (path, path / "checkpoints", *path.parents):
        if place.is_symlink() and not place.exists():
            raise ValueError(
                f"{place} is a link to {os.readlink(place)}, which does not exist; create it, or "
                "choose another place."
            )


def create_run_folder(folder: Path, *, resume: bool | None = None) -> Path:
    """Create the folder of a run, with its parents, unless it holds another run.

    Args:
      folder: the folder; it may exist.
      resume: whether a run in the folder is to be resumed, as for `check_free`.

    Returns:
      The folder.

    Raises:
      ValueError: if `folder` is a file, holds another run, or cannot be created.

    Example:
      >>> import tempfile
      >>> with tempfile.TemporaryDirectory() as parent:
      ...     create_run_folder(Path(parent) / "runs/a").is_dir()
      True
    """
    check_free(folder, resume=resume)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"{folder} cannot be created: {error.strerror}.") from error
    return folder


def lock_folder(folder: Path) -> BaseFileLock:
    """Lock a folder, so that no other run writes to it until the lock is released.

    The operating system releases the lock when this process ends, however it ends. On a file system
    without locks, a warning is logged and the folder is not locked.

    Args:
      folder: an existing folder.

    Returns:
      The lock, which the caller holds. Its method `release` releases it.

    Raises:
      ValueError: if another process holds the lock.

    Example:
      >>> import tempfile
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     lock = lock_folder(Path(folder))
      ...     lock.release()
    """
    held = FileLock(folder / ".lock", timeout=0, thread_local=False, is_singleton=True)
    try:
        held.acquire()
    except Timeout as error:
        raise ValueError(
            f"Another process is writing to {folder}; wait until it ends, stop it, or choose "
            "another folder."
        ) from error
    except (RuntimeError, OSError):  # The file system does not support locks or is read-only.
        _LOG.warning(
            "%s cannot be locked, so nothing keeps another process from writing to it.", folder
        )
    return held


def append_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Append objects to a file of JSON lines. Either all of them are written or none.

    Args:
      path: the file, which is created if there is none.
      rows: the objects, one line each.

    Raises:
      ValueError: if they cannot be written.
    """
    size = path.stat().st_size if path.exists() else 0
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    try:
        with path.open("ab") as file:
            # Half a surrogate pair, which is not valid UTF-8, becomes an escape sequence of JSON.
            file.write(lines.encode(errors="backslashreplace"))
    except OSError as error:
        with contextlib.suppress(OSError):
            os.truncate(path, size)
        raise ValueError(f"{path} cannot be written: {error.strerror}.") from error


def synced_size(path: Path) -> int:
    """Flush a file to the disk and return its size in bytes, or 0 if the file does not exist."""
    if not path.exists():
        return 0
    with path.open("ab") as file:
        os.fsync(file.fileno())
        return file.tell()


def cut_back(folder: Path, sizes: Mapping[str, int]) -> None:
    """Remove the summary, and all lines that were written after a checkpoint.

    Args:
      folder: the run's folder.
      sizes: the size in bytes that each file of lines had at the checkpoint. Files of lines that
        are not named here are deleted.

    Raises:
      ValueError: if a file is shorter than it was at the checkpoint, or if it has no end of a line
        at that size.
    """
    advice = " Without the newest checkpoints the run may be resumed from an earlier one."
    at_checkpoint = {folder / name: sizes.get(name, 0) for name in LINES}
    for path, size in at_checkpoint.items():
        if (path.stat().st_size if path.exists() else 0) < size:
            raise ValueError(
                f"{path} is shorter than at the checkpoint; lines were lost, so the run cannot be "
                f"resumed there.{advice}"
            )
        if size and not _ends_a_line(path, size):
            raise ValueError(
                f"{path} is not as it was at the checkpoint, where a line ended; the run cannot be "
                f"resumed there.{advice}"
            )
    (folder / "summary.json").unlink(missing_ok=True)
    for path, size in at_checkpoint.items():
        if size:
            os.truncate(path, size)
        else:
            path.unlink(missing_ok=True)


def _ends_a_line(path: Path, size: int) -> bool:
    with path.open("rb") as file:
        file.seek(size - 1)
        return file.read(1) == b"\n"


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Read a file of JSON lines. The list is empty if there is no such file.

    The last line is left out if it has no line break, because a process ended while writing it.

    Args:
      path: the file.

    Returns:
      The objects, one for each line.

    Raises:
      ValueError: if a line is not a JSON object with the number of an update.
    """
    try:
        complete = path.read_text(encoding="utf-8").split("\n")[:-1] if path.exists() else []
        lines = [json.loads(line) for line in complete if line]
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read: {error}.") from error
    if not all(isinstance(line, dict) and isinstance(line.get("update"), int) for line in lines):
        raise ValueError(
            f"{path} cannot be read: a line is not an object with the number of an update."
        )
    return lines


def read_json(path: Path) -> Any:
    """Read a JSON file. Raise ValueError if there is no such file, or if it is not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read: {error}.") from error


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file completely or not at all.

    Args:
      path: the file. An earlier file of that name is replaced.
      content: the content, in the types that `json.dumps` takes.

    Raises:
      ValueError: if the file cannot be written.

    Example:
      >>> import tempfile
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     write_json(Path(folder) / "summary.json", {"score": 0.5})
      ...     read_json(Path(folder) / "summary.json")
      {'score': 0.5}
    """
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a text file in UTF-8 completely or not at all; raise ValueError if that fails."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")
        os.replace(temporary, path)
    except OSError as error:
        raise ValueError(f"{path} cannot be written: {error.strerror}.") from error
