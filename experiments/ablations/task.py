"""The task of the studies: answers whose tokens follow a rule, scored at their end.

The vocabulary of eight tokens has two halves. A token follows the rule if it is not in the half of
the token before it, and the score of an answer is the share of its tokens that follow the rule. A
new model scores about 0.5, and the best possible score is 1. The prompt is the first token of
either half. The environment ends each answer after a number of tokens that the model does not know,
as a tool or a user would. Nothing is rewarded before the end, so each token of a long answer has
little influence on the score.
"""

import dataclasses

import jax
import jax.numpy as jnp

from ppo_jax import Rollout, TransformerConfig

PROMPTS, VOCABULARY = 2, 8


@dataclasses.dataclass(frozen=True)
class Task:
    """Answers with one of these lengths, in tokens, which are equally likely."""

    lengths: tuple[int, ...]

    @property
    def longest(self) -> int:
        """The length of the longest answers."""
        return max(self.lengths)

    def model_config(self) -> TransformerConfig:
        """Return a transformer with one layer, for a prompt of one token and an answer."""
        return TransformerConfig(
            vocab_size=VOCABULARY,
            positions=self.longest + 1,
            width=32,
            layers=1,
            heads=1,
            mlp_width=64,
            tied=False,
            init_std=0.15,
        )


def half(tokens: jax.Array) -> jax.Array:
    """Return the half of the vocabulary that each token is in, 0 or 1."""
    return tokens * PROMPTS // VOCABULARY


def prompts(rows: int) -> jax.Array:
    """Return `[rows, 1]` prompts, which are the first tokens of both halves in turn."""
    return (jnp.arange(rows) % PROMPTS * (VOCABULARY // PROMPTS))[:, None]


def end_answers(key: jax.Array, rollout: Rollout, task: Task) -> Rollout:
    """End each answer after a number of tokens that is drawn at random."""
    lengths = jax.random.choice(key, jnp.array(task.lengths), rollout.ended.shape)
    kept = jnp.arange(task.longest)[None, :] < lengths[:, None]
    return rollout.replace(
        mask=jnp.concatenate([rollout.mask[:, : rollout.prompt_length], kept], axis=1),
        response_mask=kept,
        logprobs=jnp.where(kept, rollout.logprobs, 0),
    )


def share_of_rule(rollout: Rollout) -> jax.Array:
    """Return the share of the tokens of each answer that follow the rule, `[B]` float32."""
    follows = half(rollout.tokens[:, 1:]) != half(rollout.tokens[:, :-1])
    kept = rollout.response_mask
    return jnp.where(kept, follows, False).sum(axis=1) / kept.sum(axis=1)
