"""Study 2: the KL penalty in the reward and in the loss.

The penalty k1 can be a part of the reward, and k2 or k3 can be terms of the loss. On-policy, the
first two have the gradient of the KL divergence from the reference, KL(π ‖ π_ref). The gradient of
k3 in the loss is that of KL(π_ref ‖ π); `gradients.py` checks this. The learning curves show where
training ends up, with the new model as the reference.
"""

import dataclasses
from collections.abc import Callable
from functools import partial

import jax

from experiments.ablations.training import LossMaker, Variant
from ppo_jax import (
    Counts,
    Experience,
    LossFn,
    LossMetrics,
    Params,
    PPOConfig,
    Rollout,
    Scores,
    clipped_ppo,
    dr_grpo_advantages,
    forward_responses,
    kl_k3,
    kl_loss,
    masked_sum,
    no_critic,
    ppo_loss_fn,
)

BETA = 0.02


def above_group(
    rewards: jax.Array, values: jax.Array, mask: jax.Array, *, rollout: Rollout, scores: Scores
) -> tuple[jax.Array, jax.Array]:
    """Compare the rewards of an answer, with their penalty, with those of the same rule."""
    return dr_grpo_advantages(rewards, mask, rollout.tokens[:, 0])


def k2_term(logprobs: jax.Array, ref_logprobs: jax.Array, mask: jax.Array) -> jax.Array:
    """Sum k2, whose gradient in a loss is that of the KL divergence."""
    return kl_loss(logprobs, ref_logprobs, mask, aggregate=masked_sum)


def k3_term(logprobs: jax.Array, ref_logprobs: jax.Array, mask: jax.Array) -> jax.Array:
    """Sum k3 itself."""
    return masked_sum(kl_k3(logprobs, ref_logprobs), mask)


def with_kl(config: PPOConfig, term: Callable[..., jax.Array], maker: LossMaker) -> LossFn:
    """Make the loss of the settings plus a mean over tokens of a KL term."""
    own = ppo_loss_fn(maker.model, no_critic, *clipped_ppo(config), temperature=config.temperature)

    def loss_fn(params: Params, batch: Experience, counts: Counts) -> tuple[jax.Array, LossMetrics]:
        loss, metrics = own(params, batch, counts)
        policy, reference = (
            forward_responses(
                maker.model,
                no_critic,
                {"policy": policy, "critic": None},
                batch.tokens,
                batch.mask,
                batch.tokens.shape[1] - batch.response_mask.shape[1],
                temperature=config.temperature,
            ).logprobs
            for policy in (params["policy"], maker.reference)
        )
        penalty = term(policy, reference, batch.response_mask) / counts.tokens
        return loss + BETA * penalty, metrics

    return loss_fn


def variants(base: PPOConfig) -> dict[str, Variant]:
    """Return k1 in the reward, k2 in the loss and k3 in the loss, with one step per update."""
    config = dataclasses.replace(base, minibatches=1, vf_coef=0.0, whiten_advantages=False)
    with_penalty = dataclasses.replace(config, kl_coef=BETA)
    make = partial(Variant, advantage_fn=above_group, has_critic=False)
    return {
        "k1_reward": make(with_penalty),
        "k2_loss": make(config, loss_fn=partial(with_kl, config, k2_term)),
        "k3_loss": make(config, loss_fn=partial(with_kl, config, k3_term)),
    }
