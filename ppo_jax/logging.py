"""What a run leaves in its folder: settings, a line of metrics an update, samples, TensorBoard, a summary."""

import dataclasses
import enum
import importlib.metadata
import json
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from tensorboardX import SummaryWriter

_MARKS = ("config.json", "summary.json", "metrics.jsonl")  # any of them means that a run was here


def check_free(folder: Path, *, resume: bool = False) -> None:
    """Writes nothing.

    Raises:
      ValueError: if the folder holds another run, unless that run is to be resumed; or if it is a file.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file; the results need a folder.")
    if not resume and any((folder / mark).exists() for mark in _MARKS):
        raise ValueError(f"{folder} holds another run; choose another folder.")


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


class RunLog:
    """Appends to a run's files."""

    def __init__(self, folder: Path, *, tensorboard: bool = True, wandb_project: str | None = None):
        self._folder = folder
        self._board = SummaryWriter(str(folder / "tensorboard")) if tensorboard else None
        self._wandb = None
        if wandb_project is not None:
            try:
                import wandb
            except ImportError as error:
                raise ValueError("Weights & Biases is not installed; pip install 'ppo-jax[wandb]'.") from error
            self._wandb = wandb.init(project=wandb_project, dir=folder)

    def config(self, settings: Any) -> None:
        versions = {name: importlib.metadata.version(name) for name in ("jax", "flax", "optax", "transformers", "numpy")}
        about = {"python": platform.python_version(), "devices": [str(d) for d in jax.devices()], "versions": versions}
        write_json(self._folder / "config.json", {"settings": plain(settings), **about})

    def metrics(self, update: int, metrics: Mapping[str, float]) -> None:
        with (self._folder / "metrics.jsonl").open("a") as file:
            file.write(json.dumps({"update": update, **metrics}) + "\n")
        for name, value in metrics.items():
            if self._board is not None:
                self._board.add_scalar(name, value, update)
        if self._wandb is not None:
            self._wandb.log(dict(metrics), step=update)

    def samples(self, update: int, prompts: Sequence[str], responses: Sequence[str], scores: Sequence[float]) -> None:
        with (self._folder / "samples.jsonl").open("a", encoding="utf-8") as file:
            for prompt, response, score in zip(prompts, responses, scores, strict=True):
                row = {"update": update, "prompt": prompt, "response": response, "score": float(score)}
                file.write(json.dumps(row, ensure_ascii=False) + "\n")

    def close(self) -> None:
        if self._board is not None:
            self._board.close()
        if self._wandb is not None:
            self._wandb.finish()


def write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


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
