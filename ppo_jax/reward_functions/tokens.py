"""Rewards on arrays, under jit."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np
from jax import Array

from ppo_jax import data
from ppo_jax.errors import RewardError
from ppo_jax.reward_functions.protocol import TaskScores, _raised, check_scores
from ppo_jax.types import Rollout


class TokenReward(NamedTuple):
    """A jittable `function(tokens [B, T], mask [B, T], response_mask [B, R])`: scores `[B]`, or scores of tokens `[B, R]`, or
    both as a pair."""

    function: Callable[[Array, Array, Array], Array | tuple[Array, Array]]

    def __call__(self, rollout: Rollout, prompts: data.Prompts, responses: list[str]) -> TaskScores:
        try:
            scores = jax.jit(self.function)(rollout.tokens, rollout.mask, rollout.response_mask)
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            raise _raised(error) from error
        rows, columns = rollout.response_mask.shape
        if isinstance(scores, tuple):
            if len(scores) != 2:
                raise RewardError(
                    f"The reward function returned {len(scores)} arrays, not one or two."
                )
            return TaskScores(
                check_scores(scores[0], (rows,)), check_scores(scores[1], (rows, columns))
            )
        if np.ndim(scores) == 2:
            return TaskScores(np.zeros(rows, np.float32), check_scores(scores, (rows, columns)))
        return TaskScores(check_scores(scores, (rows,)))
