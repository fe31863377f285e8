"""Check the numbers of a run, limit the time of the reward, and handle signals to stop."""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future, wait
from pathlib import Path
from types import FrameType
from typing import Any, Self, TypeVar

import jax
import numpy as np

from ppo_jax.distributed import processes
from ppo_jax.errors import (
    Fault,
    GradientError,
    NonFiniteError,
    NonFiniteParametersError,
    RewardError,
)
from ppo_jax.ops.rewards import ScaleState
from ppo_jax.ppo.state import PPOState
from ppo_jax.run.files import read_lines
from ppo_jax.types import Rollout, Scores

# Exit status after a signal, with a checkpoint written: EX_TEMPFAIL of sysexits.h, "try again".
STOPPED = 75

Result = TypeVar("Result")


def persist(call: Callable[[], Result], *, retries: int, timeout_s: float | None) -> Result:
    """Call a function, and call it again after a `Fault`.

    Args:
      call: the function.
      retries: the number of further calls after the first.
      timeout_s: seconds after which a call counts as failed. None means no limit.

    Returns:
      The result of the first call that succeeds.

    Raises:
      Fault: the fault of the last call; a `RewardError` if the call took longer than `timeout_s`.

    Example:
      >>> persist(lambda: 3, retries=0, timeout_s=1.0)
      3
    """
    for _ in range(retries):
        with contextlib.suppress(Fault):
            return _call_within(timeout_s, call)
    return _call_within(timeout_s, call)


def _call_within(seconds: float | None, call: Callable[[], Result]) -> Result:
    if seconds is None:
        return call()
    future = Future[Result]()

    def work() -> None:
        try:
            future.set_result(call())
        except BaseException as error:
            future.set_exception(error)

    # A daemon thread, because a call that hangs for ever must not keep the process alive.
    threading.Thread(target=work, daemon=True).start()
    if not wait([future], seconds).done:
        raise RewardError(f"The reward function took more than {seconds:g} s.")
    return future.result()


def check_finite(rollout: Rollout, scores: Scores) -> None:
    """Check that the log-probs, KL estimates and values of a rollout are finite.

    Args:
      rollout: the sampled responses.
      scores: their log-probs, KL estimates and values.

    Raises:
      NonFiniteError: if a number is not finite. Its `rows` are the responses with such numbers.
    """
    # Causes come before their effects, so that the message names the cause.
    named = {
        "sampled log-prob": rollout.logprobs,
        "log-prob": scores.logprobs,
        "reference log-prob": scores.ref_logprobs,
        "KL": scores.kl,
        "value": scores.values,
    }
    for name, x in named.items():
        bad = np.flatnonzero(~np.isfinite(jax.device_get(x)).all(axis=1))
        if bad.size:
            raise NonFiniteError(
                f"A {name} is not finite in {bad.size} of {len(x)} responses, first in {bad[0]}.",
                tuple(bad.tolist()),
            )


def check_steps(metrics: dict[str, float]) -> None:
    """Check the metrics of an update.

    Args:
      metrics: the metrics by name.

    Raises:
      GradientError: if a loss or gradient was not finite.
      NonFiniteParametersError: if the new parameters are not finite.
    """
    if not metrics["optimizer/finite"]:
        raise NonFiniteParametersError(
            "The new parameters are not finite: a gradient was not (skip_nonfinite leaves such "
            "steps out), or learning_rate is too large. They are not saved."
        )
    # An update of the critic's warm-up has no loss of the policy.
    names = ("loss/total", "optimizer/grad_norm", "critic/grad_norm")
    numbers = [metrics[name] for name in names if name in metrics]
    if metrics["optimizer/skipped"] or not np.isfinite(numbers).all():
        raise GradientError(
            "A loss or gradient was not finite; "
            f"{metrics['optimizer/skipped']:.0f} steps were left out."
        )


def check_scale(state: ScaleState, scores: np.ndarray) -> None:
    """Check that scores do not make the running moments of the scores infinite.

    Args:
      state: the running moments.
      scores: `[B]` float32, the scores of a batch; NaN for a response without a score.

    Raises:
      RewardError: if the new moments would overflow.
    """
    moved = scores.astype(np.float64) - float(state.mean)
    if float(state.m2) + np.nansum(moved**2) > np.finfo(np.float32).max:
        worst = int(np.nanargmax(np.abs(scores)))
        raise RewardError(
            f"The score {scores[worst]:g} of response {worst} is too large for scale_scores.",
            (worst,),
        )


def check_end(state: PPOState) -> None:
    """Raise GradientError if a finished run has not taken any optimizer step."""
    if not any(int(x.step) for x in (state.train, state.critic) if x is not None):
        raise GradientError(
            "No optimizer step of the run was taken, because all were skipped for faults; the "
            "parameters are unchanged."
        )


def report(out: Path, updates: int) -> None:
    """Say on stderr how many updates of a run had faults, in the first process.

    Args:
      out: the run's folder.
      updates: the number of updates of the run.
    """
    path = out / "faults.jsonl"
    if processes.is_first() and (faulty := {row["update"] for row in read_lines(path)}):
        print(
            f"ppo-jax: {len(faulty)} of {updates} updates had faults; see {path}.", file=sys.stderr
        )


class StopSignals:
    """A context in which the first SIGTERM or SIGINT only sets `received`.

    A second signal ends the process at once. Processes that are forked meanwhile, such as the
    workers of a reward, handle signals as Python does by default.

    Attributes:
      received: the number of the signal, or None if there was none.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._handlers: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if (
            threading.current_thread() is threading.main_thread()
        ):  # Python handles signals in the main thread only.
            for number in (signal.SIGTERM, signal.SIGINT):
                self._handlers[number] = signal.signal(number, self._handle)
            _entered.append(self)
        return self

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None:
            os._exit(128 + number)
        self.received = number
        os.write(2, b"ppo-jax: The run stops after this update; a second signal ends it at once.\n")

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        if self in _entered:
            _entered.remove(self)


_entered: list[StopSignals] = []


def _restore_signals() -> None:
    """Let a forked process, such as a worker of a reward, handle signals as Python does."""
    if _entered:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)


if hasattr(os, "register_at_fork"):  # Windows does not fork.
    os.register_at_fork(after_in_child=_restore_signals)
