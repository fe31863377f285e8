"""TensorBoard's events of a run."""

import contextlib
import logging
import socket
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from flax.traverse_util import flatten_dict
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary
from tensorboardX.record_writer import RecordWriter
from tensorboardX.summary import hparams, text

_LOG = logging.getLogger(__name__)


class EventWriter:
    """Writes TensorBoard events in the caller's thread.

    If the disk refuses an event, the events end with a warning and the run continues.
    """

    flush_s = 10.0

    def __init__(self, folder: Path, first_update: int):
        """Start a file; events from `first_update` on that were there before become invalid."""
        self._file: RecordWriter | None = None
        self._flushed = time.monotonic()
        with self._warning_on_error():
            folder.mkdir(exist_ok=True)
            name = f"events.out.tfevents.{time.time():.0f}.{socket.gethostname()}"
            self._file = RecordWriter(str(folder / name))
        self._write(step=first_update, file_version="brain.Event:2")
        self._write(step=first_update, session_log=SessionLog(status=SessionLog.START))

    def scalars(self, update: int, metrics: Mapping[str, float]) -> None:
        """Write one scalar for each metric of an update."""
        values = [Summary.Value(tag=name, simple_value=x) for name, x in metrics.items()]
        self._write(step=update, summary=Summary(value=values))

    def texts(self, update: int, name: str, rows: Iterable[Mapping[str, Any]]) -> None:
        """Write sampled texts, each as a block that Markdown shows as it is, with its score."""
        blocks = []
        for row in rows:
            block = f"{row['prompt']}|{row['response']}".replace("\n", "\n    ")
            blocks.append(f"Score {row['score']}:\n\n    {block}\n")
        self._write(step=update, summary=text(name, "\n".join(blocks)))

    def settings(self, update: int, settings: Mapping[str, Any]) -> None:
        """Write the settings as hyper-parameters, with the scores as their result."""
        flat = flatten_dict({name: x or {} for name, x in settings.items()}, sep=".")
        known = {
            name: x if isinstance(x, str | bool | int | float) else str(x)
            for name, x in flat.items()
            if x is not None and x != {}
        }
        if known:
            results = dict.fromkeys(("objective/scores", "objective/kl", "eval/scores"), 0.0)
            experiment, start, _ = hparams(known, results)
            self._write(step=update, summary=experiment)
            self._write(step=update, summary=start)

    def _write(self, **event: Any) -> None:
        if self._file is None:
            return
        with self._warning_on_error():
            self._file.write(Event(wall_time=time.time(), **event).SerializeToString())
            if time.monotonic() > self._flushed + self.flush_s:
                self._file.flush()
                self._flushed = time.monotonic()

    def close(self) -> None:
        """Write what is left and close the file."""
        file, self._file = self._file, None
        if file is not None:
            with self._warning_on_error():
                file.close()

    __del__ = close

    @contextlib.contextmanager
    def _warning_on_error(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            file, self._file = self._file, None
            with contextlib.suppress(OSError):  # closing writes the buffered bytes, which fails too
                if file is not None:
                    file.close()
            _LOG.warning(
                "TensorBoard's events end here, for they cannot be written: %s.",
                error.strerror or error,
            )
