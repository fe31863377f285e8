"""What a run leaves in its folder: settings, a line of metrics an update, samples, TensorBoard, a summary."""

import dataclasses
import enum
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tensorboardX import SummaryWriter

from ppo_jax.provenance import text_hash

LINES = ("metrics.jsonl", "samples.jsonl", "faults.jsonl")
SKIPPED = {"faults/skipped": 1.0}  # the metrics of an update that a fault made the run skip
_MARKS = ("config.json", "summary.json", "metrics.jsonl", "checkpoints/*")  # any of them means that a run was here


def check_free(folder: Path, *, resume: bool = False) -> None:
    """Writes nothing.

    Raises:
      ValueError: if the folder holds another run, unless that run is to be resumed; or if it is a file.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file; the results need a folder.")
    if not resume and any(any(folder.glob(mark)) for mark in _MARKS):
        raise ValueError(f"{folder} holds another run; choose another folder, delete it, or go on with it by --resume auto.")


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


def finite(metrics: Mapping[str, float]) -> dict[str, float | None]:
    """With None for what is not finite: JSON knows no NaN."""
    return {name: value if math.isfinite(value) else None for name, value in metrics.items()}


class NoLog:
    """A `RunLog` that writes nothing, for the processes beside the first."""

    def metrics(self, update: int, metrics: Mapping[str, float]) -> None: ...

    def samples(self, update: int, rows: Iterable[Mapping[str, Any]]) -> None: ...

    def fault(self, update: int, kind: str, message: str, rows: Iterable[Mapping[str, Any]]) -> None: ...

    def sizes(self) -> dict[str, int]:
        return {}

    def close(self) -> None: ...


class RunLog:
    """Appends to a run's files; `sizes` says how far they are, and `cut_back` takes back what came after."""

    def __init__(self, folder: Path, *, tensorboard: bool = True, wandb_project: str | None = None, first_update: int = 0):
        self._folder = folder
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=first_update) if tensorboard else None
        self._wandb = None
        if wandb_project is not None:
            try:
                import wandb
            except ImportError as error:
                raise ValueError("Weights & Biases is not installed; pip install 'ppo-jax[wandb]'.") from error
            try:
                self._wandb = wandb.init(project=wandb_project, dir=folder, id=text_hash(str(folder.resolve())), resume="allow")
            except wandb.errors.Error as error:
                raise ValueError(f"Weights & Biases does not start: {str(error).splitlines()[0]}") from error

    def metrics(self, update: int, metrics: Mapping[str, float]) -> None:
        self._append("metrics.jsonl", [{"update": update, **finite(metrics)}])
        for name, value in metrics.items():
            if self._board is not None:
                self._board.add_scalar(name, value, update)
        if self._wandb is not None:
            self._wandb.log(dict(metrics), step=update)

    def samples(self, update: int, rows: Iterable[Mapping[str, Any]]) -> None:
        self._append("samples.jsonl", [{"update": update, **row} for row in rows])

    def fault(self, update: int, kind: str, message: str, rows: Iterable[Mapping[str, Any]]) -> None:
        self._append("faults.jsonl", [{"update": update, "kind": kind, "message": message, **row} for row in rows])

    def sizes(self) -> dict[str, int]:
        """Bytes of each file of lines."""
        return {name: path.stat().st_size if (path := self._folder / name).exists() else 0 for name in LINES}

    def close(self) -> None:
        if self._board is not None:
            self._board.close()
        if self._wandb is not None:
            self._wandb.finish()

    def _append(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        try:
            with (self._folder / name).open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        except OSError as error:
            raise ValueError(f"{self._folder / name} cannot be written: {error.strerror}.") from error


def cut_back(folder: Path, sizes: Mapping[str, int]) -> None:
    """Takes back all lines after a checkpoint, so that none stands twice; files that `sizes` does not name go.

    Raises:
      ValueError: if a file is shorter than it was.
    """
    for name in LINES:
        path = folder / name
        if (path.stat().st_size if path.exists() else 0) < sizes.get(name, 0):
            raise ValueError(f"{path} is shorter than at the checkpoint; lines of it were lost, so the run cannot go on there.")
        if path.exists() and sizes.get(name, 0) == 0:
            path.unlink()
        elif path.exists():
            os.truncate(path, sizes[name])


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a file of JSON lines; none, if there is no file.

    Raises:
      ValueError: if a line is none.
    """
    try:
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line] if path.exists() else []
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read: {error}.") from error
    if not all(isinstance(line, dict) and "update" in line for line in lines):
        raise ValueError(f"{path} cannot be read: a line is no object with an update.")
    return lines


def read_json(path: Path) -> Any:
    """Raises ValueError if there is no such file or it is no JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read: {error}.") from error


def write_json(path: Path, content: Any) -> None:
    """Writes all of it or nothing."""
    beside = path.with_name(path.name + ".tmp")
    beside.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(beside, path)


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
