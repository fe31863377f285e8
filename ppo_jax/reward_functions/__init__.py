"""The callables that score responses in the training loop.

Every reward is a `RewardFn`: a callable that gets the rollout, the prompts and the responses as
texts, and returns `TaskScores`. `TextReward` and `TokenReward` wrap a user's function of texts or
of arrays, `TimedReward` limits the time that a function of texts takes for a response,
`ModelReward` scores with a reward model, `WeightedReward` adds up several rewards, and
`LikenessReward` is a function for `TextReward`.

To add a kind of reward, write one new file in this package with a class that is a `RewardFn`, and
change one line: in `loading.load_reward`, to make it available on the command line, or in the
imports below, to make it available from Python.

Other modules about rewards: `ops.rewards` turns the scores into a reward for each token,
`ppo.reward_model` holds the losses that train a reward model, `models.heads` defines the scalar
head of a reward model, and `models.io.scorers` reads and writes the files of reward models.
"""

from ppo_jax.errors import RewardError
from ppo_jax.reward_functions.likeness import LikenessReward
from ppo_jax.reward_functions.loading import load_function, load_reward, load_rewards
from ppo_jax.reward_functions.model import ModelReward
from ppo_jax.reward_functions.protocol import RewardFn, TaskScores, check_scores, require_scores
from ppo_jax.reward_functions.text import TextReward
from ppo_jax.reward_functions.timed import TimedReward
from ppo_jax.reward_functions.tokens import TokenReward
from ppo_jax.reward_functions.weighted import WeightedReward

__all__ = (
    "LikenessReward",
    "ModelReward",
    "RewardError",
    "RewardFn",
    "TaskScores",
    "TextReward",
    "TimedReward",
    "TokenReward",
    "WeightedReward",
    "check_scores",
    "load_function",
    "load_reward",
    "load_rewards",
    "require_scores",
)
