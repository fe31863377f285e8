"""What a run says while it goes on: lines of metrics, samples and faults, TensorBoard, Weights & Biases."""

import contextlib
import logging
import math
import socket
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary
from tensorboardX.record_writer import RecordWriter

from ppo_jax.hashing import text_hash
from ppo_jax.run.files import LINES, append_lines, synced_size

SKIPPED = {"faults/skipped": 1.0}  # the metrics of an update that a fault made the run skip
_LOG = logging.getLogger(__name__)


def finite(metrics: Mapping[str, float]) -> dict[str, float | None]:
    """With None for what is not finite: JSON knows no NaN."""
    return {name: value if math.isfinite(value) else None for name, value in metrics.items()}


class NoLog:
    """A `RunLog` that writes nothing, for the processes beside the first."""

    def metrics(self, update: int, metrics: Mapping[str, float]) -> None: ...

    def samples(self, update: int, rows: Iterable[Mapping[str, Any]]) -> None: ...

    def fault(
        self, update: int, kind: str, message: str, rows: Iterable[Mapping[str, Any]]
    ) -> None: ...

    def sizes(self) -> dict[str, int]:
        return {}

    def close(self) -> None: ...


class RunLog:
    """Appends to a run's files; `sizes` says how far they are, and `files.cut_back` takes back what came after."""

    def __init__(
        self,
        folder: Path,
        *,
        tensorboard: bool = True,
        wandb_project: str | None = None,
        first_update: int = 0,
    ):
        self._folder = folder
        self._board = _Board(folder / "tensorboard", first_update) if tensorboard else None
        self._wandb = None
        if wandb_project is not None:
            try:
                import wandb
            except ImportError as error:
                raise ValueError(
                    "Weights & Biases is not installed; pip install 'ppo-jax[wandb]'."
                ) from error
            try:
                self._wandb = wandb.init(
                    project=wandb_project,
                    dir=folder,
                    id=text_hash(str(folder.resolve())),
                    resume="allow",
                )
            except wandb.errors.Error as error:
                raise ValueError(
                    f"Weights & Biases does not start: {str(error).splitlines()[0]}"
                ) from error

    def metrics(self, update: int, metrics: Mapping[str, float]) -> None:
        append_lines(self._folder / "metrics.jsonl", [{"update": update, **finite(metrics)}])
        if self._board is not None:
            self._board.scalars(update, metrics)
        if self._wandb is not None:
            self._wandb.log(dict(metrics), step=update)

    def samples(self, update: int, rows: Iterable[Mapping[str, Any]]) -> None:
        append_lines(self._folder / "samples.jsonl", [{"update": update, **row} for row in rows])

    def fault(
        self, update: int, kind: str, message: str, rows: Iterable[Mapping[str, Any]]
    ) -> None:
        about = {"update": update, "kind": kind, "message": message}
        append_lines(self._folder / "faults.jsonl", [{**about, **row} for row in rows])

    def sizes(self) -> dict[str, int]:
        """Bytes of each file of lines, all of which are on the disk then."""
        return {name: synced_size(self._folder / name) for name in LINES}

    def close(self) -> None:
        if self._board is not None:
            self._board.close()
        if self._wandb is not None:
            self._wandb.finish()


class _Board:
    """TensorBoard's events, written in the caller's thread: one that the disk refuses ends them with a warning, never the run."""

    flush_s = 10.0

    def __init__(self, folder: Path, first_update: int):
        """Events from `first_update` on that were in the folder before no longer count."""
        self._file: RecordWriter | None = None
        self._flushed = time.monotonic()
        with self._or_warning():
            folder.mkdir(exist_ok=True)
            self._file = RecordWriter(
                str(folder / f"events.out.tfevents.{time.time():.0f}.{socket.gethostname()}")
            )
        self._write(step=first_update, file_version="brain.Event:2")
        self._write(step=first_update, session_log=SessionLog(status=SessionLog.START))

    def scalars(self, update: int, numbers: Mapping[str, float]) -> None:
        self._write(
            step=update,
            summary=Summary(
                value=[Summary.Value(tag=n, simple_value=x) for n, x in numbers.items()]
            ),
        )

    def _write(self, **event: Any) -> None:
        if self._file is None:
            return
        with self._or_warning():
            self._file.write(Event(wall_time=time.time(), **event).SerializeToString())
            if time.monotonic() > self._flushed + self.flush_s:
                self._file.flush()
                self._flushed = time.monotonic()

    def close(self) -> None:
        file, self._file = self._file, None
        if file is not None:
            with self._or_warning():
                file.close()

    __del__ = close

    @contextlib.contextmanager
    def _or_warning(self):
        try:
            yield
        except OSError as error:
            file, self._file = self._file, None
            with contextlib.suppress(OSError):  # the bytes that it still holds
                if file is not None:
                    file.close()
            _LOG.warning(
                "TensorBoard's events end here, for they cannot be written: %s.",
                error.strerror or error,
            )
