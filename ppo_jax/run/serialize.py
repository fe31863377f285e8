"""Convert settings to the types that JSON has, and back."""

import contextlib
import json
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError
from pydantic_core import to_jsonable_python

from ppo_jax.errors import SettingError
from ppo_jax.ppo.settings import PPOConfig
from ppo_jax.ppo.unread import find_unread

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


def without_unread(ppo: dict[str, Any]) -> dict[str, Any]:
    """Return stored settings of PPO with the defaults of those that have no effect.

    Older versions accepted other values of these.

    Args:
      ppo: the settings in the types of JSON; some may be missing.

    Example:
      >>> without_unread({"advantage": "grpo", "gamma": 0.9, "group_size": 2})
      {'advantage': 'grpo', 'gamma': 1.0, 'group_size': 2}
    """
    usual = to_json(PPOConfig())
    with contextlib.suppress(ValueError):  # A method that does not exist is refused elsewhere.
        unread = {name for name, _ in find_unread(usual | ppo, PPOConfig)}
        return {name: usual[name] if name in unread else x for name, x in ppo.items()}
    return ppo
