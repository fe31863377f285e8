"""Read the checkpoints of a run that is not resumed, without a change to its folder."""

import contextlib
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from ppo_jax.errors import CheckpointError
from ppo_jax.run.checkpoints import Checkpoints
from ppo_jax.run.settings import Which
from ppo_jax.run.state_arrays import State


def read_checkpoint(run: Path, like: State, which: Which = "last") -> State:
    """Read a checkpoint of a run.

    Args:
      run: the folder of the run.
      like: a state with the structure and sharding of the result.
      which: the number of updates of the checkpoint, "best" for the one with the best evaluation
        on held-out prompts, or "last" for the newest good one.

    Returns:
      The state.

    Raises:
      ValueError: if the run has no such checkpoint.
      CheckpointError: if the checkpoint is damaged, or does not fit `like`.
    """
    with _open(run) as checkpoints:
        return newest_good(checkpoints, like, _chosen(run, checkpoints, which))


def find_checkpoint(run: Path, which: Which = "last") -> int:
    """Return the number of updates of a checkpoint of a run, without reading its arrays.

    Args:
      run: the folder of the run.
      which: as in `read_checkpoint`.

    Raises:
      ValueError: if the run has no such checkpoint.
    """
    with _open(run) as checkpoints:
        return _chosen(run, checkpoints, which)[-1]


@contextlib.contextmanager
def _open(run: Path) -> Iterator[Checkpoints]:
    if not (run / "checkpoints").is_dir():
        raise ValueError(f"{run} holds no checkpoints of a run.")
    checkpoints = Checkpoints(run / "checkpoints", read_only=True)
    try:
        yield checkpoints
    finally:
        checkpoints.close()


def _chosen(run: Path, checkpoints: Checkpoints, which: Which) -> list[int]:
    """Return the numbers of updates of the checkpoints that may be read, the newest one last."""
    steps = checkpoints.steps()
    if which == "best":
        steps = [_best(run, checkpoints)]
    elif which != "last":
        if which not in steps:
            raise ValueError(
                f"{run} has no checkpoint after {which} updates; it has those after {steps}."
            )
        steps = [which]
    if not steps:
        raise ValueError(f"{run} holds no checkpoint that could be read.")
    return steps


def _best(run: Path, checkpoints: Checkpoints) -> int:
    """Return the number of updates of the checkpoint with the best evaluation."""
    for step in reversed(checkpoints.steps()):
        try:
            best = checkpoints.notes(step).get("best")
        except CheckpointError:
            continue
        if best is None:
            raise ValueError(
                f"The run in {run} was not evaluated on held-out prompts, so that none of its "
                "checkpoints is the best; choose one by its number of updates, or the last one."
            )
        return int(best[1])
    raise ValueError(f"{run} holds no checkpoint that could be read.")


def newest_good(checkpoints: Checkpoints, like: State, steps: Sequence[int]) -> State:
    """Read the newest one of some checkpoints that is not damaged.

    Args:
      checkpoints: the checkpoints of a run.
      like: a state with the structure and sharding of the result.
      steps: the numbers of updates of the checkpoints, in increasing order; at least one.

    Returns:
      The state.

    Raises:
      CheckpointError: if none of them can be read.
    """
    for step in reversed(steps[1:]):
        try:
            return checkpoints.restore(like, step)[0]
        except CheckpointError as error:
            print(f"{error} Trying the checkpoint before it.", file=sys.stderr)
    return checkpoints.restore(like, steps[0])[0]
