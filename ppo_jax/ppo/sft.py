"""The supervised fine-tuning loss, and the training loop that reward models share with it."""

from collections.abc import Callable
from functools import partial
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.training.train_state import TrainState
from jax import Array

from ppo_jax.ops.logprobs import token_logprobs
from ppo_jax.ops.masked import check_mask, masked_mean
from ppo_jax.types import LanguageModel, Params

Arrays = tuple[np.ndarray, ...]  # Row `i` of every array belongs to example `i`.
LossAndAccuracy = tuple[Array, Array]
SupervisedLoss = Callable[..., LossAndAccuracy]  # `loss_fn(params, *batch)`


def sft_loss(
    model: LanguageModel, params: Params, tokens: Array, mask: Array, loss_mask: Array
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

    Returns:
      The loss in nats per token, and the share of the tokens that have the greatest logit at their
      position; `[]` float32 each.

    Raises:
      AssertionError: if the arrays are not all `[B, T]`, or a mask is not bool.

    Source:
      Ouyang et al. 2022 (https://arxiv.org/abs/2203.02155), section 3.5.

    Example:
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
    check_mask(loss_mask, tokens)
    hidden, _ = model.hidden(params, tokens[:, :-1], mask[:, :-1])
    logits, marked = model.logits(params, hidden), (loss_mask & mask)[:, 1:]
    loss = -masked_mean(token_logprobs(logits, tokens[:, 1:]), marked)
    hits = (jnp.argmax(logits, axis=-1) == tokens[:, 1:]).astype(jnp.float32)
    return loss, masked_mean(hits, marked)


def count_learned_tokens(tokens: np.ndarray, mask: np.ndarray, loss_mask: np.ndarray) -> float:
    """Count the tokens that `sft_loss` averages over."""
    return float((mask & loss_mask)[:, 1:].sum())


def fit(
    loss_fn: SupervisedLoss,
    params: Params,
    arrays: Arrays,
    *,
    seed: int,
    epochs: int,
    batch_size: int,
    learning_rate: float,
    weight_decay: float = 0.0,
    warmup: float = 0.05,
    on_epoch: Callable[[int, float, Params], Any] | None = None,
) -> Params:
    """Minimize a loss with AdamW, linear warm-up and cosine decay, on shuffled batches.

    Each epoch is one compiled scan. Gradients are clipped to a global norm of 1.

    Args:
      loss_fn: `loss_fn(params, *batch) -> (loss, accuracy)`.
      params: the initial parameters, which are copied.
      arrays: the training rows, `[n, ...]` each. Rows that do not fill a batch are left out of an
        epoch; each epoch leaves out others.
      seed: seed of the shuffles.
      epochs: passes over the rows.
      batch_size: rows of a step.
      learning_rate: peak of the schedule.
      weight_decay: AdamW's decoupled weight decay.
      warmup: share of all steps over which the learning rate rises.
      on_epoch: called after each epoch with its number from 0, its mean loss and the parameters.

    Returns:
      The parameters after the last step.

    Raises:
      ValueError: if there are fewer rows than `batch_size`.

    Example:
      >>> def loss_fn(params, x, y):
      ...     return jnp.mean((params["w"] * x - y) ** 2), jnp.float32(0.0)
      >>> rows = np.ones(8, np.float32), np.full(8, 2, np.float32)
      >>> params = {"w": jnp.zeros(1)}
      >>> fit(loss_fn, params, rows, seed=0, epochs=9, batch_size=4, learning_rate=0.5)["w"] > 1
      Array([ True], dtype=bool)
    """
    n = len(arrays[0])
    steps = n // batch_size
    if not steps:
        raise ValueError(f"{n} rows are left to learn from, fewer than batch_size={batch_size}.")
    warmup_steps = max(int(warmup * steps * epochs), 1)
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, learning_rate, warmup_steps, max(steps * epochs, warmup_steps + 1)
    )
    tx = optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(schedule, weight_decay=weight_decay)
    )

    def step(state: TrainState, batch: Arrays) -> tuple[TrainState, Array]:
        (loss, _), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params, *batch)
        return state.apply_gradients(grads=grads), loss

    run_epoch = jax.jit(partial(jax.lax.scan, step), donate_argnums=0)
    # Copied, because `run_epoch` donates the state.
    params = jax.tree.map(lambda x: jnp.array(x, copy=True), params)
    state = TrainState.create(apply_fn=None, params=params, tx=tx)
    for epoch in range(epochs):
        order = np.random.default_rng((seed, epoch)).permutation(n)[: steps * batch_size]
        order = order.reshape(steps, batch_size)
        state, losses = run_epoch(state, tuple(x[order] for x in arrays))
        if on_epoch is not None:
            on_epoch(epoch, float(jnp.mean(losses)), state.params)
    return state.params


def evaluate_loss(
    loss_fn: SupervisedLoss,
    params: Params,
    arrays: Arrays,
    *,
    batch_size: int = 64,
    weight: Callable[..., float] | None = None,
) -> tuple[float, float]:
    """Compute the mean loss and accuracy over held-out rows.

    Args:
      loss_fn: as in `fit`. Pass the same function object in every call, because another one forces
        a recompilation.
      params: the parameters.
      arrays: the held-out rows, `[n, ...]` each.
      batch_size: rows of a batch; the last batch may be smaller.
      weight: `weight(*batch)`, the weight of a batch's means; by default its number of rows.

    Returns:
      The loss and the accuracy.
    """
    evaluate, total, sums = jax.jit(loss_fn), 0.0, np.zeros(2)
    for first in range(0, len(arrays[0]), batch_size):
        batch = tuple(x[first : first + batch_size] for x in arrays)
        count = float(len(batch[0]) if weight is None else weight(*batch))
        sums += count * np.asarray(evaluate(params, *batch), np.float64)
        total += count
    loss, accuracy = (sums / max(total, 1.0)).tolist()
    return loss, accuracy
