"""The loop that all training runs share: when a run evaluates, saves and stops."""

import contextlib
import sys
from collections.abc import Callable, Mapping
from typing import Any, Generic, NamedTuple, Protocol

from tqdm import tqdm

from ppo_jax.distributed import processes
from ppo_jax.run import faults
from ppo_jax.run.logging import BAR_FORMAT, progress_text
from ppo_jax.run.opening import FolderClaim, OpenRun
from ppo_jax.run.settings import LoopConfig
from ppo_jax.run.state_arrays import State


class Trains(Protocol):
    """What a `RunLoop` trains; it keeps the state and the parameters."""

    def step(self) -> dict[str, float] | None:
        """Make an update and return its metrics, or None if a fault made the run skip it."""

    def save(self, *, wait: bool = True) -> None:
        """Write a checkpoint by `RunLoop.save`."""

    def measure(self, update: int) -> dict[str, float]:
        """Evaluate after an update, write the metrics, and return them."""


class Display(NamedTuple):
    """What the terminal shows of a run.

    Attributes:
      name: the title of the progress bar.
      update: the word for an update.
      shown: for each short name on the progress bar, the name of its metric.
      lines: whether a line is printed for each update if there is no terminal for the bar.
    """

    name: str
    update: str
    shown: Mapping[str, str]
    lines: bool = True


class RunLoop(Generic[State]):
    """Runs updates with their evaluations and checkpoints, until the end or a signal to stop.

    Attributes:
      checkpoints, log: the run's checkpoints, and its files of metrics, samples and faults.
      unevaluated: whether an evaluation is due.
      best: the best evaluation so far and the number of updates before it, or None.
      latest: the metrics of the latest evaluation, which the progress bar shows.
      evaluated: the number of updates before that evaluation, or None if it is not known.
    """

    def __init__(
        self,
        opened: OpenRun[State],
        claim: FolderClaim,
        loop: LoopConfig,
        *,
        display: Display,
        best_by: tuple[str, bool] | None,
        publish: Callable[[], None] = lambda: None,
    ):
        """Take over the folder of an opened run.

        Args:
          opened: the run.
          claim: the right to write to its folder.
          loop: the settings of the loop.
          display: what the terminal shows.
          best_by: the metric by which evaluations are compared, and whether a larger one is better;
            None for a run that is not evaluated.
          publish: called at the end of a run.
        """
        self.checkpoints, self.log, notes = opened.checkpoints, opened.log, opened.notes
        self._claim, self._loop, self._publish = claim, loop, publish
        self._display, self._best_by = display, best_by
        self.unevaluated: bool = notes.get("unevaluated", False)
        self.best: tuple[float, int] | None = notes.get("best") and tuple(notes["best"])
        self.latest: dict[str, float] = notes.get("latest", {})
        self.evaluated: int | None = notes.get("evaluated")
        claim.take_over()

    def check(self) -> None:
        """Raise ValueError if a later trainer of this process has taken over the folder."""
        self._claim.check()

    def save(self, state: State, *, wait: bool = True) -> None:
        """Write a checkpoint, unless no update has been made; `wait` as in `Checkpoints.save`."""
        self.check()
        if int(state.update) == 0:
            return
        notes = {
            "sizes": self.log.sizes(),
            "unevaluated": self.unevaluated,
            "best": self.best,
            "latest": self.latest,
            "evaluated": self.evaluated,
        }
        self.checkpoints.save(state, notes, best=self.best and self.best[1], wait=wait)

    def run(
        self,
        trains: Trains,
        done: int,
        on_update: Callable[[dict[str, float]], None] | None = None,
    ) -> None:
        """Run the updates that are left.

        Args:
          trains: what is trained.
          done: number of updates done.
          on_update: called with the metrics of each update.

        Raises:
          Exception: what `trains` raises.
          ValueError: if a later trainer of this process has taken over the folder.
          SystemExit: with the status `faults.STOPPED` after SIGTERM or SIGINT, once the update is
            done and a checkpoint is written.
        """
        self.check()
        bar = self._progress_bar(done)
        ends = (self._publish, self._claim.release, self.log.close, self.checkpoints.close)
        with contextlib.ExitStack() as stack, faults.StopSignals() as signals, bar:
            for end in ends:  # The last one is called first.
                stack.callback(end)
            # Before the first update, which is that of a fork too, and again if a fault ended the
            # run while evaluating.
            self.unevaluated |= done == 0
            self._evaluate(trains, done - 1)
            for update in bar:
                metrics = trains.step()
                if metrics is not None and on_update is not None:
                    on_update(metrics)
                self._finish_update(trains, update, signals)
                if metrics is not None:
                    self._show(bar, update, metrics)

    def _progress_bar(self, done: int) -> tqdm:
        total = self._loop.updates
        hidden = None if self._visible else True  # None hides the bar if there is no terminal
        return tqdm(
            range(done, total),
            initial=done,
            total=total,
            disable=hidden,
            desc=self._display.name,
            bar_format=BAR_FORMAT,
            dynamic_ncols=True,
        )

    @property
    def _visible(self) -> bool:
        return self._loop.progress and processes.is_first()

    def _show(self, bar: tqdm, update: int, metrics: Mapping[str, float]) -> None:
        """Show metrics on the progress bar, or print a line if there is no terminal for it."""
        text = progress_text({**self.latest, **metrics}, self._display.shown, self.evaluated)
        bar.set_postfix_str(text, refresh=False)
        if bar.disable and self._visible and self._display.lines:
            name = self._display.update
            print(f"{name} {update + 1} of {bar.total}: {text}", file=sys.stderr, flush=True)

    def _finish_update(self, trains: Trains, update: int, signals: faults.StopSignals) -> None:
        """Evaluate and save if it is time to, and end the process if a signal asked for it."""
        loop = self._loop
        self.unevaluated = self._best_by is not None and self._is_due(loop.eval_every, update)
        is_best = self._evaluate(trains, update)
        stop = processes.any_process(signals.received is not None)
        if self._is_due(loop.save_every, update) or is_best or stop:
            trains.save(wait=stop or update + 1 == loop.updates)
        if stop and update + 1 < loop.updates:
            processes.print_once(
                f"Stopped by a signal after {update + 1} {self._display.update}s; --resume auto "
                "continues the run."
            )
            raise SystemExit(faults.STOPPED)

    def _is_due(self, every: int, update: int) -> bool:
        """Whether something that happens every so many updates happens after `update`."""
        return update + 1 == self._loop.updates or (every > 0 and (update + 1) % every == 0)

    def _evaluate(self, trains: Trains, update: int) -> bool:
        """Evaluate after `update` if that is due, and say whether it is the best one so far."""
        if not self.unevaluated or self._best_by is None:
            return False
        metrics = trains.measure(update)
        self.unevaluated, self.latest, self.evaluated = False, _numbers(metrics), update + 1
        name, larger_is_better = self._best_by
        value, sign = metrics[name], 1 if larger_is_better else -1
        is_best = update >= 0 and (self.best is None or sign * value > sign * self.best[0])
        self.best = (value, update + 1) if is_best else self.best
        return is_best


def _numbers(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Return metrics without those that are not a number, which JSON does not have."""
    return {name: x for name, x in metrics.items() if x == x}
