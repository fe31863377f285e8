"""The loss of a language model and its critic as a function of their parameters."""

from collections.abc import Callable
from functools import partial

import chex
from jax import Array

from ppo_jax.ops.masked import BY_TOKEN, Aggregation
from ppo_jax.ppo.forward import forward_fn
from ppo_jax.ppo.packing import Bins
from ppo_jax.ppo.state import Agent
from ppo_jax.types import (
    Counts,
    CriticFn,
    Experience,
    LanguageModel,
    LossFn,
    LossMetrics,
    Params,
    ResponseLossFn,
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
) -> LossFn:
    """Turn a loss of log-probs, values and entropies into a loss of parameters.

    Args:
      model: functions of the policy.
      critic: function of the critic.
      loss: the loss with its hyper-parameters bound, such as
        `functools.partial(losses.ppo_loss, clip_low=0.2, clip_high=0.2, value_clip=0.2,
        vf_coef=0.1)`.
      metrics: metrics of how far the policy has moved, called with the log-probs `[B, R]` of the
        policy now and at the rollout, their mask and `count`; such as
        `functools.partial(policy_metrics, clip_low=0.2, clip_high=0.2)`.
      temperature: sampling temperature; positive.
      aggregation: mean over tokens that the loss uses, `BY_TOKEN` or `BY_SEQUENCE`.
      chunk: number of response positions whose logits are in memory at a time; `None` for all.
      bins: the shape of the bins that rows are packed into, the same as in `ppo_update`; `None` for
        no packing.

    Returns:
      A `LossFn`, for `ppo_update` or `learn`. It raises AssertionError if the loss is not a scalar.

    Source:
      Schulman et al. 2017 (https://arxiv.org/abs/1707.06347), equation 9, for `losses.ppo_loss`.

    Example:
      >>> from ppo_jax import *
      >>> from ppo_jax.ppo.methods import Loss
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
        total, terms = loss(
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
        chex.assert_shape(total, ())
        moved = metrics(out.logprobs, batch.logprobs, batch.response_mask, count=counts.tokens)
        return total, LossMetrics({"loss/total": total, **terms, **moved.mean}, moved.max)

    return loss_fn


def agent_loss_fn(agent: Agent) -> LossFn:
    """Make the loss that the settings of an agent name."""
    config = agent.config
    return ppo_loss_fn(
        agent.model,
        agent.critic,
        *config.loss.function(config),
        temperature=config.temperature,
        aggregation=config.weighting.function,
        chunk=config.logit_chunk,
        bins=config.bins,
    )
