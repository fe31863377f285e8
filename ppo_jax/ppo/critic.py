"""The loss of a critic with an optimizer of its own, and the values of a method without a critic.

`ppo_jax.models.heads` has the critics, and `critic_settings` their settings.
"""

from functools import partial

import jax.numpy as jnp
from jax import Array

from ppo_jax.ops.masked import BY_TOKEN, Aggregation
from ppo_jax.ops.value_losses import clipped_value_loss, value_clipfrac
from ppo_jax.ppo.forward import forward_fn
from ppo_jax.ppo.packing import Bins
from ppo_jax.types import (
    Counts,
    CriticFn,
    Experience,
    LanguageModel,
    LossFn,
    LossMetrics,
    Params,
    Segments,
)


def value_loss_fn(
    model: LanguageModel,
    critic: CriticFn,
    *,
    value_clip: float | None,
    aggregation: Aggregation = BY_TOKEN,
    bins: Bins | None = None,
) -> LossFn:
    """Make the value loss as a function of the parameters of a critic.

    Args:
      model: functions of the policy, on whose hidden states the critic may build.
      critic: function of the critic.
      value_clip: the `clip` of `clipped_value_loss`; `None` for the plain squared error.
      aggregation: the mean over steps that the loss uses.
      bins: the shape of the bins that rows are packed into; `None` for no packing.

    Returns:
      A `LossFn` for `ppo_update` with the metrics `loss/value` and `value/clipfrac`. Its
      parameters are `{"policy": ..., "critic": ...}`, and only those of the critic have a gradient
      unless the critic reads the hidden states of the policy.

    Example:
      >>> from ppo_jax import TransformerConfig, language_model, shared_critic
      >>> config = TransformerConfig(
      ...     vocab_size=7, positions=8, width=4, layers=1, heads=2, mlp_width=16)
      >>> loss_fn = value_loss_fn(language_model(config), shared_critic(), value_clip=0.2)
    """
    forward = forward_fn(bins)

    def loss_fn(params: Params, batch: Experience, counts: Counts) -> tuple[Array, LossMetrics]:
        prompt_length = batch.tokens.shape[1] - batch.response_mask.shape[1]
        # Nothing of the policy's logits is used, so the compiler leaves them out.
        values = forward(
            model, critic, params, batch.tokens, batch.mask, prompt_length, temperature=1.0
        ).values
        aggregate = partial(aggregation.mean, count=counts.value)
        loss = clipped_value_loss(
            values,
            batch.values,
            batch.returns,
            batch.value_mask,
            clip=value_clip,
            aggregate=aggregate,
        )
        clipped = value_clipfrac(
            values,
            batch.values,
            batch.returns,
            batch.value_mask,
            clip=value_clip,
            aggregate=aggregate,
        )
        return loss, LossMetrics({"loss/value": loss, "value/clipfrac": clipped}, {})

    return loss_fn


def no_critic(
    params: Params, hidden: Array, tokens: Array, mask: Array, segments: Segments = None
) -> Array:
    """Return values of 0, for a method that needs no critic and for the policy's own steps.

    Args:
      params: not used.
      hidden: `[B, R, D]` of any dtype, the hidden states of the policy.
      tokens: `[B, R]` int32, not used.
      mask: `[B, R]` bool, not used.
      segments: not used.

    Returns:
      `[B, R]` float32.

    Example:
      >>> no_critic({}, jnp.ones((1, 2, 4)), None, None)
      Array([[0., 0.]], dtype=float32)
    """
    return jnp.zeros(hidden.shape[:2], jnp.float32)
