"""The task of the studies: answers that follow the rule of their prompt, scored at their end.

A prompt is one token that names one of two rules. The rule picks four of the eight tokens of the
vocabulary, and the score of an answer is the share of its tokens that are among them. A new model
scores about 0.5, and the best possible score is 1. The environment ends each answer after a
number of tokens that the model does not know, as a tool or a user would. Nothing of the answer is
rewarded before its end, so each token of a long answer has little influence on the score.
"""

import dataclasses

import jax
import jax.numpy as jnp

from ppo_jax import Rollout, TransformerConfig

RULES, VOCABULARY = 2, 8


@dataclasses.dataclass(frozen=True)
class Task:
    """Answers with a length drawn from `shortest .. longest`."""

    shortest: int
    longest: int

    def model_config(self) -> TransformerConfig:
        """Return a transformer with one layer, for a prompt of one token and an answer."""
        return TransformerConfig(
            vocab_size=VOCABULARY,
            positions=self.longest + 1,
            width=32,
            layers=1,
            heads=1,
            mlp_width=64,
            init_std=0.15,
        )


def prompts(rows: int) -> jax.Array:
    """Return `[rows, 1]` prompts, in which the rules take turns."""
    return (jnp.arange(rows) % RULES)[:, None]


def end_answers(key: jax.Array, rollout: Rollout, task: Task) -> Rollout:
    """End each answer after a number of tokens that is drawn uniformly."""
    lengths = jax.random.randint(key, rollout.ended.shape, task.shortest, task.longest + 1)
    kept = jnp.arange(task.longest)[None, :] < lengths[:, None]
    return rollout.replace(
        mask=jnp.concatenate([rollout.mask[:, : rollout.prompt_length], kept], axis=1),
        response_mask=kept,
        logprobs=jnp.where(kept, rollout.logprobs, 0),
    )


def share_of_rule(rollout: Rollout) -> jax.Array:
    """Return the share of the tokens of each answer that follow the rule, `[B]` float32."""
    follows = rollout.responses % RULES == rollout.tokens[:, :1]
    kept = rollout.response_mask
    return jnp.where(kept, follows, False).sum(axis=1) / kept.sum(axis=1)
