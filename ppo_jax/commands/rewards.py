"""The options about rewards that several commands share."""

import math
from collections.abc import Sequence
from typing import Annotated, Any

import tyro
from pydantic import BeforeValidator

from ppo_jax.errors import SettingError


def _as_tuple(stored: Any) -> Any:
    """Return texts in a file of settings as a tuple; a single one may stand without a list."""
    if isinstance(stored, str):
        return (stored,)
    return tuple(stored) if isinstance(stored, list) else stored


# An option that is given once for each text, such as --reward.
Several = Annotated[tuple[str, ...], tyro.conf.UseAppendAction, BeforeValidator(_as_tuple)]


def check_rewards(rewards: Sequence[str], timeout_s: float | None) -> None:
    """Check the options of the rewards.

    Args:
      rewards: the rewards.
      timeout_s: the time limit for one response, or None.

    Raises:
      SettingError: if there is no reward, or the time limit is not positive.
    """
    if rewards == ():
        raise SettingError("reward is missing; name one, such as --reward my_file.py:function.")
    if timeout_s is not None and not (timeout_s > 0 and math.isfinite(timeout_s)):
        raise SettingError(f"reward_timeout must be a positive number of seconds, not {timeout_s}.")
