"""The training loop of the supervised stages in memory, and what it shares with that of a run."""

from collections.abc import Callable
from functools import partial
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.training.train_state import TrainState
from jax import Array

from ppo_jax.ppo.batch_parts import (
    Arrays,
    SupervisedLoss,
    Weight,
    epoch_rows,
    mean_weight,
    split_batch,
)
from ppo_jax.types import Params


class SupervisedState(flax.struct.PyTreeNode):
    """Everything that changes during a supervised run. A checkpoint holds it.

    Attributes:
      train: the parameters and the optimizer's state.
      update: `[]` int32, number of optimizer steps done.
    """

    train: TrainState
    update: Array

    @property
    def params(self) -> Params:
        """The parameters."""
        return self.train.params


def supervised_optimizer(
    steps: int, *, learning_rate: float, weight_decay: float = 0.0, warmup: float = 0.05
) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """Return AdamW behind a clip of the gradient's global norm at 1, and its learning rate.

    Args:
      steps: number of steps of the run.
      learning_rate: peak of the schedule, which rises linearly and decays with a cosine.
      weight_decay: AdamW's decoupled weight decay.
      warmup: share of the steps over which the learning rate rises.
    """
    warmup_steps = max(int(warmup * steps), 1)
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, learning_rate, warmup_steps, max(steps, warmup_steps + 1)
    )
    adamw = optax.adamw(schedule, weight_decay=weight_decay)
    return optax.chain(optax.clip_by_global_norm(1.0), adamw), schedule


def start_training(params: Params, tx: optax.GradientTransformation) -> TrainState:
    """Return the state before the first step. It holds copies, so that it can be donated."""
    params = jax.tree.map(lambda x: jnp.array(x, copy=True), params)
    state = TrainState.create(apply_fn=None, params=params, tx=tx)
    return state.replace(step=jnp.int32(0))


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

    Gradients are clipped to a global norm of 1. Each epoch is one compiled scan over its steps. To
    compute little padding, pass rows that `data.pack_examples` has packed.

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
    batches = partial(epoch_rows, len(arrays[0]), batch_size=batch_size, seed=seed)
    steps = len(batches(epoch=0)) * epochs
    tx, _ = supervised_optimizer(
        steps, learning_rate=learning_rate, weight_decay=weight_decay, warmup=warmup
    )

    def scan_step(state: TrainState, batch: Arrays) -> tuple[TrainState, Array]:
        (loss, _), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params, *batch)
        return state.apply_gradients(grads=grads), loss

    run_epoch = jax.jit(partial(jax.lax.scan, scan_step), donate_argnums=0)
    state = start_training(params, tx)
    for epoch in range(epochs):
        order = batches(epoch=epoch)
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
    lengths: np.ndarray | None = None,
    weight: Weight | None = None,
) -> tuple[float, float]:
    """Compute the mean loss and accuracy over held-out rows.

    Args:
      loss_fn: as in `fit`. Pass the same function object in every call, because another one forces
        a recompilation.
      params: the parameters.
      arrays: the held-out rows, `[n, ...]` each.
      batch_size: rows of a batch; the last batch may be smaller.
      lengths: `[n]` int, the number of columns that each row uses of the arrays with two or more
        axes. The batches are then of rows of similar lengths, and are cut to the longest one. None
        computes all columns of the rows in their order.
      weight: `weight(*batch)`, the weight of the means over a batch, such as its number of tokens
        to learn; by default its number of rows.

    Returns:
      The loss and the accuracy.
    """
    evaluate, total, sums = jax.jit(loss_fn), 0.0, np.zeros(2)
    rows = np.arange(len(arrays[0]))
    order = rows if lengths is None else np.argsort(lengths, kind="stable")
    for first in rows[::batch_size]:
        part = order[first : first + batch_size]
        if lengths is None:
            batch = tuple(x[part] for x in arrays)
        else:
            [batch] = split_batch(arrays, part, lengths, parts=1)
        count = mean_weight(weight, batch)
        sums += count * np.asarray(evaluate(params, *batch), np.float64)
        total += count
    loss, accuracy = (sums / max(total, 1.0)).tolist()
    return loss, accuracy
