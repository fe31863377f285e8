"""Write the checkpoints of a run with Orbax, and check them bit by bit when they are read."""

import json
import logging
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from ppo_jax.distributed import processes
from ppo_jax.errors import CheckpointError, first_line
from ppo_jax.hashing import digest, text_hash
from ppo_jax.run.background import Background, free_memory, host_copy
from ppo_jax.run.provenance import differences
from ppo_jax.run.state_arrays import State, arrays_of, pending_of, structure_of, with_arrays

_LOG = logging.getLogger(__name__)
_SPARE_BYTES = 2**20  # room for the files that Orbax writes besides the arrays
# After one array cannot be read, Orbax also logs errors of all other arrays and of its threads.
# Messages with these texts are not shown.
_CONSEQUENCES = (
    "exception was never retrieved",
    "_SignalingThread.run() raised an exception",
    "Given directory is read only",
)


def _is_cause(record: logging.LogRecord) -> bool:
    return not any(text in record.getMessage() for text in _CONSEQUENCES)


class _MismatchError(CheckpointError):
    """The arrays of an undamaged checkpoint have other names, shapes or types than the state."""


@dataclass
class _KeepOne:
    """A preservation policy of Orbax that keeps the checkpoint of `step`."""

    step: int | None = None

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        return [checkpoint.step == self.step for checkpoint in checkpoints]


class Checkpoints:
    """The folder that holds the newest checkpoints of a run and the one with the best evaluation.

    Attributes:
      folder: the absolute path of the folder.
    """

    def __init__(
        self,
        folder: Path,
        *,
        keep: int = 2,
        read_only: bool = False,
        after_save: Callable[[], None] | None = None,
    ):
        """Open a folder of checkpoints.

        Args:
          folder: the folder, which is created unless `read_only` is true.
          keep: the number of newest checkpoints to keep, besides the one with the best evaluation.
          read_only: whether to change nothing in the folder.
          after_save: called once a checkpoint is complete, in the thread that has written it.
        """
        self._best = _KeepOne()
        latest = checkpoint_managers.LatestN(keep)
        options = ocp.CheckpointManagerOptions(
            preservation_policy=checkpoint_managers.AnyPreservationPolicy([latest, self._best]),
            enable_async_checkpointing=False,
            cleanup_tmp_directories=not read_only,
            create=not read_only,
            read_only=read_only,
            save_interval_steps=0 if read_only else 1,  # Otherwise Orbax sets it, with a warning.
        )
        for name in ("asyncio", "absl"):
            logging.getLogger(name).addFilter(_is_cause)
        self.folder = folder.absolute()
        self._manager = ocp.CheckpointManager(self.folder, options=options)
        self._background, self._after_save = Background(), after_save

    def save(
        self,
        state: State,
        notes: dict[str, Any] | None = None,
        *,
        best: int | None = None,
        wait: bool = True,
    ) -> None:
        """Write a checkpoint whose name is the number of updates, unless there is one already.

        Args:
          state: the state of the run.
          notes: what a resumed run needs besides the state, in the types of JSON.
          best: the number of updates of the checkpoint with the best evaluation, which is kept.
          wait: whether to return only when the checkpoint is complete. Otherwise a single process
            with enough memory writes a copy of the state in the background. An error is then raised
            by the next call that waits, such as the next `save`.

        Raises:
          CheckpointError: if it cannot be written, for example because the disk is full. Earlier
            checkpoints remain as they are.
        """
        step, arrays, pending = int(state.update), arrays_of(state), pending_of(state)
        if step in self.steps():
            return
        # The names are those in checkpoints that were written earlier, so they must not change.
        about = json.dumps(notes or {}, sort_keys=True)
        structure = structure_of({**arrays, "pending": pending})
        run = {
            "digest": digest(arrays),
            "about": about,
            "structure": structure,
            "run_digest": text_hash(about, sorted(structure.items())),
        }
        if pending:  # Apart from the other arrays, which can then be read without them.
            run["pending"] = digest(pending)
        both = arrays, pending
        copied = None if wait or jax.process_count() > 1 else host_copy(both, free=free_memory())
        if copied is None:
            self._write(step, both, run, best)
        else:
            self._background.start(partial(self._write, step, copied, run, best))

    def _write(
        self, step: int, both: tuple[Any, Any], run: dict[str, Any], best: int | None
    ) -> None:
        self._best.step = best
        arrays, pending = both
        items = {"state": ocp.args.StandardSave(arrays), "run": ocp.args.JsonSave(run)}
        if pending:
            items["pending"] = ocp.args.StandardSave(pending)
        try:
            processes.on_first_process(lambda: self._check_room(both))
            if not self._manager.save(step, args=ocp.args.Composite(**items)):
                raise OSError(f"Orbax refuses to write it beside {self._manager.all_steps()}.")
        except (
            Exception
        ) as error:  # Orbax and TensorStore raise many kinds of error for a full disk
            raise CheckpointError(
                f"Checkpoint {step} cannot be written to {self.folder}: {first_line(error)} "
                "The earlier ones are untouched."
            ) from error
        if self._after_save is not None:
            self._after_save()

    def _check_room(self, arrays: Any) -> None:
        needed = sum(x.nbytes for x in jax.tree.leaves(arrays)) + _SPARE_BYTES
        free = shutil.disk_usage(self.folder).free
        if needed > free:
            raise OSError(
                f"it may take {needed / 1e6:.1f} MB, and the disk has {free / 1e6:.1f} MB left"
            )

    def wait(self) -> None:
        """Wait for the checkpoint that is being written in the background, and raise its error."""
        self._background.wait()

    def steps(self) -> list[int]:
        """Return the numbers of updates of all complete checkpoints, in increasing order."""
        self.wait()
        return sorted(self._manager.all_steps())

    def were_any(self) -> bool:
        """Return whether there are checkpoints, including damaged ones."""
        return bool(self.steps()) or any(self.folder.glob("*.damaged*"))

    def restore(self, like: State, step: int | None = None) -> tuple[State, dict[str, Any]]:
        """Read the newest good checkpoint, or the checkpoint of `step`.

        A damaged checkpoint is renamed to `N.damaged` with a warning, and the one before it is
        read instead.

        Args:
          like: a state with the structure and sharding of the result. If it has no pending
            rollouts, those of the checkpoint are not read.
          step: the number of updates of the checkpoint to read; None for the newest good one.

        Returns:
          The state and the notes that were saved with it.

        Raises:
          CheckpointError: if there is no good checkpoint, or if the arrays of the newest good one
            do not have the names, shapes and types of those of `like`.
        """
        reasons = []
        for number in reversed(self.steps()) if step is None else [step]:
            found, mismatch, reason = None, "", ""
            try:
                found = self._read(number, like)
            except Exception as error:  # Reading a damaged file may raise any kind of error.
                reason = f"Checkpoint {number} in {self.folder} cannot be used: {first_line(error)}"
                mismatch = "" if _is_damage(error) else reason
            mismatch, reason = (
                next(filter(None, processes.gather_text(text)), "") for text in (mismatch, reason)
            )
            if mismatch:
                raise CheckpointError(mismatch)
            if found is not None and not reason:
                return found
            reasons.append(reason)
            if step is None:
                _LOG.warning("%s It is renamed to %d.damaged.", reason, number)
                processes.on_first_process(partial(self._set_aside, number))
                self._manager.reload()
        damaged = sorted(path.name for path in self.folder.glob("*.damaged*"))
        but = f" but {', '.join(damaged)}; delete the run's folder to start afresh"
        none = f"{self.folder} holds no checkpoint{but if damaged else ''}."
        raise CheckpointError(" ".join(reasons) or none)

    def notes(self, step: int) -> dict[str, Any]:
        """Read the notes of the checkpoint of `step`, without its arrays.

        Raises:
          CheckpointError: if they cannot be read.
        """
        try:
            return json.loads(self._read_run(step)["about"])
        except Exception as error:  # Reading a damaged file may raise any kind of error.
            raise CheckpointError(
                f"Checkpoint {step} in {self.folder} cannot be used: {first_line(error)}"
            ) from error

    def _read_run(self, step: int) -> dict[str, Any]:
        """Read what a checkpoint holds besides the arrays, and check it."""
        run_args = ocp.args.Composite(run=ocp.args.JsonRestore())
        run = self._manager.restore(step, args=run_args)["run"]
        if text_hash(run["about"], sorted(run["structure"].items())) != run["run_digest"]:
            raise ValueError("it does not hold what was written.")
        return run

    def _read(self, step: int, like: State) -> tuple[State, dict[str, Any]]:
        run, pending = self._read_run(step), pending_of(like)
        items: dict[str, Any] = {"state": arrays_of(like)}
        digests = {"state": run["digest"], "pending": run.get("pending")}
        if pending:
            items["pending"] = pending
        expected = structure_of({**items["state"], "pending": pending})
        for name, stored, now in differences(run["structure"], expected):
            if pending or not name.startswith("pending/"):
                raise _MismatchError(f"it has {stored} for {name}, and the run now has {now}.")
        args = {name: ocp.args.StandardRestore(item) for name, item in items.items()}
        found = self._manager.restore(step, args=ocp.args.Composite(**args))
        if any(digest(found[name]) != digests[name] for name in items):
            raise ValueError("it does not hold what was written.")
        state = found["state"]
        if int(state["update"]) != step:
            raise ValueError(f"it holds update {int(state['update'])} under another name.")
        restored = with_arrays(like, state, found.get("pending", ()))
        return restored, json.loads(run["about"])

    def _set_aside(self, step: int) -> None:
        """Rename a damaged checkpoint."""
        place, number = self.folder / f"{step}.damaged", 1
        while place.exists():
            place, number = self.folder / f"{step}.damaged.{number}", number + 1
        try:
            (self.folder / str(step)).rename(place)
        except OSError as error:
            raise CheckpointError(
                f"Checkpoint {step} in {self.folder} cannot be renamed: {error.strerror}."
            ) from error

    def close(self) -> None:
        """Wait for the checkpoint that is being written, and close files and threads.

        Raises:
          CheckpointError: if that checkpoint cannot be written.
        """
        try:
            self.wait()
        finally:
            self._background.close()
            self._manager.close()


def _is_damage(error: Exception) -> bool:
    """Return whether an error means that files are damaged, and not only unusable here."""
    other = (_MismatchError, PermissionError, MemoryError, jax.errors.JaxRuntimeError)
    return not isinstance(error, other) and "PERMISSION_DENIED" not in str(error)
