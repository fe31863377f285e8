"""What a run does when something goes wrong: a reward that fails or hangs, numbers that are not finite, a signal to stop."""

import contextlib
import dataclasses
import os
import signal
import threading
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax.training.train_state import TrainState

from ppo_jax.errors import (
    Fault,
    GradientError,
    NonFiniteError,
    RewardError,
    SettingError,
    SpoiltError,
    check_numbers,
)
from ppo_jax.ops.rewards import ScaleState, running_scale
from ppo_jax.types import Rollout, Scores

STOPPED = (
    75  # exit status after a signal, with a checkpoint written: "try again later" in sysexits.h
)

Policy = Literal["stop", "skip"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Faults:
    """stop: write what is needed to look into it, and end the run; skip: the same, and go on without the update (or the step)."""

    reward: Policy = "stop"
    """The reward raises, hangs, or returns what is no finite score."""
    logprobs: Policy = "stop"
    """A log-prob or value is not finite."""
    gradient: Policy = "skip"
    """A loss or gradient is not finite; skip leaves out that optimizer step alone."""
    reward_retries: int = 0
    """Further calls of a reward that fails."""
    reward_timeout_s: float | None = None
    """Seconds after which a call of the reward has failed; none: wait for ever."""

    def __post_init__(self):
        check_numbers(self)
        if self.reward_retries < 0:
            raise SettingError(
                f"reward_retries must not be negative, but is {self.reward_retries}."
            )
        if (
            self.reward_timeout_s is not None
            and not 0 < self.reward_timeout_s <= threading.TIMEOUT_MAX
        ):
            most = f"at most {threading.TIMEOUT_MAX:.0f}"
            raise SettingError(
                f"reward_timeout_s must be positive and {most}, or none, not {self.reward_timeout_s}."
            )


def persist(call: Callable[[], Any], *, retries: int, timeout_s: float | None) -> Any:
    """The result of `call`, tried again after each `Fault`.

    Raises:
      Fault: the last one; a `RewardError` if it took longer than `timeout_s`.

    Example:
      >>> persist(lambda: 3, retries=0, timeout_s=1.0)
      3
    """
    for _ in range(retries):
        with contextlib.suppress(Fault):  # it is asked again
            return _within(timeout_s, call)
    return _within(timeout_s, call)


def _within(seconds: float | None, call: Callable[[], Any]) -> Any:
    if seconds is None:
        return call()
    done: list[Any] = []

    def work() -> None:
        try:
            done.append((call(), None))
        except BaseException as error:
            done.append((None, error))

    thread = threading.Thread(
        target=work, daemon=True
    )  # one that hangs for ever does not keep the process
    thread.start()
    thread.join(seconds)
    if not done:
        raise RewardError(f"The reward function took more than {seconds:g} s.")
    result, error = done[0]
    if error is not None:
        raise error
    return result


def check_finite(rollout: Rollout, scores: Scores) -> None:
    """Raises NonFiniteError with the rows whose log-probs or values are not finite."""
    named = {
        "sampled log-prob": rollout.logprobs,
        "log-prob": scores.logprobs,
        "reference log-prob": scores.ref_logprobs,
        "KL": scores.kl,
        "value": scores.values,
    }
    found = jax.device_get(named)
    for name in named:  # the cause first: a mapping comes back sorted
        x = found[name]
        bad = np.flatnonzero(~np.isfinite(x).all(axis=1))
        if bad.size:
            message = (
                f"A {name} is not finite in {bad.size} of {len(x)} responses, first in {bad[0]}."
            )
            raise NonFiniteError(message, tuple(bad.tolist()))


def check_steps(metrics: dict[str, float]) -> None:
    """Raises GradientError if an update had a loss or gradient that is not finite, SpoiltError if its parameters are not."""
    if not metrics["optimizer/finite"]:
        why = "a gradient was not (skip_nonfinite leaves such steps out), or learning_rate is too large"
        raise SpoiltError(f"The new parameters are not finite: {why}. They are not saved.")
    if (
        metrics["optimizer/skipped"]
        or not np.isfinite([metrics["loss/total"], metrics["optimizer/grad_norm"]]).all()
    ):
        skipped = f"{metrics['optimizer/skipped']:.0f} steps were left out."
        raise GradientError(f"A loss or gradient was not finite; {skipped}")


def check_scale(state: ScaleState, scores: np.ndarray) -> None:
    """Raises RewardError if scores `[B]` would spoil the running moments, and so the scale of all later ones."""
    new, _ = running_scale().update(jax.device_get(state), jnp.asarray(scores))
    if not np.isfinite(new).all():
        worst = int(np.abs(scores).argmax())
        raise RewardError(
            f"The score {scores[worst]:g} of response {worst} is too large for scale_scores.",
            (worst,),
        )


def check_end(train: TrainState) -> None:
    """Raises GradientError if a run that is done has learned nothing."""
    if int(train.step) == 0:
        raise GradientError(
            "No optimizer step of the run was taken: all were skipped for faults; the parameters are as they were."
        )


class StopSignals:
    """While open, SIGTERM and SIGINT only ask for a stop, in `received`; a second one ends the process at once."""

    def __enter__(self) -> "StopSignals":
        self.received: int | None = None
        self._before = {}
        if threading.current_thread() is threading.main_thread():
            self._before = {
                number: signal.signal(number, self._handle)
                for number in (signal.SIGTERM, signal.SIGINT)
            }
        return self

    def _handle(self, number: int, _: Any) -> None:
        if self.received is not None:
            os._exit(128 + number)
        self.received = number
        os.write(2, b"ppo-jax: The run stops after this update; a second signal ends it at once.\n")

    def __exit__(self, *_: Any) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
