"""Rewards on texts."""

import copy
import inspect
from collections.abc import Callable, Sequence
from typing import NamedTuple

from ppo_jax import data
from ppo_jax.reward_functions.protocol import TaskScores, _raised, check_scores
from ppo_jax.types import Rollout


class TextReward(NamedTuple):
    """`function(prompts, responses)` on lists of texts, or `function(prompts, responses, rows)` with the prompts' columns."""

    function: Callable[..., Sequence[float]]

    def __call__(self, rollout: Rollout, prompts: data.Prompts, responses: list[str]) -> TaskScores:
        takes_rows = _takes_rows(self.function)
        try:
            rows = (
                [copy.deepcopy(prompts.rows)] if takes_rows else []
            )  # its own, which it may change
            scores = self.function(prompts.texts, list(responses), *rows)
        except KeyboardInterrupt:
            raise
        except (
            BaseException
        ) as error:  # `exit()` and a cancelled task are not of the kind Exception
            raise _raised(error) from error
        return TaskScores(check_scores(scores, (len(responses),)))


def _takes_rows(function: Callable) -> bool:
    """Whether it has a third parameter that must be given, or one called `rows`."""
    places = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    try:
        given = [p for p in inspect.signature(function).parameters.values() if p.kind in places]
    except ValueError:  # some functions written in C do not say what they take
        return False
    return len(given) > 2 and (
        given[2].default is inspect.Parameter.empty or given[2].name == "rows"
    )
