"""The reward that wraps a user's function of texts."""

import copy
import inspect
from collections.abc import Callable, Sequence
from typing import NamedTuple

from ppo_jax import data
from ppo_jax.reward_functions.protocol import TaskScores, as_reward_error, check_scores
from ppo_jax.types import Rollout


class TextReward(NamedTuple):
    """A reward that calls a function of prompts and responses as texts.

    Attributes:
      function: `function(prompts, responses)` with two lists of `B` texts, or
        `function(prompts, responses, rows)` with the prompts' rows, if it has a third parameter
        that must be given or is called `rows`. It returns `B` numbers.

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
        takes_rows = _takes_rows(self.function)
        try:
            # A copy, because the function may change the rows.
            rows = [copy.deepcopy(prompts.rows)] if takes_rows else []
            scores = self.function(prompts.texts, list(responses), *rows)
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # SystemExit and CancelledError are no Exceptions.
            raise as_reward_error(error) from error
        return TaskScores(check_scores(scores, (len(responses),)))


def _takes_rows(function: Callable) -> bool:
    """Return whether a third parameter is required or is called `rows`."""
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except ValueError:  # Some functions written in C have no signature.
        return False
    return any(
        p.kind <= p.POSITIONAL_OR_KEYWORD and (p.default is p.empty or p.name == "rows")
        for p in parameters[2:3]
    )
