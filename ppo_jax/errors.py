"""Every exception that the package raises on purpose, and the check of settings that several of them share."""

import math
from collections.abc import Mapping, Sequence
from typing import Any


class SettingError(Exception):
    """A setting that cannot run. No `ValueError`: the command's parser takes those for its own, and their sentence is lost."""


def check_numbers(settings: Any, prefix: str = "") -> None:
    """Raises SettingError, naming it, if a number of a settings object is none that arrays of 32 bits hold, or a seed negative."""
    for name, value in vars(settings).items():
        if isinstance(value, float) and not math.isfinite(value):
            raise SettingError(f"{prefix}{name} must be a finite number, not {value}.")
        bound = 2**31 if isinstance(value, int) else 2.0**127
        if isinstance(value, int | float) and not abs(value) < bound:
            raise SettingError(
                f"{prefix}{name} must lie within ±{bound:.2g}, which {value:.2g} does not."
            )
        if name == "seed" and value < 0:
            raise SettingError(f"{prefix}seed must not be negative, but is {value}.")


class Fault(ValueError):
    """Something that makes an update useless, such as a reward that fails.

    Attributes:
      kind: "reward", "logprobs" or "gradient"; the settings say for each kind what a run does.
      rows: numbers of the offending rows of the batch; empty if all rows may be at fault.
      dump: the offending rows as they are written to `faults.jsonl`, if they are known.
    """

    kind = "reward"

    def __init__(
        self,
        message: str,
        rows: tuple[int, ...] = (),
        dump: Sequence[Mapping[str, Any]] = (),
    ):
        super().__init__(message)
        self.rows = rows
        self.dump = dump

    def with_rows(self, rows: tuple[int, ...]) -> "Fault":
        """The same fault with other row numbers."""
        return type(self)(str(self), rows, self.dump)

    def select(self, rows: list[Any]) -> list[Any]:
        """The offending ones of `rows`, or all of them if any may be at fault."""
        return [rows[i] for i in self.rows] or rows


class RewardError(Fault):
    """A reward function failed or returned what is no score; the message says which."""


class NonFiniteError(Fault):
    """A log-prob or value that is not finite."""

    kind = "logprobs"


class GradientError(Fault):
    """A loss or gradient that is not finite."""

    kind = "gradient"


class SpoiltError(GradientError):
    """Parameters that are not finite. No policy skips it: the checkpoint before is the one to go on from, with other settings."""


class CheckpointError(ValueError):
    """A checkpoint that cannot be written or read; the message says which and why."""
