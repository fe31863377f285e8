"""Checkpoints of a run through Orbax: one pytree of all that changes, whole or not at all, and checked bit by bit when read."""

import dataclasses
import functools
import json
import logging
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers as kept

from ppo_jax.distributed import processes
from ppo_jax.errors import CheckpointError
from ppo_jax.hashing import digest, text_hash
from ppo_jax.ppo.iteration import PPOState
from ppo_jax.run.provenance import differences

_LOG = logging.getLogger(__name__)
_SPARE_BYTES = 2**20  # what Orbax writes beside the arrays
_LEFTOVERS = (
    "exception was never retrieved",
    "_SignalingThread.run() raised an exception",
    "CheckpointManagerOptions.read_only",
)


def _is_no_leftover(record: logging.LogRecord) -> bool:
    return not any(leftover in record.getMessage() for leftover in _LEFTOVERS)


class _UnfitError(CheckpointError):
    """A checkpoint that is whole, but not of the program that reads it."""


@dataclasses.dataclass
class _One:
    """A policy of Orbax: the checkpoint of `step` stays."""

    step: int | None = None

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        return [checkpoint.step == self.step for checkpoint in checkpoints]


class Checkpoints:
    """The newest `keep` checkpoints of a run's folder and the one that is called the best."""

    def __init__(self, folder: Path, *, keep: int = 2, read_only: bool = False):
        self._best = _One()
        options = ocp.CheckpointManagerOptions(
            preservation_policy=kept.AnyPreservationPolicy([kept.LatestN(keep), self._best]),
            enable_async_checkpointing=False,
            cleanup_tmp_directories=not read_only,
            create=not read_only,
            read_only=read_only,
        )
        # Where one array fails, Orbax logs the failures of all others too, and those of its threads.
        for name in ("asyncio", "absl"):
            logging.getLogger(name).addFilter(_is_no_leftover)
        self.folder = folder.absolute()
        self._manager = ocp.CheckpointManager(self.folder, options=options)

    def save(
        self, state: PPOState, about: dict[str, Any] | None = None, *, best: int | None = None
    ) -> None:
        """Writes a checkpoint named by the updates done, unless it is there.

        Args:
          state: all that changes in the iteration.
          about: what else the run must know to go on, as JSON.
          best: number of updates of the checkpoint that stays whatever comes after it.

        Raises:
          CheckpointError: if it cannot be written, as on a full disk; the earlier ones stay as they are.
        """
        step, arrays = int(state.update), _arrays(state)
        if step in self._manager.all_steps():
            return
        self._best.step = best
        about = json.dumps(about or {}, sort_keys=True)
        run = {"digest": digest(arrays), "about": about, "structure": _structure(arrays)}
        run["run_digest"] = text_hash(run["about"], sorted(run["structure"].items()))
        items = ocp.args.Composite(state=ocp.args.StandardSave(arrays), run=ocp.args.JsonSave(run))
        try:
            processes.first_does(lambda: self._check_room(arrays))
            if not self._manager.save(step, args=items):
                raise OSError(f"Orbax leaves it out beside {self.steps()}.")
        except (
            Exception
        ) as error:  # Orbax and TensorStore raise many kinds for a disk that is full or gone
            raise CheckpointError(
                f"Checkpoint {step} cannot be written to {self.folder}: {_first_line(error)} The earlier ones are untouched."
            ) from error

    def _check_room(self, arrays: Any) -> None:
        needed, free = (
            sum(x.nbytes for x in jax.tree.leaves(arrays)) + _SPARE_BYTES,
            shutil.disk_usage(self.folder).free,
        )
        if needed > free:
            raise OSError(
                f"it may take {needed / 1e6:.1f} MB, and the disk has {free / 1e6:.1f} MB left"
            )

    def steps(self) -> list[int]:
        """Numbers of updates of those there are, newest last."""
        return sorted(self._manager.all_steps())

    def were_any(self) -> bool:
        """Whether there are checkpoints, be they damaged."""
        return bool(self.steps()) or any(self.folder.glob("*.damaged*"))

    def restore(self, like: PPOState, step: int | None = None) -> tuple[PPOState, dict[str, Any]]:
        """The newest good checkpoint, or that of `step`, as a state of the structure and sharding of `like`, and its `about`.

        A damaged one is named in a warning, set aside as `N.damaged`, and the one before it is tried.

        Raises:
          CheckpointError: if there is no good one, or the newest good one has arrays of other shapes than `like`.
        """
        damaged = []
        for number in reversed(self.steps()) if step is None else [step]:
            found, unfit, reason = None, "", ""
            try:
                found = self._read(number, like)
            except Exception as error:  # a damaged file may raise anything
                reason = (
                    f"Checkpoint {number} in {self.folder} cannot be used: {_first_line(error)}"
                )
                unfit = reason if _is_no_damage(error) else ""
            unfit, reason = (
                next(filter(None, processes.told(text)), "") for text in (unfit, reason)
            )
            if unfit:
                raise CheckpointError(unfit)
            if found is not None and not reason:
                return found
            damaged.append(reason)
            if step is None:
                _LOG.warning("%s It is set aside as %d.damaged.", reason, number)
                processes.first_does(functools.partial(self._set_aside, number))
                self._manager.reload()
        spoilt = sorted(path.name for path in self.folder.glob("*.damaged*"))
        aside = (
            f" but {', '.join(spoilt)}, set aside; delete the run's folder to start afresh"
            if spoilt
            else ""
        )
        raise CheckpointError(" ".join(damaged) or f"{self.folder} holds no checkpoint{aside}.")

    def _read(self, step: int, like: PPOState) -> tuple[PPOState, dict[str, Any]]:
        run = self._manager.restore(step, args=ocp.args.Composite(run=ocp.args.JsonRestore()))[
            "run"
        ]
        if text_hash(run["about"], sorted(run["structure"].items())) != run["run_digest"]:
            raise ValueError("it does not hold what was written.")
        arrays = _arrays(like)
        for name, was, now in differences(run["structure"], _structure(arrays)):
            raise _UnfitError(f"it has {was} for {name}, and the run now {now}.")
        stored = self._manager.restore(
            step, args=ocp.args.Composite(state=ocp.args.StandardRestore(arrays))
        )["state"]
        if digest(stored) != run["digest"]:
            raise ValueError("it does not hold what was written.")
        if int(stored["update"]) != step:
            raise ValueError(f"it is that of update {int(stored['update'])} under another name.")
        train = like.train.replace(**stored["train"])
        return like.replace(
            **{**stored, "train": train, "key": jax.random.wrap_key_data(stored["key"])}
        ), json.loads(run["about"])

    def _set_aside(self, step: int) -> None:
        place, number = self.folder / f"{step}.damaged", 1
        while place.exists():
            place, number = self.folder / f"{step}.damaged.{number}", number + 1
        try:
            (self.folder / str(step)).rename(place)
        except OSError as error:
            raise CheckpointError(
                f"Checkpoint {step} in {self.folder} cannot be set aside: {error.strerror}."
            ) from error

    def close(self) -> None:
        self._manager.close()


def _is_no_damage(error: Exception) -> bool:
    outside = isinstance(
        error, _UnfitError | PermissionError | MemoryError | jax.errors.JaxRuntimeError
    )
    return outside or "PERMISSION_DENIED" in str(error)  # TensorStore's own words


def _first_line(error: Exception) -> str:
    """With both ends of a long one: the cause stands last."""
    line = (
        f"it lacks {error}"
        if isinstance(error, KeyError)
        else (str(error).strip() or type(error).__name__).splitlines()[0]
    )
    line = re.sub(r" \[[a-z_]+(\[\d+\])?='.*", "", line)  # TensorStore's own notes behind it
    line = line if len(line) <= 400 else f"{line[:150]} ... {line[-250:]}"
    return line if line.endswith(".") else line + "."


def _structure(arrays: Any) -> dict[str, str]:
    """Shape and type of each array."""
    named = (
        (jax.tree_util.keystr(at, simple=True, separator="/"), x)
        for at, x in jax.tree_util.tree_leaves_with_path(arrays)
    )
    return {name: f"{jnp.result_type(x)}{list(jnp.shape(x))}" for name, x in named}


def _arrays(state: PPOState) -> dict[str, Any]:
    """The state without what Orbax does not store: functions and typed keys."""
    train = {
        "step": state.train.step,
        "params": state.train.params,
        "opt_state": state.train.opt_state,
    }
    return {
        "train": train,
        "kl": state.kl,
        "scale": state.scale,
        "key": jax.random.key_data(state.key),
        "update": state.update,
    }
