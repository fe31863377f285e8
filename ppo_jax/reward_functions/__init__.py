"""Rewards that the train loop accepts: functions of texts or of token arrays, and reward models."""

from ppo_jax.errors import RewardError
from ppo_jax.reward_functions.loading import load_reward
from ppo_jax.reward_functions.model import ModelReward
from ppo_jax.reward_functions.protocol import RewardFn, TaskScores, check_scores
from ppo_jax.reward_functions.text import TextReward
from ppo_jax.reward_functions.tokens import TokenReward

__all__ = (
    "ModelReward",
    "RewardError",
    "RewardFn",
    "TaskScores",
    "TextReward",
    "TokenReward",
    "check_scores",
    "load_reward",
)
