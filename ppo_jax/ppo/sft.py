"""The supervised fine-tuning loss."""

from typing import Any

import chex
import jax.numpy as jnp
import numpy as np
from jax import Array

from ppo_jax.ops.logprobs import token_logprobs
from ppo_jax.ops.masked import check_mask, masked_mean
from ppo_jax.ppo.batch_parts import LossAndAccuracy
from ppo_jax.types import LanguageModel, Params


def sft_loss(
    model: LanguageModel,
    params: Params,
    tokens: Array,
    mask: Array,
    loss_mask: Array,
    segments: Array | None = None,
) -> LossAndAccuracy:
    """Compute the mean negative log-probability and the accuracy of the tokens to learn.

        L = - Σ loss_mask_t log π(x_t | x_<t) / Σ loss_mask_t

    Args:
      model: the functions of the policy.
      params: its parameters.
      tokens: `[B, T]` int32.
      mask: `[B, T]` bool, the real tokens.
      loss_mask: `[B, T]` bool, the tokens to learn, such as those of the response. The first
        position never counts, because nothing predicts it.
      segments: `[B, T]` int32, the number of the example that a token belongs to, if a row holds
        several, as `data.pack_examples` returns them. The first token of each then never counts.
        Each example must fit the model's positions, which is not checked then. None if each row is
        one example.

    Returns:
      The loss in nats per token, and the share of the tokens that have the greatest logit at their
      position; `[]` float32 each.

    Raises:
      AssertionError: if the arrays are not all `[B, T]`, or a mask is not bool.

    Source:
      Ouyang et al. 2022 (https://arxiv.org/abs/2203.02155), section 3.5.

    Example:
      >>> import jax
      >>> from ppo_jax.models.config import TransformerConfig
      >>> from ppo_jax.models.transformer import init_params, language_model
      >>> config = TransformerConfig(
      ...     vocab_size=7, positions=4, width=4, layers=1, heads=2, mlp_width=8
      ... )
      >>> params = jax.tree.map(jnp.zeros_like, init_params(config, jax.random.key(0)))
      >>> tokens, mask = jnp.array([[1, 2, 0]]), jnp.ones((1, 3), bool)
      >>> loss, accuracy = sft_loss(language_model(config), params, tokens, mask, loss_mask=mask)
      >>> round(float(loss), 4), float(accuracy)  # All logits are 0: the loss is log 7.
      (1.9459, 0.5)
    """
    chex.assert_rank(tokens, 2)
    check_mask(mask, tokens)
    check_mask(loss_mask, tokens, name="loss_mask")
    marked = _learned(mask, loss_mask, segments)
    if segments is None:
        hidden, _ = model.hidden(params, tokens[:, :-1], mask[:, :-1])
    else:
        chex.assert_equal_shape([tokens, segments])
        hidden, _ = model.hidden(params, tokens[:, :-1], mask[:, :-1], segments=segments[:, :-1])
    logits = model.logits(params, hidden)
    loss = -masked_mean(token_logprobs(logits, tokens[:, 1:]), marked)
    hits = (jnp.argmax(logits, axis=-1) == tokens[:, 1:]).astype(jnp.float32)
    return loss, masked_mean(hits, marked)


def _learned(mask: Any, loss_mask: Any, segments: Any) -> Any:
    """Return which tokens but the first of a row are learned, `[B, T - 1]` bool."""
    marked = (loss_mask & mask)[:, 1:]
    return marked if segments is None else marked & (segments[:, 1:] == segments[:, :-1])


def count_learned_tokens(
    tokens: np.ndarray,
    mask: np.ndarray,
    loss_mask: np.ndarray,
    segments: np.ndarray | None = None,
) -> float:
    """Count the tokens that `sft_loss` averages over."""
    return float(_learned(mask, loss_mask, segments).sum())
