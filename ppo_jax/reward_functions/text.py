"""The reward that wraps a user's function of texts."""

import asyncio
import copy
import inspect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from ppo_jax import data
from ppo_jax.reward_functions.protocol import TaskScores, as_reward_error, check_scores
from ppo_jax.types import Rollout


class TextReward(NamedTuple):
    """A reward that calls a function of prompts and responses as texts.

    Attributes:
      function: `function(prompts, responses)` with two lists of `B` texts, or
        `function(prompts, responses, rows)` with the prompts' rows, if it has a third parameter
        that must be given or is called `rows`. Other parameters that are named as columns of the
        rows get lists of `B` values, and `**kwargs` gets all other columns, as in TRL. It returns
        `B` numbers, and may be an `async def`.

    Example:
      >>> import numpy as np
      >>> reward = TextReward(lambda prompts, responses: [len(text) for text in responses])
      >>> prompts = data.Prompts([{"prompt": "2 + 2 ="}], np.array([[1]]), np.array([[True]]))
      >>> reward(None, prompts, [" four"]).response  # This reward does not read the rollout.
      array([5.], dtype=float32)
    """

    function: Callable[..., Sequence[float]]

    def __call__(self, rollout: Rollout, prompts: data.Prompts, responses: list[str]) -> TaskScores:
        """Score responses with the function; see `RewardFn`.

        Args:
          rollout: not read.
          prompts: the `B` prompts.
          responses: the `B` responses as texts.

        Returns:
          A score for each response.

        Raises:
          RewardError: if the function raises an exception, or does not return `B` finite numbers.
        """
        try:
            # A copy, because the function may change the rows.
            rows = copy.deepcopy(prompts.rows)
            arguments = [rows] if _takes_rows(self.function, rows) else []
            columns = _columns(self.function, rows, 2 + len(arguments))
            scores = self.function(prompts.texts, list(responses), *arguments, **columns)
            if inspect.iscoroutine(scores):
                scores = asyncio.run(scores)
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # SystemExit and CancelledError are no Exceptions.
            raise as_reward_error(error) from error
        return TaskScores(check_scores(scores, (len(responses),)))


def _parameters(function: Callable) -> list[inspect.Parameter]:
    try:
        return list(inspect.signature(function).parameters.values())
    except ValueError:  # Some functions written in C have no signature.
        return []


def _takes_rows(function: Callable, rows: list[dict[str, Any]]) -> bool:
    """Return whether a third parameter is called `rows`, or is required and names no column."""
    return any(
        p.kind <= p.POSITIONAL_OR_KEYWORD
        and (p.name == "rows" or (p.default is p.empty and not any(p.name in r for r in rows)))
        for p in _parameters(function)[2:3]
    )


def _columns(function: Callable, rows: list[dict[str, Any]], first: int) -> dict[str, list[Any]]:
    """Return the columns that the parameters from number `first` on ask for by name.

    A row that lacks a column has None in it.
    """
    parameters = _parameters(function)
    names = {
        p.name for p in parameters[first:] if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
    }
    if any(p.kind == p.VAR_KEYWORD for p in parameters):
        names |= {name for row in rows for name in row} - {p.name for p in parameters[:first]}
    found = {name for row in rows for name in row}
    return {name: [row.get(name) for row in rows] for name in sorted(names & found)}
