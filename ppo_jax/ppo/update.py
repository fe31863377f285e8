"""One PPO update: epochs of freshly shuffled minibatches, each a sum over micro-batches and one optimizer step.

A new loss is a function `(params, batch, counts) -> (loss, LossMetrics)`; `ppo_loss_fn` below makes the standard one.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax.training.train_state import TrainState

from ppo_jax.ops.masked import BY_TOKEN, Aggregation
from ppo_jax.ppo.gradients import all_finite, minibatch_gradient
from ppo_jax.sharding import constrain_rows, map_over_data
from ppo_jax.types import Experience, LossFn, LossMetrics, Metrics, Params, overlay


def schedule_at(state: TrainState, step: jax.Array) -> TrainState:
    """Sets the learning rate's schedule to `step`, so that it counts the steps that were due and not those that were taken."""

    def is_schedule(path: tuple, _: Any) -> bool:
        return getattr(path[-1], "tuple_name", "") == "ScaleByScheduleState"

    if not optax.tree.get_all_with_path(state.opt_state, "count", is_schedule):
        return state  # a constant rate
    return state.replace(opt_state=optax.tree.set(state.opt_state, is_schedule, count=step))


def shuffled_minibatches(
    key: jax.Array, rows: int, *, epochs: int, minibatches: int, axis_name: str | None = None
) -> jax.Array:
    """Row numbers of each minibatch: `[epochs · minibatches, rows / minibatches]` int32, a fresh permutation each epoch.

    Under `axis_name`, the part of each minibatch that this device takes.

    Example:
      >>> sorted(shuffled_minibatches(jax.random.key(0), 4, epochs=1, minibatches=2).ravel().tolist())
      [0, 1, 2, 3]
    """
    keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, jnp.arange(epochs))
    order = jax.vmap(lambda k: jax.random.permutation(k, rows))(keys).reshape(
        epochs * minibatches, -1
    )
    if axis_name is None:
        return order
    order = order.reshape(order.shape[0], jax.lax.axis_size(axis_name), -1)
    return order[:, jax.lax.axis_index(axis_name)]


def ppo_update(
    state: TrainState,
    experience: Experience,
    key: jax.Array,
    *,
    loss_fn: LossFn,
    epochs: int,
    minibatches: int,
    micro_batches: int = 1,
    aggregation: Aggregation = BY_TOKEN,
    target_kl: float | None = None,
    skip_nonfinite: bool = False,
    axis_name: str | None = None,
    frozen: Params | None = None,
) -> tuple[TrainState, Metrics]:
    """Learns from one batch of experience: `epochs x minibatches` optimizer steps, compiled as one scan.

    Args:
      state: parameters and optimizer state; clip gradients in its `tx` (`optax.clip_by_global_norm`).
      experience: `B` rows, fixed.
      key: `[]` typed key of the shuffles, consumed.
      loss_fn: the loss, e.g. of `ppo_loss_fn`.
      epochs: passes over the rows.
      minibatches: optimizer steps an epoch; divides `B`.
      micro_batches: parts of a minibatch whose gradients are added before its one step; divides `B / minibatches`.
      aggregation: how the loss counts; that of `loss_fn`.
      target_kl: once a minibatch's `policy/approx_kl` is beyond it, that step and all later ones are not taken.
      skip_nonfinite: a step whose gradient holds an infinity or NaN is not taken.
      axis_name: mapped axis over which the rows are spread; `B` is then this device's share.
      frozen: parameters that do not train; the state's lie over them.

    Returns:
      The new state, and metrics: means over the minibatches whose gradient was computed, maxima over the same,
      `policy/first_ratio_error_max` of the first minibatch alone, `optimizer/steps` taken, `optimizer/skipped` as not finite,
      `optimizer/stopped` (0 or 1) at the target KL, `optimizer/finite` (0 or 1) of the new parameters, `optimizer/grad_norm`
      before clipping.

    Raises:
      ValueError: if `minibatches` and `micro_batches` do not divide the rows.
    """
    if axis_name is not None:
        experience = jax.lax.all_gather(experience, axis_name, tiled=True)
    rows = experience.tokens.shape[0]
    if rows % (minibatches * micro_batches):
        raise ValueError(
            f"{rows} rows do not divide into minibatches={minibatches} of micro_batches={micro_batches}."
        )
    order = shuffled_minibatches(
        key, rows, epochs=epochs, minibatches=minibatches, axis_name=axis_name
    )

    def take_step(state: TrainState, rows_of: jax.Array) -> tuple[TrainState, _Step]:
        batch = constrain_rows(jax.tree.map(lambda x: x[rows_of], experience))

        def gradient(
            params: tuple[Params, Params | None], batch: Experience, data_axis: str | None
        ):
            return minibatch_gradient(
                lambda own, rows, counts: loss_fn(overlay(params[1], own), rows, counts),
                params[0],
                batch,
                micro_batches=micro_batches,
                aggregation=aggregation,
                axis_name=axis_name or data_axis,
            )

        trees = (state.params, frozen)
        grads, metrics = (
            map_over_data(gradient, trees, batch, parts=micro_batches)
            if axis_name is None
            else gradient(trees, batch, None)
        )
        norm = optax.tree.norm(grads)
        beyond = (
            jnp.bool_(False) if target_kl is None else metrics.mean["policy/approx_kl"] > target_kl
        )
        new = state.apply_gradients(grads=grads)
        bad = ~jnp.isfinite(norm) if skip_nonfinite else jnp.bool_(False)
        if target_kl is not None or skip_nonfinite:
            new = jax.tree.map(lambda a, b: jnp.where(beyond | bad, a, b), state, new)
        return new, _Step(
            metrics,
            norm,
            computed=jnp.bool_(True),
            taken=~(beyond | bad),
            bad=bad & ~beyond,
            beyond=beyond,
        )

    def step(carry, rows_of):
        state, stopped = carry
        if target_kl is None:
            state, done = take_step(state, rows_of)
        else:
            state, done = jax.lax.cond(stopped, _no_step(take_step), take_step, state, rows_of)
        return (state, stopped | done.beyond), done

    (state, stopped), steps = jax.lax.scan(step, (state, jnp.bool_(False)), order)
    return state, {
        **_summary(steps, stopped),
        "optimizer/finite": all_finite(state.params).astype(jnp.float32),
    }


class _Step(NamedTuple):
    """What one minibatch reports; flags are `[]` bool."""

    metrics: LossMetrics
    norm: jax.Array
    computed: jax.Array
    taken: jax.Array
    bad: jax.Array
    beyond: jax.Array


def _no_step(take_step: Callable) -> Callable:
    """Leaves the state and reports zeros of `take_step`'s shapes."""

    def same(state, rows_of):
        report = jax.eval_shape(take_step, state, rows_of)[1]
        return state, jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), report)

    return same


def _summary(steps: _Step, stopped: jax.Array) -> Metrics:
    """Reports of all minibatches, stacked, to one number a name."""
    count = jnp.sum(steps.computed, dtype=jnp.float32)  # the others are zeros
    mean = {
        name: jnp.sum(x) / count
        for name, x in {**steps.metrics.mean, "optimizer/grad_norm": steps.norm}.items()
    }
    return {
        **mean,
        **{name: jnp.max(x) for name, x in steps.metrics.max.items()},
        "policy/first_ratio_error_max": steps.metrics.max["policy/ratio_error_max"][0],
        "policy/first_clipfrac": steps.metrics.mean["policy/clipfrac"][0],
        "optimizer/steps": jnp.sum(steps.taken, dtype=jnp.float32),
        "optimizer/skipped": jnp.sum(steps.bad, dtype=jnp.float32),
        "optimizer/stopped": stopped.astype(jnp.float32),
    }
