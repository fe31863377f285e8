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


def variants(base: PPOConfig) -> dict[str, Variant]:
    """Return the four estimators, whose advantages all have a variance of about 1."""
    alone = dataclasses.replace(base, vf_coef=0.0)
    whitened = dataclasses.replace(alone, whiten_advantages=False)
    make = partial(Variant, has_critic=False)
    return {
        "ppo": Variant(dataclasses.replace(base, lam=1.0)),
        "grpo": make(whitened, of_rules(grpo_advantages)),
        "rloo": make(alone, of_rules(rloo_advantages)),
        "reinforce_pp": make(whitened, of_batch),
    }
