"""A supervised run, which writes the files of a run and can be resumed, as a PPO run."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from ppo_jax.hashing import digest, text_hash
from ppo_jax.ppo.batch_parts import (
    Arrays,
    SupervisedLoss,
    Weight,
    epoch_rows,
    make_step,
    split_batch,
)
from ppo_jax.ppo.supervised import (
    SupervisedState,
    evaluate_loss,
    start_training,
    supervised_optimizer,
)
from ppo_jax.run import provenance
from ppo_jax.run.files import SUPERVISED
from ppo_jax.run.loop import Display, RunLoop
from ppo_jax.run.opening import claim_folder, open_run
from ppo_jax.run.resume import RunConfig
from ppo_jax.run.serialize import to_json
from ppo_jax.run.settings import LoopConfig, Resume, SelectBy
from ppo_jax.run.stored import read_checkpoint
from ppo_jax.types import Params

_BEST_BY = {"loss": ("eval/loss", False), "accuracy": ("eval/accuracy", True)}


@dataclass(frozen=True, kw_only=True)
class Task:
    """What a supervised run minimizes, on which rows, and how.

    Attributes:
      loss_fn: `loss_fn(params, *batch) -> (loss, accuracy)`.
      train: the rows to learn from, `[n, ...]` each.
      held_out: the rows that are held out, or None.
      weight: as in `evaluate_loss`.
      epochs: passes over the rows.
      batch_size: rows of a step.
      learning_rate: peak of the schedule.
      weight_decay: AdamW's decoupled weight decay.
      select_by: which model is the result: the one with the least held-out loss, the greatest
        held-out accuracy, or the last one. Without held-out rows it is the last one.
    """

    loss_fn: SupervisedLoss
    train: Arrays
    held_out: Arrays | None
    weight: Weight | None = None
    epochs: int
    batch_size: int
    learning_rate: float
    weight_decay: float
    select_by: SelectBy = "loss"

    @property
    def epoch_steps(self) -> int:
        """The number of steps of an epoch; 0 if the rows do not fill a batch."""
        return len(self.train[0]) // self.batch_size


class SupervisedTrainer:
    """A train loop that minimizes a loss and writes the files of a run.

    Attributes:
      state: the current state; `step` donates its arrays, which are then deleted.
      task: what is minimized.
      loop: the settings of the loop.
      out: the run's folder.
    """

    def __init__(
        self,
        task: Task,
        params: Params,
        *,
        out: Path,
        loop: LoopConfig,
        config: RunConfig,
        resume: Resume = "no",
    ):
        """Open the run's folder.

        Args:
          task: what is minimized.
          params: the initial parameters, which are copied.
          out: the run's folder.
          loop: the settings of the loop, whose number of updates is that of all steps.
          config: the settings and hashes of the run.
          resume: as for a `Trainer`.

        Raises:
          ValueError: if the folder cannot be used, or the run in it cannot be resumed.
        """
        self.task, self.loop, self.out = task, loop, out
        tx, self._schedule = supervised_optimizer(
            loop.updates, learning_rate=task.learning_rate, weight_decay=task.weight_decay
        )
        start = SupervisedState(start_training(params, tx), jnp.int32(0))
        evaluated = task.held_out is not None
        best_by = _BEST_BY.get(task.select_by, ("eval/loss", False)) if evaluated else None
        figure = best_by[0] if best_by else "eval/loss"
        shown = {"loss": "train/loss", figure.replace("eval/", "held-out "): figure}
        claim = claim_folder(out, resume)
        opened = open_run(out, start, config, loop, resume)
        self.state = opened.state
        display = Display("fit", "step", shown, lines=False)
        self._run_loop = RunLoop(opened, claim, loop, display=display, best_by=best_by)
        self._step = make_step(task.loss_fn, weight=task.weight)
        self._lengths = row_lengths(task.train)
        self._epoch_rows: Callable[[int], np.ndarray] = cache(self._rows)

    def _rows(self, epoch: int) -> np.ndarray:
        size, seed = self.task.batch_size, self.loop.seed
        return epoch_rows(len(self.task.train[0]), batch_size=size, seed=seed, epoch=epoch)

    def step(self) -> dict[str, float]:
        """Take one optimizer step, and write its metrics.

        Returns:
          The metrics.

        Raises:
          ValueError: if the loss is not finite; the state is then not saved.
        """
        self._run_loop.check()
        start, update = time.perf_counter(), int(self.state.update)
        epoch, number = divmod(update, self.task.epoch_steps)
        rows = self._epoch_rows(epoch)[number]
        parts = list(split_batch(self.task.train, rows, self._lengths))
        train, metrics = self._step(self.state.train, parts)
        numbers = {name: float(x) for name, x in jax.device_get(metrics).items()}
        if not np.isfinite([numbers["train/loss"], numbers["optimizer/grad_norm"]]).all():
            raise ValueError(
                f"The loss or the gradient of step {update + 1} is not finite; lower "
                f"learning_rate={self.task.learning_rate}, and check that the model is intact."
            )
        self.state = SupervisedState(train, jnp.int32(update + 1))
        seconds = time.perf_counter() - start
        numbers |= {
            "optimizer/learning_rate": float(self._schedule(update)),
            "time/update_s": seconds,
            "perf/tokens_per_s": float(self._lengths[rows].sum()) / seconds,
        }
        self._run_loop.log.metrics(update, numbers)
        return numbers

    def save(self, *, wait: bool = True) -> None:
        """Write a checkpoint, unless no step has been taken; `wait` as in `Checkpoints.save`."""
        self._run_loop.save(self.state, wait=wait)

    def measure(self, update: int) -> dict[str, float]:
        """Evaluate on the held-out rows after a step, print and write the result.

        Args:
          update: the number of the step from 0; -1 before the first one.

        Returns:
          The metrics `eval/loss` and `eval/accuracy`.
        """
        task = self.task
        assert task.held_out is not None, "only a run with held-out rows is evaluated"
        loss, accuracy = evaluate_loss(
            task.loss_fn,
            self.state.params,
            task.held_out,
            batch_size=task.batch_size,
            lengths=row_lengths(task.held_out),
            weight=task.weight,
        )
        metrics = {"eval/loss": loss, "eval/accuracy": accuracy}
        self._run_loop.log.metrics(update, metrics)
        done = f"after epoch {(update + 1) / task.epoch_steps:.3g}" if update >= 0 else "before"
        tqdm.write(f"Held out, {done}: loss {loss:.4f}, accuracy {accuracy:.3f}")
        return metrics

    def run(self) -> tuple[Params, int]:
        """Take all steps, with their evaluations and checkpoints.

        Returns:
          The parameters of the model that `task.select_by` names, and the number of steps before.

        Raises:
          ValueError: as `step`, or if the selected checkpoint cannot be read.
          SystemExit: with the status `faults.STOPPED` after SIGTERM or SIGINT, once the step is
            done and a checkpoint is written.
        """
        self._run_loop.run(self, int(self.state.update))
        best = self._run_loop.best
        if best is None or self.task.select_by == "last" or best[1] == int(self.state.update):
            return self.state.params, int(self.state.update)
        return read_checkpoint(self.out, self.state, best[1]).params, best[1]


def row_lengths(arrays: Arrays) -> np.ndarray:
    """Return the number of columns that each row uses: up to the last true one in any mask.

    Args:
      arrays: `[n, ...]` each; those that are bool with two axes are masks.

    Returns:
      `[n]` int.

    Example:
      >>> mask = np.array([[True, True, False], [True, False, False]])
      >>> row_lengths((mask.astype(np.int32), mask, np.zeros(2)))
      array([2, 1])
    """
    masks = [x for x in arrays if x.ndim == 2 and x.dtype == bool]
    used = np.any(masks, axis=0)
    return used.shape[1] - np.argmax(used[:, ::-1], axis=1)


def supervised_config(
    *,
    loop: LoopConfig,
    training: dict[str, Any],
    command: Any,
    params: Params,
    model: Any,
    tokenizer: Any,
    rows: Any,
    eval_rows: Any = None,
) -> RunConfig:
    """Make the `run.json` of a supervised run that is about to start.

    Args:
      loop: the settings of the loop.
      training: the settings of the training.
      command: the settings of the command.
      params: the initial parameters.
      model: the configuration of the model.
      tokenizer: its tokenizer.
      rows: the rows of the data, before some are held out.
      eval_rows: held-out rows from data of their own, or None.

    Returns:
      The settings and hashes.
    """
    settings = {
        "loop": loop,
        "training": training,
        "command": command,
        "jax": provenance.numerics(),
    }
    hashes = {
        "model": digest(params),
        "model_config": text_hash(repr(model)),
        "tokenizer": provenance.tokenizer_hash(tokenizer),
        "data": text_hash(rows),
    }
    if eval_rows is not None:
        hashes["eval_data"] = text_hash(eval_rows)
    return RunConfig(to_json(settings), hashes, SUPERVISED)
