"""Study 2: the KL penalty in the reward and in the loss, its gradients and learning curves.

The penalty k1 can be a part of the reward, and k2 or k3 can be terms of the loss. On-policy, the
first two have the gradient of the KL divergence from the reference, KL(π ‖ π_ref). The gradient of
k3 in the loss is that of KL(π_ref ‖ π). `gradients` computes all of these exactly, by enumerating
the answers of a small model in float64. The learning curves show where training ends up.

The reference is the new model, which follows the rule with a probability of about 1/4. Where it is
exactly 1/4, the probability p at which training ends is known: the penalty of all tokens of an
answer of R tokens is subtracted from its score with the weight β, so

    k1, k2:  log(p / (1 - p)) = log(1/3) + 1 / (R β)
    k3:      3/4 / (1 - p) - 1/4 / p = 1 / (R β)
"""

import dataclasses
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp

from experiments.ablations.task import RULES, Task
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
    kl_k1,
    kl_k2,
    kl_k3,
    kl_loss,
    masked_sum,
    ppo_loss_fn,
)
from ppo_jax.ppo.critic import no_critic

BETA, LEARNING_RATE = 0.01, 3e-3
ANSWERS = 3  # Each of the small model has this many tokens.
TOKENS = 4  # The size of its vocabulary.


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


def variants(task: Task, rows: int) -> dict[str, Variant]:
    """Return k1 in the reward, k2 in the loss and k3 in the loss."""
    config = PPOConfig(
        batch_size=rows,
        epochs=1,
        minibatches=1,
        max_new_tokens=task.longest,
        vf_coef=0.0,
        kl_coef=0.0,
        whiten_advantages=False,
        learning_rate=LEARNING_RATE,
    )
    with_penalty = dataclasses.replace(config, kl_coef=BETA)
    make = partial(Variant, advantage_fn=above_group, has_critic=False)
    return {
        "k1_reward": make(with_penalty),
        "k2_loss": make(config, loss_fn=partial(with_kl, config, k2_term)),
        "k3_loss": make(config, loss_fn=partial(with_kl, config, k3_term)),
    }


def best_probability(task: Task) -> dict[str, float]:
    """Return the probability of following the rule at which training ends, for each variant."""
    p = jnp.linspace(1e-4, 1 - 1e-4, 100_000)
    prior, strength = 1 / RULES, 1 / (task.longest * BETA)
    reverse = jnp.log(p / (1 - p)) - jnp.log(prior / (1 - prior)) - strength
    forward = (1 - prior) / (1 - p) - prior / p - strength
    reverse, forward = (float(p[jnp.abs(x).argmin()]) for x in (reverse, forward))
    return {"k1_reward": reverse, "k2_loss": reverse, "k3_loss": forward}


def gradients(seed: int) -> dict[str, float]:
    """Return how far the expected gradient of each penalty is from that of the KL divergence.

    The model is a table of logits by the token before, and the expectation is a sum over all its
    answers, so nothing is random but the tables.

    Args:
      seed: seed of the tables of policy and reference.

    Returns:
      For each penalty the relative error of the gradient, `|g - g_KL| / |g_KL|`.
    """
    with jax.enable_x64(True):
        tables = jax.random.normal(jax.random.key(seed), (2, TOKENS, TOKENS), jnp.float64)
        answers = jnp.stack(jnp.indices((TOKENS,) * ANSWERS), -1).reshape(-1, ANSWERS)
        before = jnp.pad(answers[:, :-1], ((0, 0), (1, 0)))
        mask, reference = jnp.ones(answers.shape, bool), jax.nn.log_softmax(tables[1])
        ref_logprobs = reference[before, answers]

        def gradient(term: Callable[[jax.Array, jax.Array, jax.Array], jax.Array]) -> jax.Array:
            def expected(table: jax.Array) -> jax.Array:
                logprobs = jax.nn.log_softmax(table)[before, answers]
                return term(logprobs, jnp.exp(logprobs.sum(axis=1)), jax.nn.log_softmax(table))

            return jax.grad(expected)(tables[0])

        fixed = jax.lax.stop_gradient

        def in_loss(estimator: Callable[..., jax.Array]) -> jax.Array:
            return gradient(lambda x, p, _: (fixed(p)[:, None] * estimator(x, ref_logprobs)).sum())

        def of_tokens(x: jax.Array, p: jax.Array, table: jax.Array) -> jax.Array:
            kl = (jnp.exp(table) * (table - reference)).sum(axis=1)
            return (fixed(p)[:, None] * kl[before]).sum()

        def in_reward(x: jax.Array, p: jax.Array, _: jax.Array) -> jax.Array:
            penalty = fixed(kl_k1(x, ref_logprobs)).sum(axis=1, keepdims=True)
            return (fixed(p)[:, None] * penalty * x).sum()

        def k2_of_answers(x: jax.Array, p: jax.Array, _: jax.Array) -> jax.Array:
            return (fixed(p) * kl_k2(x.sum(axis=1), ref_logprobs.sum(axis=1))).sum()

        weighted = lambda x, p, _: kl_loss(
            x, ref_logprobs, mask, aggregate=lambda terms, mask: (fixed(p)[:, None] * terms).sum()
        )
        whole = gradient(lambda x, p, _: (p * (x - ref_logprobs).sum(axis=1)).sum())
        token = gradient(of_tokens)
        error = lambda found, exact: float(jnp.linalg.norm(found - exact) / jnp.linalg.norm(exact))
        return {
            "k1_reward of answers": error(gradient(in_reward), whole),
            "k2_loss of answers": error(gradient(k2_of_answers), whole),
            "k2_loss of tokens": error(in_loss(kl_k2), token),
            "kl_loss of tokens": error(gradient(weighted), token),
            "k3_loss of tokens": error(in_loss(kl_k3), token),
            "k1_loss of tokens": error(in_loss(kl_k1), token),
        }
