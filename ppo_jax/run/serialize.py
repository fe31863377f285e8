"""Converts settings to the types of JSON, and back."""

import dataclasses
import enum
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ppo_jax.errors import SettingError


def plain(x: Any) -> Any:
    """Convert settings to the types that JSON has.

    Args:
      x: a dataclass, an enum, a mapping, a sequence or a scalar, nested in any way.

    Returns:
      The same with dictionaries, lists, strings, numbers and None.

    Example:
      >>> plain({"at": Path("runs/a")})
      {'at': 'runs/a'}
    """
    if dataclasses.is_dataclass(x) and not isinstance(x, type):
        return {field.name: plain(getattr(x, field.name)) for field in dataclasses.fields(x)}
    if isinstance(x, enum.Enum):
        return x.value
    if isinstance(x, Mapping):
        return {str(k): plain(v) for k, v in x.items()}
    if isinstance(x, list | tuple):
        return [plain(v) for v in x]
    return x if isinstance(x, bool | int | float | str | None) else str(x)


def revive(kind: Any, stored: Any) -> Any:
    """Convert what `plain` returned back to a value of type `kind`.

    Args:
      kind: a dataclass, or the annotation of one of its fields.
      stored: the value in the types of JSON.

    Returns:
      The value.

    Raises:
      SettingError: if `stored` has another type or is out of range.

    Example:
      >>> from ppo_jax.run.settings import LoopConfig
      >>> revive(LoopConfig, {"updates": 3, "wandb_project": None}).updates
      3
    """
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        some = next(part for part in arguments if part is not type(None))
        return None if stored is None else revive(some, stored)
    if dataclasses.is_dataclass(kind) and isinstance(stored, dict):
        return _revive_fields(kind, stored)
    if origin is tuple and isinstance(stored, list):
        return tuple(revive(arguments[0], x) for x in stored)
    if origin is typing.Literal and stored in arguments:
        return stored
    if kind is bool and isinstance(stored, bool):
        return stored
    accepted = {int: (int,), float: (int, float), str: (str,)}
    if isinstance(stored, accepted.get(kind, ())) and not isinstance(stored, bool):
        return stored
    if isinstance(kind, type) and issubclass(kind, enum.Enum | Path) and isinstance(stored, str):
        return kind(stored)
    raise SettingError(f"{stored!r:.60} is not a {getattr(kind, '__name__', kind)}.")


def _revive_fields(kind: Any, stored: dict[str, Any]) -> Any:
    hints = typing.get_type_hints(kind)
    values = {}
    for name in hints.keys() & stored.keys():
        try:
            values[name] = revive(hints[name], stored[name])
        except (SettingError, ValueError) as error:
            raise SettingError(f"{name}: {error}") from error
    return kind(**values)
