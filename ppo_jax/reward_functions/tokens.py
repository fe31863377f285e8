"""The reward that wraps a user's function of token arrays, compiled with `jax.jit`."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np
from jax import Array

from ppo_jax import data
from ppo_jax.errors import RewardError
from ppo_jax.reward_functions.protocol import TaskScores, as_reward_error, check_scores
from ppo_jax.types import Rollout


class TokenReward(NamedTuple):
    """A reward that calls a jittable function of token arrays.

    Attributes:
      function: `function(tokens [B, T], mask [B, T], response_mask [B, R])`, as in `Rollout`. It
        returns scores of the responses `[B]`, scores of the tokens `[B, R]`, or a pair of both.

    Example:
      >>> reward = TokenReward(lambda tokens, mask, response_mask: response_mask.sum(axis=1))
      >>> response_mask = np.array([[True, True, False]])
      >>> mask = np.array([[True, True, True, False]])
      >>> tokens, logprobs = np.array([[4, 5, 6, 0]]), np.zeros((1, 3))
      >>> rollout = Rollout(tokens, mask, response_mask, logprobs, ended=np.array([True]))
      >>> prompts = data.Prompts([{"prompt": "2 + 2 ="}], np.array([[4]]), np.array([[True]]))
      >>> reward(rollout, prompts, [" four"]).response
      array([2.], dtype=float32)
    """

    function: Callable[[Array, Array, Array], Array | tuple[Array, Array]]

    def __call__(self, rollout: Rollout, prompts: data.Prompts, responses: list[str]) -> TaskScores:
        """Score responses with the function; see `RewardFn`.

        Args:
          rollout: the `B` responses as arrays.
          prompts: not read.
          responses: not read.

        Returns:
          A score for each response, for each token, or for both.

        Raises:
          RewardError: if the function raises an exception, or returns scores that are not finite or
            have another shape.
        """
        try:
            scores = jax.jit(self.function)(rollout.tokens, rollout.mask, rollout.response_mask)
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            raise as_reward_error(error) from error
        shape = rollout.response_mask.shape
        if isinstance(scores, tuple):
            if len(scores) != 2:
                raise RewardError(
                    f"The reward function returned {len(scores)} arrays; it must return one or two."
                )
            return TaskScores(check_scores(scores[0], shape[:1]), check_scores(scores[1], shape))
        if np.ndim(scores) == 2:
            return TaskScores(np.zeros(shape[:1], np.float32), check_scores(scores, shape))
        return TaskScores(check_scores(scores, shape[:1]))
