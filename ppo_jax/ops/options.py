"""Checks of the options of a function, when it is called or traced.

Only numbers are checked: an option may also be None, an array or traced. The names of the keywords
are those of the message. This module does not import JAX.
"""

import enum
from collections.abc import Callable
from numbers import Real
from typing import Any, TypeVar

Choice = TypeVar("Choice", bound=enum.Enum)


def choose(kind: type[Choice], value: Choice | str, name: str) -> Choice:
    """Return the member of an enumeration that is given by itself or by its value.

    Raises:
      ValueError: if there is no such member.
    """
    try:
        return kind(value)
    except ValueError:
        values = ", ".join(str(member.value) for member in kind)
        raise ValueError(f"{name} must be one of {values}, but is {value!r}.") from None


def _check(rule: str, holds: Callable[[Any], bool], options: dict[str, object]) -> None:
    for name, value in options.items():
        if isinstance(value, Real) and not holds(value):
            raise ValueError(f"{name} must {rule}, but is {value}.")


def check_positive(**options: object) -> None:
    """Raise ValueError if a number is 0, negative or NaN."""
    _check("be positive", lambda x: x > 0, options)


def check_not_negative(**options: object) -> None:
    """Raise ValueError if a number is negative or NaN."""
    _check("not be negative", lambda x: x >= 0, options)


def check_over_one(**options: object) -> None:
    """Raise ValueError if a number is 1, below or NaN."""
    _check("be over 1", lambda x: x > 1, options)


def check_unit(**options: object) -> None:
    """Raise ValueError if a number is not in 0 .. 1."""
    _check("lie in 0 .. 1", lambda x: 0 <= x <= 1, options)


def check_range(low: object, high: object) -> None:
    """Raise ValueError if two numbers are not in the order `0 <= low <= high`."""
    check_not_negative(low=low, high=high)
    if isinstance(low, Real) and isinstance(high, Real) and not low <= high:
        raise ValueError(f"low={low} must be at most high={high}.")
