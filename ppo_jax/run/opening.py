"""Open a run's folder: lock it, restore the newest checkpoint, and start the logs."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, Generic, NamedTuple
from weakref import WeakValueDictionary

from filelock import BaseFileLock

from ppo_jax.distributed import processes
from ppo_jax.errors import SettingError
from ppo_jax.run.checkpoints import Checkpoints
from ppo_jax.run.files import check_free, create_run_folder, cut_back, lock_folder
from ppo_jax.run.logging import NoLog, RunLog
from ppo_jax.run.resume import RunConfig, check_unchanged
from ppo_jax.run.settings import LoopConfig, Resume
from ppo_jax.run.state_arrays import State


class OpenRun(NamedTuple, Generic[State]):
    """A run whose folder is open for writing.

    Attributes:
      state: the restored state, or the initial one.
      checkpoints: the run's checkpoints.
      log: writes metrics, samples and faults; in all processes but the first it writes nothing.
      notes: what the newest checkpoint holds besides the state. `unevaluated` is true if an
        evaluation was due, and `best` is the best evaluation so far.
    """

    state: State
    checkpoints: Checkpoints
    log: RunLog | NoLog
    notes: dict[str, Any]


class FolderClaim:
    """The right of a `Trainer` to write to a folder, until a later one of its process takes over.

    The lock keeps other processes out, and is released when the claim is no longer used. Within a
    process, as in a notebook whose cell is run again, the newest trainer takes over.
    """

    _newest: ClassVar[WeakValueDictionary[Path, "FolderClaim"]] = WeakValueDictionary()

    def __init__(self, folder: Path, lock: BaseFileLock | None):
        """Claim a folder; `lock` is None in all processes but the first."""
        self._folder, self._lock = folder.resolve(), lock

    def take_over(self) -> None:
        """Take the folder from an earlier trainer of this process, once this one is open."""
        if (earlier := self._newest.get(self._folder)) is not None:
            earlier.release()
        self._newest[self._folder] = self

    def check(self) -> None:
        """Raise ValueError if a later trainer has taken over."""
        if self._newest.get(self._folder) is not self:
            raise ValueError(
                f"A later Trainer of this process has taken over {self._folder}; go on with that "
                "one, or give each its own folder."
            )

    def release(self) -> None:
        """Release the lock, once."""
        if self._lock is not None:
            self._lock.release()
            self._lock = None


def claim_folder(folder: Path, resume: Resume) -> FolderClaim:
    """Create a run's folder and lock it, so that no other run writes to it.

    Args:
      folder: the folder.
      resume: as in `open_run`.

    Returns:
      The claim, which the caller checks before it writes.

    Raises:
      ValueError: if the folder holds another run, cannot be created, is locked by another process,
        or is not visible to all processes.
    """
    locks = []

    def claim_and_lock() -> None:
        locks.append(lock_folder(create_run_folder(folder, resume=resume != "no")))
        # Checked again, because another run may have written to the folder and ended before it was
        # locked.
        check_free(folder, resume=resume != "no")

    processes.on_first_process(claim_and_lock)
    if processes.any_process(not folder.is_dir()):
        raise ValueError(
            f"{folder} is not visible to all processes; they need a folder that each of them sees."
        )
    return FolderClaim(folder, locks[0] if locks else None)


def open_run(
    folder: Path,
    state: State,
    config: RunConfig,
    loop: LoopConfig,
    resume: Resume,
    fork: Callable[[State], tuple[State, dict[str, Any]]] | None = None,
    after_save: Callable[[], None] | None = None,
) -> OpenRun[State]:
    """Open a claimed folder for a new run, or for one that is resumed.

    Args:
      folder: the run's folder.
      state: the initial state; a restored state has its structure and sharding.
      config: the settings and hashes of the run that starts.
      loop: the settings of the train loop.
      resume: "yes" restores the newest good checkpoint, "auto" does so if there is one, and "no"
        starts a new run.
      fork: for a new run that starts from a checkpoint of another one, what returns the state to
        start from, given the initial one, and what `config.json` records about it; or None.
      after_save: as in `Checkpoints`.

    Returns:
      The opened run.

    Raises:
      ValueError: if there is no checkpoint to resume from, or if a setting or input on which the
        result depends differs from that of the run in the folder.
      SettingError: if the run has made more updates than `loop.updates`.
    """
    processes.check_same({f"The hash of the {name}": x for name, x in config.hashes.items()})
    checkpoints = Checkpoints(folder / "checkpoints", keep=loop.keep, after_save=after_save)
    notes: dict[str, Any] = {}
    origin = None
    if resume == "yes" and not checkpoints.were_any():
        raise ValueError(
            f"{folder} holds no checkpoint to resume from; use --resume auto or no to start a run."
        )
    if resume != "no" and checkpoints.were_any():
        check_unchanged(folder, config)
        state, notes = checkpoints.restore(state)
    if fork is not None:
        state, origin = fork(state)
        # Saved before anything else, so that the run can be resumed from its very beginning.
        notes = {"unevaluated": True}
        checkpoints.save(state, notes)
    update = int(state.update)
    if update > loop.updates:
        raise SettingError(
            f"The run in {folder} has made {update} updates; updates={loop.updates} is fewer."
        )

    def prepare_files() -> None:
        cut_back(folder, notes.get("sizes", {}))
        config.write(folder, first_update=update, forked_from=origin)

    processes.on_first_process(prepare_files)
    log: RunLog | NoLog = NoLog()
    if processes.is_first():
        log = RunLog(
            folder,
            tensorboard=loop.tensorboard,
            wandb_project=loop.wandb_project,
            first_update=update,
            settings=config.settings,
        )
    return OpenRun(state, checkpoints, log, notes)
