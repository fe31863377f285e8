"""The loss of a language model and its critic as a function of their parameters."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import chex
from jax import Array

from ppo_jax.ops.losses import PolicyLossFn, ResponseLossFn
from ppo_jax.ops.masked import BY_TOKEN, Aggregation
from ppo_jax.ops.metrics import value_errors
from ppo_jax.ppo.critic import no_critic
from ppo_jax.ppo.forward import forward_fn
from ppo_jax.ppo.loss_terms import LossTerm, loss_terms
from ppo_jax.ppo.methods import with_policy_loss
from ppo_jax.ppo.own_functions import takes_experience
from ppo_jax.ppo.packing import Bins
from ppo_jax.ppo.state import Agent
from ppo_jax.ppo.unread import held_values, hold
from ppo_jax.types import (
    Aggregate,
    Counts,
    CriticFn,
    Experience,
    LanguageModel,
    LossFn,
    LossMetrics,
    Metrics,
    Params,
)


def ppo_loss_fn(
    model: LanguageModel,
    critic: CriticFn,
    loss: ResponseLossFn,
    metrics: Callable[..., LossMetrics],
    *,
    temperature: float,
    aggregation: Aggregation = BY_TOKEN,
    chunk: int | None = None,
    bins: Bins | None = None,
    terms: Sequence[LossTerm] = (),
) -> LossFn:
    """Turn a loss of log-probs, values and entropies into a loss of parameters.

    Args:
      model: functions of the policy.
      critic: function of the critic.
      loss: the loss with its hyper-parameters bound, such as
        `functools.partial(losses.ppo_loss, clip_low=0.2, clip_high=0.2, value_clip=0.2,
        vf_coef=0.1)`.
      metrics: metrics of how far the policy has moved, called with the log-probs `[B, R]` of the
        policy now and at the rollout, their mask, and the keywords `advantages` and `count`; such
        as `policy_metrics`, with its `clip` bound for a loss that clips.
      temperature: sampling temperature; positive.
      aggregation: mean over tokens that the loss uses, `BY_TOKEN` or `BY_SEQUENCE`.
      chunk: number of response positions whose logits are in memory at a time; `None` for all.
      bins: the shape of the bins that rows are packed into, the same as in `ppo_update`; `None` for
        no packing.
      terms: further terms, which are added to the loss.

    Returns:
      A `LossFn`, for `ppo_update` or `learn`. It raises AssertionError if the loss is not a scalar.

    Source:
      Schulman et al. 2017 (https://arxiv.org/abs/1707.06347), equation 9, for `losses.ppo_loss`.

    Example:
      >>> from ppo_jax import *
      >>> config = TransformerConfig(
      ...     vocab_size=7, positions=8, width=4, layers=1, heads=2, mlp_width=16)
      >>> model, critic = language_model(config), shared_critic()
      >>> loss, metrics = Loss.PPO.function(PPOConfig(clip_high=0.3))
      >>> loss_fn = ppo_loss_fn(model, critic, loss, metrics, temperature=1.0)
    """
    forward = forward_fn(bins)

    def loss_fn(params: Params, batch: Experience, counts: Counts) -> tuple[Array, LossMetrics]:
        prompt_length = batch.tokens.shape[1] - batch.response_mask.shape[1]
        out = forward(
            model,
            critic,
            params,
            batch.tokens,
            batch.mask,
            prompt_length,
            temperature=temperature,
            chunk=chunk,
        )
        total, named = loss(
            out.logprobs,
            out.values,
            out.entropies,
            old_logprobs=batch.logprobs,
            old_values=batch.values,
            advantages=batch.advantages,
            returns=batch.returns,
            mask=batch.response_mask,
            value_mask=batch.value_mask,
            aggregate=partial(aggregation.mean, count=counts.policy),
            value_aggregate=partial(aggregation.mean, count=counts.value),
        )
        for term in terms:
            value, found = term(out.logprobs, batch, counts)
            total, named = total + value, named | found
        chex.assert_shape(total, ())
        moved = metrics(
            out.logprobs,
            batch.logprobs,
            batch.response_mask,
            advantages=batch.advantages,
            count=counts.tokens,
        )
        if critic is not no_critic:
            errors = value_errors(out.values, batch.returns, batch.value_mask, count=counts.steps)
            named = {**named, **errors}
        return total, LossMetrics({"loss/total": total, **named, **moved.mean}, moved.max)

    return hold(loss_fn, held_values(loss, terms))


def agent_loss_fn(
    agent: Agent,
    *,
    policy_loss: PolicyLossFn | None = None,
    entropy_coef: Array | None = None,
) -> LossFn:
    """Make the loss that the settings of an agent name.

    Args:
      agent: model, critic and settings.
      policy_loss: loss of the policy to use instead of the one that the settings name. If it has a
        keyword-only parameter `experience`, it gets the `Experience` of the micro-batch as well.
      entropy_coef: `[]` float32, weight of the entropy to use instead of that of the settings.

    Returns:
      The loss of the policy with the entropy and the terms of the settings, and with the value
      loss unless there is no critic.
    """
    config = agent.config
    # A weight that adapts is the argument `entropy_coef`.
    held = vars(config) | {"entropy_target": None}
    if policy_loss is not None and takes_experience(policy_loss):
        make = partial(agent_loss_fn, agent, entropy_coef=entropy_coef)
        return hold(_with_experience(make, policy_loss), held)
    if agent.critic is no_critic:
        config = replace(config, vf_coef=0.0)
    own, metrics = (
        config.loss.function(config)
        if policy_loss is None
        else with_policy_loss(config, policy_loss)
    )
    loss: Callable[..., tuple[Array, Metrics]] = own
    loss_fn = ppo_loss_fn(
        agent.model,
        agent.critic,
        loss if entropy_coef is None else partial(loss, entropy_coef=entropy_coef),
        metrics,
        temperature=config.temperature,
        aggregation=config.weighting.function,
        chunk=config.logit_chunk,
        bins=config.bins,
        terms=loss_terms(config),
    )
    return hold(loss_fn, held)


def _with_experience(make: Callable[..., LossFn], policy_loss: Callable[..., Array]) -> LossFn:
    """Make a loss whose loss of the policy gets the micro-batch as `experience`."""

    def loss_fn(params: Params, batch: Experience, counts: Counts) -> tuple[Array, LossMetrics]:
        alone: PolicyLossFn = partial(_without_keyword, policy_loss, batch)
        return make(policy_loss=alone)(params, batch, counts)

    return loss_fn


def _without_keyword(
    policy_loss: Callable[..., Array], experience: Experience, *arrays: Array, aggregate: Aggregate
) -> Array:
    return policy_loss(*arrays, experience=experience, aggregate=aggregate)
