"""The PPO loss of a language model, as a function of its parameters."""

import jax

from ppo_jax.ops import losses
from ppo_jax.ops.masked import BY_TOKEN, Aggregation
from ppo_jax.ops.metrics import policy_metrics
from ppo_jax.ppo.scoring import forward_responses
from ppo_jax.types import Counts, CriticFn, Experience, LanguageModel, LossFn, LossMetrics, Params


def ppo_loss_fn(
    model: LanguageModel,
    critic: CriticFn,
    *,
    temperature: float,
    clip_low: float,
    clip_high: float,
    value_clip: float | None,
    vf_coef: float,
    entropy_coef: float = 0.0,
    dual_clip: float | None = None,
    aggregation: Aggregation = BY_TOKEN,
    chunk: int | None = None,
) -> LossFn:
    """The PPO loss of a language model, as a function of its parameters; keywords as in `losses.ppo_loss`."""

    def loss_fn(params: Params, batch: Experience, counts: Counts) -> tuple[jax.Array, LossMetrics]:
        prompt_length = batch.tokens.shape[1] - batch.response_mask.shape[1]
        out = forward_responses(
            model,
            critic,
            params,
            batch.tokens,
            batch.mask,
            prompt_length,
            temperature=temperature,
            chunk=chunk,
        )
        loss, terms = losses.ppo_loss(
            out.logprobs,
            out.values,
            out.entropies,
            old_logprobs=batch.logprobs,
            old_values=batch.values,
            advantages=batch.advantages,
            returns=batch.returns,
            mask=batch.response_mask,
            value_mask=batch.value_mask,
            clip_low=clip_low,
            clip_high=clip_high,
            value_clip=value_clip,
            vf_coef=vf_coef,
            entropy_coef=entropy_coef,
            dual_clip=dual_clip,
            aggregate=lambda x, mask: aggregation.mean(x, mask, count=counts.policy),
            value_aggregate=lambda x, mask: aggregation.mean(x, mask, count=counts.value),
        )
        moved = policy_metrics(
            out.logprobs,
            batch.logprobs,
            batch.response_mask,
            clip_low=clip_low,
            clip_high=clip_high,
            count=counts.tokens,
        )
        return loss, LossMetrics({"loss/total": loss, **terms, **moved.mean}, moved.max)

    return loss_fn
