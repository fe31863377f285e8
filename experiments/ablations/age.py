"""Study 3: learning from answers of an older policy, under five corrections.

The policy of an update learns from the answers that the policy sampled 0, 1, 4 or 16 updates ago.
`clip` is PPO with the ratio to the policy that sampled. `dis` and `dppo` use the same ratio, but
drop tokens whose ratio or probability has moved too far. `tis` and `decoupled` clip the ratio to
the policy before the update, and weigh each token by the ratio of that policy to the one that
sampled; `tis` truncates these weights at 2.
"""

import dataclasses
from collections.abc import Callable
from functools import partial

import jax

from experiments.ablations.training import LossMaker, Variant
from ppo_jax import (
    AdvantageFn,
    ClipFn,
    LossFn,
    PPOConfig,
    Rollout,
    Scores,
    dis_clip,
    dis_loss,
    dppo_clip,
    dppo_loss,
    importance_weights,
    no_critic,
    ppo_loss_fn,
    reinforce_plus_plus_advantages,
    truncated_weights,
    with_policy_loss,
)

AGES = (0, 1, 4, 16)


def above_group(
    weights_fn: Callable[..., jax.Array] | None = None,
) -> AdvantageFn:
    """Compare answers with those to the same rule, whiten, and weigh tokens if asked to."""

    def estimate(
        rewards: jax.Array,
        values: jax.Array,
        mask: jax.Array,
        *,
        rollout: Rollout,
        scores: Scores,
    ) -> tuple[jax.Array, jax.Array]:
        advantages, returns = reinforce_plus_plus_advantages(rewards, mask, rollout.tokens[:, 0])
        if weights_fn is not None:
            advantages = advantages * weights_fn(scores.logprobs, rollout.logprobs, mask)
        return advantages, returns

    return estimate


def with_loss(
    config: PPOConfig, policy_loss: Callable[..., jax.Array], clip: ClipFn, maker: LossMaker
) -> LossFn:
    """Make the loss of the settings with another loss of the policy."""
    return ppo_loss_fn(
        maker.model,
        no_critic,
        *with_policy_loss(config, policy_loss, clip),
        temperature=config.temperature,
    )


def variants(base: PPOConfig) -> dict[str, Variant]:
    """Return the five corrections, each with all ages."""
    config = dataclasses.replace(base, vf_coef=0.0, whiten_advantages=False)
    make = partial(Variant, config, has_critic=False, ages=AGES)
    sampled = partial(make, above_group(), from_sampler=True)
    # A ratio may lie in 0.5 .. 5, and a probability may move by 0.15. Neither was tuned.
    ratios = {"clip_low": 0.5, "clip_high": 4.0}
    changes = {"clip_low": 0.15, "clip_high": 0.15}
    dis = partial(with_loss, config, partial(dis_loss, **ratios), partial(dis_clip, **ratios))
    dppo = partial(with_loss, config, partial(dppo_loss, **changes), partial(dppo_clip, **changes))
    return {
        "clip": sampled(),
        "dis": sampled(loss_fn=dis),
        "dppo": sampled(loss_fn=dppo),
        "tis": make(above_group(partial(truncated_weights, high=2.0))),
        "decoupled": make(above_group(importance_weights)),
    }
