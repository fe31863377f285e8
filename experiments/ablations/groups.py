"""Study 4: PPO with a critic against three estimators without one.

All variants sample the same number of tokens in each update, and each is also compared at the time
that the fastest of them took. The answers to one rule are a group. PPO has a critic of the same
size as the policy, and a lambda of 1. GRPO and RLOO compare an answer with its group, and
REINFORCE++ with the whole batch.
"""

import dataclasses
from collections.abc import Callable
from functools import partial

import jax

from experiments.ablations.task import Task
from experiments.ablations.training import Variant
from ppo_jax import (
    AdvantageFn,
    PPOConfig,
    Rollout,
    Scores,
    grpo_advantages,
    reinforce_plus_plus_advantages,
    rloo_advantages,
)

LEARNING_RATE = 3e-3


def of_rules(estimator: Callable[..., tuple[jax.Array, jax.Array]]) -> AdvantageFn:
    """Make an estimator whose groups are the answers to one rule."""

    def estimate(
        rewards: jax.Array,
        values: jax.Array,
        mask: jax.Array,
        *,
        rollout: Rollout,
        scores: Scores,
    ) -> tuple[jax.Array, jax.Array]:
        return estimator(rewards, mask, rollout.tokens[:, 0])

    return estimate


def of_batch(
    rewards: jax.Array, values: jax.Array, mask: jax.Array, *, rollout: Rollout, scores: Scores
) -> tuple[jax.Array, jax.Array]:
    """Compare an answer with the whole batch."""
    return reinforce_plus_plus_advantages(rewards, mask)


def variants(task: Task, rows: int) -> dict[str, Variant]:
    """Return the four estimators."""
    config = PPOConfig(
        batch_size=rows,
        epochs=1,
        minibatches=4,
        max_new_tokens=task.longest,
        lam=1.0,
        vf_coef=0.5,
        value_clip=None,
        kl_coef=0.0,
        learning_rate=LEARNING_RATE,
    )
    alone = dataclasses.replace(config, vf_coef=0.0, whiten_advantages=False)
    make = partial(Variant, has_critic=False)
    # RLOO's advantages are in units of the score, which is a share; whitening gives all estimators
    # the same size of steps.
    whitened = dataclasses.replace(alone, whiten_advantages=True)
    return {
        "ppo": Variant(config),
        "grpo": make(alone, of_rules(grpo_advantages)),
        "rloo": make(whitened, of_rules(rloo_advantages)),
        "reinforce_pp": make(alone, of_batch),
    }
