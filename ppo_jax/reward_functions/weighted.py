"""The reward that adds up several rewards."""

from typing import NamedTuple

import numpy as np

from ppo_jax import data
from ppo_jax.errors import RewardError
from ppo_jax.reward_functions.protocol import RewardFn, TaskScores, add_parts
from ppo_jax.types import Rollout


class WeightedReward(NamedTuple):
    """A weighted sum of rewards, each of which is a named part of the scores.

    A reward that has no score for a response adds nothing to it. A response that no reward with a
    weight other than 0 could score has no score.

    Attributes:
      rewards: pairs of a name and a reward.
      weights: the weight of each reward. A reward with the weight 0 is only logged.

    Example:
      >>> from ppo_jax import TextReward
      >>> brevity = TextReward(lambda prompts, responses: [-len(text) for text in responses])
      >>> correct = TextReward(lambda prompts, responses: [text == " 4" for text in responses])
      >>> prompts = data.Prompts([{"prompt": "2 + 2 ="}], np.array([[7]]), np.array([[True]]))
      >>> reward = WeightedReward((("brevity", brevity), ("correct", correct)), (0.25, 1.0))
      >>> scores = reward(None, prompts, [" 4"])
      >>> scores.response, scores.parts["correct"]
      (array([0.5], dtype=float32), array([1.], dtype=float32))
    """

    rewards: tuple[tuple[str, RewardFn], ...]
    weights: tuple[float, ...]

    def __call__(self, rollout: Rollout, prompts: data.Prompts, responses: list[str]) -> TaskScores:
        """Score responses with all rewards; see `RewardFn`.

        Args:
          rollout: the `B` responses as arrays.
          prompts: the `B` prompts.
          responses: the `B` responses as texts.

        Returns:
          The weighted sums, and the scores of each reward by its name. The part `x` of a reward `a`
          has the name `a/x`.

        Raises:
          RewardError: if a reward fails.
        """
        weights = {name: w for (name, _), w in zip(self.rewards, self.weights, strict=True)}
        counted, tokens = {}, None
        parts: dict[str, np.ndarray] = {}
        for name, reward in self.rewards:
            try:
                scores = reward(rollout, prompts, responses)
            except RewardError as error:
                raise error.with_rows(error.rows, f"The reward {name}: {error}") from error
            parts[name] = scores.response
            if scores.tokens is not None:  # They are added up in the part as well.
                parts[name] = scores.total(rollout.response_mask)
            parts |= {f"{name}/{part}": x for part, x in (scores.parts or {}).items()}
            if weights[name]:
                counted[name] = scores.response
                if scores.tokens is not None:
                    weighted = weights[name] * scores.tokens
                    tokens = weighted if tokens is None else tokens + weighted
        weights = {name: weights[name] for name in counted}
        return TaskScores(add_parts(counted, weights), tokens, parts)
