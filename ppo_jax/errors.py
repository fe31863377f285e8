"""The exceptions that the package raises on purpose.

Errors in the settings, which are raised before anything is compiled:

* `SettingError`: a setting, or a combination of settings, cannot run.

Errors of one update, all of which derive from `Fault`. The settings `ppo_jax.Faults` say for each
kind whether it ends the run or only skips the update:

* `RewardError`: the reward function failed, or did not return one finite score for each response.
* `NonFiniteError`: a log-probability, KL estimate or value is infinite or NaN.
* `GradientError`: a loss or gradient is infinite or NaN.
* `NonFiniteParametersError`: a parameter is infinite or NaN after the update. It always ends the
  run.

Errors of the files of a run:

* `CheckpointError`: a checkpoint cannot be written, or cannot be read back.

This module imports only the standard library, so that it is cheap to import.
"""

import enum
import functools
import math
import re
from collections.abc import Sequence
from typing import Any, Literal, Self, get_args, get_origin, get_type_hints


class SettingError(Exception):
    """A setting, or a combination of settings, cannot run.

    It is not a ValueError, because tyro catches those while it parses the command line and drops
    their message.
    """


def check_numbers(settings: object, prefix: str = "") -> None:
    """Check that all numbers of a settings object fit in 32 bits and that no seed is negative.

    Args:
      settings: an object whose attributes are the settings, such as a dataclass. Attributes that
        are not numbers are ignored.
      prefix: text before the name of a setting in the message, such as `"lora."`.

    Raises:
      SettingError: if a float is infinite or NaN, if an integer does not fit in 32 bits, if a float
        is beyond the range of float32, or if an attribute `seed` or `eval_seed` is
        negative.

    Example:
      >>> from types import SimpleNamespace
      >>> check_numbers(SimpleNamespace(rank=8, alpha=float("nan")), prefix="lora.")
      Traceback (most recent call last):
      ppo_jax.errors.SettingError: lora.alpha must be a finite number, not nan.
    """
    for name, value in vars(settings).items():
        if isinstance(value, float) and not math.isfinite(value):
            raise SettingError(f"{prefix}{name} must be a finite number, not {value}.")
        bound = 2**31 if isinstance(value, int) else 2.0**127
        if isinstance(value, int | float) and not abs(value) < bound:
            raise SettingError(f"{prefix}{name} must lie within ±{bound:.2g}, but is {value:.2g}.")
        if name in ("seed", "eval_seed") and value is not None and value < 0:
            raise SettingError(f"{prefix}{name} must not be negative, but is {value}.")


def check_choices(settings: object, prefix: str = "") -> None:
    """Check the settings that have a fixed set of values; texts become members of enumerations.

    Args:
      settings: a dataclass, which may be frozen, but not yet in use.
      prefix: text before the name of a setting in the message.

    Raises:
      SettingError: if the type of a setting is an enumeration or a `Literal`, and its value is not
        one of those.

    Example:
      >>> from ppo_jax import PPOConfig
      >>> PPOConfig(loss="cispo").loss
      <Loss.CISPO: 'cispo'>
      >>> PPOConfig(weighting="words")
      Traceback (most recent call last):
      ppo_jax.errors.SettingError: weighting must be token, sequence, sequence_sum, \
constant_length or token_sum, not 'words'.
    """
    settings_class: Any = type(settings)
    for name, (kind, choices) in _choices(settings_class).items():
        value = getattr(settings, name)
        if isinstance(value, enum.Enum) and isinstance(value, kind):
            continue
        if value not in choices:
            words = [str(x) for x in choices]
            listed = f"{', '.join(words[:-1])} or {words[-1]}"
            given = value.value if isinstance(value, enum.Enum) else value
            raise SettingError(f"{prefix}{name} must be {listed}, not {given!r}.")
        if kind is not object:
            object.__setattr__(settings, name, kind(value))


@functools.cache
def _choices(kind: Any) -> dict[str, tuple[Any, tuple[Any, ...]]]:
    """Return the enumeration, or object for a Literal, and the values of each such setting."""
    found: dict[str, tuple[Any, tuple[Any, ...]]] = {}
    for name, of in get_type_hints(kind).items():
        if isinstance(of, type) and issubclass(of, enum.Enum):
            found[name] = of, tuple(member.value for member in of)
        elif get_origin(of) is Literal:
            found[name] = object, get_args(of)
    return found


class Fault(ValueError):
    """One update cannot be used, because its rewards or its numbers are bad.

    Attributes:
      kind: the field of `ppo_jax.Faults` that says what to do: "reward", "logprobs" or "gradient".
      rows: indices in the batch of the responses that caused the fault; empty if not known.
      dump: what `faults.jsonl` records of those responses, one dictionary per response. It is empty
        until the texts of the responses are known.

    Example:
      >>> fault = NonFiniteError("A value is not finite.", rows=(1,))
      >>> moved = fault.with_rows([9])
      >>> moved, moved.kind, moved.rows
      (NonFiniteError('A value is not finite.'), 'logprobs', (9,))
    """

    kind = "reward"

    def __init__(
        self, message: str, rows: Sequence[int] = (), dump: Sequence[dict[str, Any]] = ()
    ) -> None:
        """Set the message and, where they are known, the `rows` and the `dump` of the fault."""
        super().__init__(message)
        self.rows, self.dump = tuple(rows), list(dump)

    def with_rows(
        self,
        rows: Sequence[int],
        message: str | None = None,
        dump: Sequence[dict[str, Any]] | None = None,
    ) -> Self:
        """Return a fault of the same class, cause and traceback, with other rows.

        Args:
          rows: the new `rows`.
          message: the new message. `None` keeps the message.
          dump: the new `dump`. `None` keeps the dump.
        """
        other = type(self)(message or str(self), rows, self.dump if dump is None else dump)
        other.__cause__ = self.__cause__
        return other.with_traceback(self.__traceback__)


class RewardError(Fault):
    """The reward function failed, or did not return one finite score for each response."""


class NonFiniteError(Fault):
    """A log-probability, KL estimate or value is infinite or NaN."""

    kind = "logprobs"


class GradientError(Fault):
    """A loss or gradient is infinite or NaN."""

    kind = "gradient"


class NonFiniteParametersError(GradientError):
    """A parameter is infinite or NaN after an update.

    It always ends the run, because every later update would be useless too. Resume the run from its
    last checkpoint with other settings.
    """


class CheckpointError(ValueError):
    """A checkpoint cannot be written or read. The message says which one, and why."""


def first_line(error: Exception) -> str:
    """Return the first line of an error's message as a sentence of at most about 400 characters.

    Example:
      >>> first_line(OSError("the disk is full"))
      'the disk is full.'
    """
    text = f"the key {error} is missing" if isinstance(error, KeyError) else str(error).strip()
    line = (text or type(error).__name__).splitlines()[0]
    line = re.sub(r" \[[a-z_]+(\[\d+\])?='.*", "", line)  # TensorStore appends details.
    if len(line) > 400:  # The cause of the error is at the end of the line.
        line = f"{line[:150]} ... {line[-250:]}"
    return line if line.endswith(".") else line + "."
