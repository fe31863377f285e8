"""Supervised fine-tuning, and the compiled loop of gradient steps that it shares with reward-model training."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.training.train_state import TrainState
from jax import Array

from ppo_jax.ops.logprobs import token_logprobs
from ppo_jax.ops.masked import masked_mean
from ppo_jax.types import LanguageModel, Params


def sft_loss(
    model: LanguageModel, params: Params, tokens: Array, mask: Array, loss_mask: Array
) -> tuple[Array, Array]:
    """Mean negative log-prob of the marked tokens, and the share of them that the model would have guessed.

        L = - Σ loss_mask_t log π(x_t | x_<t) / Σ loss_mask_t

    Args:
      model: functions of the policy.
      params: its parameters.
      tokens, mask: `[B, T]` int32 and bool.
      loss_mask: `[B, T]` bool, tokens to learn (those of the response); the first position never counts.

    Returns:
      The loss in nats per token and the accuracy, `[]` float32 each.
    """
    hidden, _ = model.hidden(params, tokens[:, :-1], mask[:, :-1])
    logits, marked = model.logits(params, hidden), (loss_mask & mask)[:, 1:]
    loss = -masked_mean(token_logprobs(logits, tokens[:, 1:]), marked)
    hits = (jnp.argmax(logits, axis=-1) == tokens[:, 1:]).astype(jnp.float32)
    return loss, masked_mean(hits, marked)


def len_of_first(*arrays: np.ndarray) -> float:
    """Rows."""
    return float(len(arrays[0]))


def learned_tokens(tokens: np.ndarray, mask: np.ndarray, loss_mask: np.ndarray) -> float:
    """Tokens that `sft_loss` averages over."""
    return float((mask & loss_mask)[:, 1:].sum())


@partial(jax.jit, static_argnames="loss_fn", donate_argnums=(0,))
def _epoch(state: TrainState, batches, *, loss_fn) -> tuple[TrainState, Array]:
    def step(state, batch):
        (loss, _), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params, *batch)
        return state.apply_gradients(grads=grads), loss

    return jax.lax.scan(step, state, batches)


@partial(jax.jit, static_argnames="loss_fn")
def _evaluate(params: Params, batch, *, loss_fn):
    return loss_fn(params, *batch)


def fit(
    loss_fn: Callable[..., tuple[Array, Array]],
    params: Params,
    arrays: tuple[np.ndarray, ...],
    *,
    seed: int,
    epochs: int,
    batch_size: int,
    learning_rate: float,
    weight_decay: float = 0.0,
    warmup: float = 0.05,
    on_epoch: Callable[[int, float, Params], None] | None = None,
) -> Params:
    """AdamW with warm-up and cosine decay over shuffled batches; each epoch is one compiled scan.

    Args:
      loss_fn: `(params, *batch) -> (loss, aux)`, the same object each call, or it compiles again.
      params: where to start; copied.
      arrays: `[n, ...]` each; rows that do not fill a batch wait for another epoch's shuffle.
      seed: of the shuffles.
      epochs, batch_size, learning_rate, weight_decay: as ever.
      warmup: share of the steps over which the rate rises.
      on_epoch: called with the epoch, its mean loss and the parameters.

    Returns:
      The parameters after the last step.

    Raises:
      ValueError: if there are fewer rows than a batch.
    """
    n = len(arrays[0])
    steps = n // batch_size
    if not steps:
        raise ValueError(f"{n} rows are left to learn from, fewer than batch_size={batch_size}.")
    rising = max(int(warmup * steps * epochs), 1)
    rate = optax.warmup_cosine_decay_schedule(
        0.0, learning_rate, rising, max(steps * epochs, rising + 1)
    )
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rate, weight_decay=weight_decay))
    state = TrainState.create(
        apply_fn=None, params=jax.tree.map(lambda x: jnp.array(x, copy=True), params), tx=tx
    )
    for epoch in range(epochs):
        order = (
            np.random.default_rng((seed, epoch))
            .permutation(n)[: steps * batch_size]
            .reshape(steps, batch_size)
        )
        state, losses = _epoch(state, tuple(x[order] for x in arrays), loss_fn=loss_fn)
        if on_epoch is not None:
            on_epoch(epoch, float(jnp.mean(losses)), state.params)
    return state.params


def evaluate_loss(
    loss_fn: Callable[..., tuple[Array, Array]],
    params: Params,
    arrays: tuple[np.ndarray, ...],
    *,
    batch_size: int = 64,
    weight: Callable[..., float] = len_of_first,
) -> tuple[float, float]:
    """Loss and accuracy on held-out rows, `batch_size` at a time; a batch counts as `weight(*batch)`, by default its rows."""
    total, sums = 0.0, np.zeros(2)
    for first in range(0, len(arrays[0]), batch_size):
        batch = tuple(x[first : first + batch_size] for x in arrays)
        count = float(weight(*batch))
        sums += count * np.asarray(_evaluate(params, batch, loss_fn=loss_fn), np.float64)
        total += count
    return float(sums[0] / max(total, 1.0)), float(sums[1] / max(total, 1.0))
