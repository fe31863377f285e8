"""The settings of the train loop."""

import threading
from dataclasses import dataclass, field
from typing import Literal

from ppo_jax.errors import SettingError, check_choices, check_numbers

OnFault = Literal["stop", "skip"]
Resume = Literal["no", "yes", "auto"]
SelectBy = Literal["loss", "accuracy", "last"]
# A checkpoint of a run, by its number of updates, by the evaluation, or by its age.
Which = Literal["best", "last"] | int


@dataclass(frozen=True, kw_only=True)
class Faults:
    """What the run does if the reward fails or a number is not finite.

    "stop" writes the responses that caused the fault to `faults.jsonl`, and ends the run after a
    checkpoint. "skip" writes the same and continues without the update or, if it was a gradient,
    without the optimizer step.

    Example:
      >>> Faults(reward="skip", reward_retries=2).gradient
      'skip'
    """

    reward: OnFault = "stop"
    """What to do if the reward raises an error, hangs, or returns a score that is not finite."""
    logprobs: OnFault = "stop"
    """What to do if a log-prob or a value is not finite."""
    gradient: OnFault = "skip"
    """What to do if a loss or gradient is not finite; skip leaves out that optimizer step only."""
    reward_retries: int = 0
    """Number of further calls if the reward fails."""
    reward_timeout_s: float | None = None
    """Seconds after which a call of the reward counts as failed; none sets no limit."""

    def __post_init__(self) -> None:
        check_choices(self, prefix="faults.")
        check_numbers(self)
        if self.reward_retries < 0:
            raise SettingError(
                f"reward_retries must not be negative, but is {self.reward_retries}."
            )
        timeout, most = self.reward_timeout_s, threading.TIMEOUT_MAX
        if timeout is not None and not 0 < timeout <= most:
            raise SettingError(
                f"reward_timeout_s must be positive and at most {most:.0f}, or none, not {timeout}."
            )


@dataclass(frozen=True, kw_only=True)
class LoopConfig:
    """How long a run trains and what it writes.

    Of these settings, the result depends on `seed` and `staleness` only, and on `updates` if the
    learning rate decays.

    Example:
      >>> LoopConfig(updates=50).save_every
      50
    """

    updates: int = 100
    """Number of PPO updates."""
    seed: int = 0
    """Seed of sampling, shuffling and new parameters."""
    staleness: int = 0
    """Number of updates by which the policy that samples is behind: update u learns from responses
    of the policy after max(u - staleness, 0) updates."""
    eval_every: int = 0
    """Number of updates between evaluations on held-out prompts; 0 evaluates at the end only."""
    save_every: int = 50
    """Number of updates between checkpoints; 0 saves at the end only."""
    keep: int = 2
    """Number of newest checkpoints to keep, besides the one with the best evaluation."""
    samples: int = 4
    """Number of sampled texts to write in each update."""
    tensorboard: bool = True
    """Write TensorBoard events."""
    wandb_project: str | None = None
    """Weights & Biases project to log to as well."""
    progress: bool = True
    """Show a progress bar on standard error, or print a line per update if it is not a terminal."""
    faults: Faults = field(default_factory=Faults)
    """What the run does if the reward fails or a number is not finite."""

    def __post_init__(self) -> None:
        check_numbers(self)
        for name in ("updates", "keep"):
            if getattr(self, name) < 1:
                raise SettingError(f"{name} must be at least 1, not {getattr(self, name)}.")
        for name in ("staleness", "eval_every", "save_every", "samples"):
            if getattr(self, name) < 0:
                raise SettingError(f"{name} must not be negative, but is {getattr(self, name)}.")
