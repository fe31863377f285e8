"""The options about prompts that several commands share."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from ppo_jax import data
from ppo_jax.data.columns import PromptColumns
from ppo_jax.data.examples import split
from ppo_jax.data.prompts import LongPrompts
from ppo_jax.errors import SettingError, check_numbers


@dataclass(frozen=True, kw_only=True)
class PromptOptions(PromptColumns):
    """Which columns hold the prompts, and what happens to prompts that are too long."""

    long_prompts: LongPrompts = "error"
    """What happens to prompts that are too long. error: they are refused. drop: they are left out.
    truncate: they are cut at their beginning."""
    max_prompt_tokens: int | None = None
    """Greatest number of tokens of a prompt. By default, what the model can read besides a
    response."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_numbers(self)
        if self.max_prompt_tokens is not None and self.max_prompt_tokens < 1:
            raise SettingError(
                f"max_prompt_tokens must be at least 1, not {self.max_prompt_tokens}."
            )

    def limits(self) -> dict[str, Any]:
        """Return the arguments of `encode_prompts` that limit the length of prompts."""
        return {"long_prompts": self.long_prompts, "max_prompt_tokens": self.max_prompt_tokens}

    def report(self, prompts: data.Prompts, source: str) -> str | None:
        """Say how many prompts were dropped or cut; None if none were.

        Args:
          prompts: the prompts that `encode_prompts` returned.
          source: where they come from.

        Returns:
          A sentence.
        """
        count = prompts.too_long
        if not count:
            return None
        dropped = self.long_prompts == "drop"
        total = len(prompts) + count if dropped else len(prompts)
        what = "left out" if dropped else "cut at their beginning"
        return f"{count} of {total} prompts of {source} are too long and are {what}."


def hold_out(
    rows: list[data.Row], source: str, *, fraction: float, seed: int
) -> tuple[list[data.Row], list[data.Row]]:
    """Split rows at random into those to learn from and those that are held out.

    Args:
      rows: at least two rows.
      source: where they come from.
      fraction: the share of the rows that are held out.
      seed: seed of the choice.

    Returns:
      Both parts, in the order of the rows.
    """
    if len(rows) < 2:
        raise ValueError(
            f"{source} has only one prompt, so eval_fraction={fraction} cannot hold any out; pass "
            "--eval-prompts."
        )
    kept, held_out = split((np.arange(len(rows)),), seed=seed, fraction=fraction)
    return [rows[i] for i in np.sort(kept[0])], [rows[i] for i in np.sort(held_out[0])]
