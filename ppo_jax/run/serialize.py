"""Convert settings to the types that JSON has, and back."""

import json
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError
from pydantic_core import to_jsonable_python

from ppo_jax.errors import SettingError

Settings = TypeVar("Settings")


def to_json(x: Any) -> Any:
    """Convert settings to the types that JSON has.

    Args:
      x: a dataclass, an enum, a mapping, a sequence or a scalar, nested in any way.

    Returns:
      The same with dictionaries, lists, strings, numbers and None. A value of any other type
      becomes its text.

    Example:
      >>> from pathlib import Path
      >>> to_json({"at": Path("runs/a")})
      {'at': 'runs/a'}
    """
    return to_jsonable_python(x, fallback=str)


def from_json(kind: type[Settings], stored: Any) -> Settings:
    """Convert what `to_json` returned back to a dataclass.

    Args:
      kind: the class of the settings.
      stored: the settings in the types of JSON. Names that `kind` does not have are ignored.

    Returns:
      The settings.

    Raises:
      SettingError: if a setting is missing, has another type or is out of range.

    Example:
      >>> from ppo_jax.run.settings import LoopConfig
      >>> from_json(LoopConfig, {"updates": 3, "wandb_project": None}).updates
      3
    """
    try:
        return TypeAdapter(kind).validate_json(json.dumps(stored), strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(map(str, first["loc"]))
        raise SettingError(f"{name}: {first['msg']}.") from error
