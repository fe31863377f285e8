"""One PPO update: a scan over shuffled minibatches, with one optimizer step for each."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax.training.train_state import TrainState
from jax import Array

from ppo_jax.ops.masked import BY_TOKEN, Aggregation
from ppo_jax.ppo.gradients import minibatch_gradient
from ppo_jax.ppo.packing import Bins
from ppo_jax.ppo.state import overlay
from ppo_jax.sharding import constrain_rows, map_over_data
from ppo_jax.types import AxisName, Experience, LossFn, LossMetrics, Metrics, Params


def schedule_at(state: TrainState, step: Array) -> TrainState:
    """Move the learning-rate schedule of a train state to a step.

    The schedule then counts the steps of the updates that are done, not the steps that were taken:
    an early stop or a skipped step does not delay the decay.

    Args:
      state: train state with an optimizer of optax.
      step: `[]` int32, the step to move to.

    Returns:
      The train state; unchanged if its learning rate is constant.
    """

    def is_schedule(path: tuple, _: Any) -> bool:
        return getattr(path[-1], "tuple_name", "") == "ScaleByScheduleState"

    if not optax.tree.get_all_with_path(state.opt_state, "count", is_schedule):
        return state
    return state.replace(opt_state=optax.tree.set(state.opt_state, is_schedule, count=step))


def shuffled_minibatches(
    key: Array, rows: int, *, epochs: int, minibatches: int, axis_name: AxisName | None = None
) -> Array:
    """Draw the row numbers of each minibatch, with a new permutation of the rows in each epoch.

    Args:
      key: `[]` typed key, consumed.
      rows: number of rows in the whole batch.
      epochs: number of passes over the rows.
      minibatches: number of minibatches per epoch; it must divide `rows`.
      axis_name: mapped axis over which each minibatch is split.

    Returns:
      `[epochs * minibatches, rows / minibatches]` int32; under `axis_name` only the columns of this
      device.

    Example:
      >>> order = shuffled_minibatches(jax.random.key(0), 4, epochs=1, minibatches=2)
      >>> order.shape, sorted(order.ravel().tolist())
      ((2, 2), [0, 1, 2, 3])
    """
    permutation = lambda epoch: jax.random.permutation(jax.random.fold_in(key, epoch), rows)
    order = jax.vmap(permutation)(jnp.arange(epochs)).reshape(epochs * minibatches, -1)
    if axis_name is None:
        return order
    order = order.reshape(len(order), jax.lax.axis_size(axis_name), -1)
    return order[:, jax.lax.axis_index(axis_name)]


def ppo_update(
    state: TrainState,
    experience: Experience,
    key: Array,
    *,
    loss_fn: LossFn,
    epochs: int,
    minibatches: int,
    micro_batches: int = 1,
    aggregation: Aggregation = BY_TOKEN,
    target_kl: float | None = None,
    skip_nonfinite: bool = False,
    axis_name: AxisName | None = None,
    frozen: Params | None = None,
    bins: Bins | None = None,
) -> tuple[TrainState, Metrics]:
    """Train on one batch of experience with `epochs * minibatches` optimizer steps.

    Args:
      state: parameters and optimizer state. To clip gradients, chain `optax.clip_by_global_norm`
        into its optimizer.
      experience: `B` rows, the same ones for all epochs.
      key: `[]` typed key of the shuffles, consumed.
      loss_fn: the loss of a micro-batch, such as `ppo_loss_fn` makes. With `target_kl` its metrics
        must include the mean `policy/approx_kl`.
      epochs: number of passes over the rows.
      minibatches: number of optimizer steps per epoch; it must divide `B`.
      micro_batches: number of parts of a minibatch whose gradients are added up before its
        optimizer step; it must divide `B / minibatches`.
      aggregation: the mean over tokens that `loss_fn` uses.
      target_kl: a minibatch whose `policy/approx_kl` exceeds this (nats per token), and all later
        ones, take no step. `None` for no limit.
      skip_nonfinite: take no step on a minibatch whose gradient is not finite.
      axis_name: mapped axis over which the rows are split; `B` is then the share of this device.
      frozen: parameters that are not trained; those of the state take precedence.
      bins: the shape of the bins that the rows of a minibatch are packed into, for a `loss_fn` made
        with the same bins; `None` for no packing. Instead of `micro_batches`, a minibatch then has
        as many parts as its bins make.

    Returns:
      The new state, and metrics: means and maxima over the minibatches whose gradient was computed,
      `optimizer/grad_norm` before clipping, the numbers of steps taken (`optimizer/steps`) and of
      gradients that were not finite (`optimizer/skipped`), and as 0 or 1 whether the update stopped
      early (`optimizer/stopped`) and whether all new parameters are finite (`optimizer/finite`). If
      the loss reports `policy/ratio_error_max` and `policy/clipfrac`, those of the first minibatch
      are `policy/first_ratio_error_max` and `policy/first_clipfrac`. `value/error` and
      `value/squared_error` are means over the last `minibatches` minibatches that were computed,
      which are those of the last epoch unless the update stopped early.

    Raises:
      ValueError: if `minibatches * micro_batches` does not divide the number of rows.

    Source:
      Schulman et al. 2017 (https://arxiv.org/abs/1707.06347), algorithm 1.

    Example:
      >>> from ppo_jax.types import LossMetrics
      >>> x, mask = jnp.ones((4, 2)), jnp.ones((4, 2), bool)
      >>> experience = Experience(x, mask, mask, mask, x, x, x, x)
      >>> def loss_fn(params, batch, counts):
      ...     loss = jnp.sum(params["w"] * batch.returns) / counts.tokens
      ...     return loss, LossMetrics({"loss/total": loss}, {})
      >>> state = TrainState.create(
      ...     apply_fn=None, params={"w": jnp.float32(1)}, tx=optax.sgd(0.25))
      >>> state, metrics = ppo_update(
      ...     state, experience, jax.random.key(0), loss_fn=loss_fn, epochs=1, minibatches=2)
      >>> state.params["w"], metrics["optimizer/steps"]
      (Array(0.5, dtype=float32), Array(2., dtype=float32))
    """
    if axis_name is not None:
        experience = jax.lax.all_gather(experience, axis_name, tiled=True)
    rows = experience.tokens.shape[0]
    parts = micro_batches if bins is None else None
    if rows % (minibatches * (parts or 1)):
        raise ValueError(
            f"The {rows} rows cannot be split into minibatches={minibatches} of "
            f"micro_batches={micro_batches} each."
        )
    order = shuffled_minibatches(
        key, rows, epochs=epochs, minibatches=minibatches, axis_name=axis_name
    )
    gradient = partial(
        minibatch_gradient,
        lambda params, *args: loss_fn(overlay(frozen, params), *args),
        micro_batches=micro_batches,
        aggregation=aggregation,
        bins=bins,
    )

    # Jitted to be traced once, although `_no_step` asks for the shapes of its results.
    @partial(jax.jit, inline=True)
    def take_step(state: TrainState, row_numbers: Array) -> tuple[TrainState, _Step]:
        batch = constrain_rows(jax.tree.map(lambda x: x[row_numbers], experience))
        grads, metrics = (
            map_over_data(gradient, state.params, batch, parts=parts)
            if axis_name is None
            else gradient(state.params, batch, axis_name)
        )
        return _apply_gradients(state, grads, metrics, target_kl, skip_nonfinite)

    def step(carry: tuple[TrainState, Array], row_numbers: Array) -> tuple[Any, _Step]:
        state, stopped = carry
        if target_kl is None:
            state, report = take_step(state, row_numbers)
        else:
            no_step = partial(_no_step, take_step)
            state, report = jax.lax.cond(stopped, no_step, take_step, state, row_numbers)
        return (state, stopped | report.beyond), report

    (state, stopped), steps = jax.lax.scan(step, (state, jnp.bool_(False)), order)
    return state, _summary(state, stopped, steps, minibatches)


class _Step(NamedTuple):
    """What one minibatch reports."""

    metrics: LossMetrics
    computed: Array  # [] bool, the gradient was computed
    beyond: Array  # [] bool, the target KL was exceeded
    bad: Array  # [] bool, it was not, but the gradient was not finite


def _apply_gradients(
    state: TrainState,
    grads: Params,
    metrics: LossMetrics,
    target_kl: float | None,
    skip_nonfinite: bool,
) -> tuple[TrainState, _Step]:
    """Take the optimizer step, unless the target KL is exceeded or the gradient is not finite."""
    norm = optax.tree.norm(grads)
    beyond = jnp.bool_(False) if target_kl is None else metrics.mean["policy/approx_kl"] > target_kl
    bad = ~jnp.isfinite(norm) if skip_nonfinite else jnp.bool_(False)
    new = state.apply_gradients(grads=grads)
    if target_kl is not None or skip_nonfinite:
        new = jax.tree.map(lambda old, new: jnp.where(beyond | bad, old, new), state, new)
    metrics = LossMetrics({**metrics.mean, "optimizer/grad_norm": norm}, metrics.max)
    return new, _Step(metrics, jnp.bool_(True), beyond, bad & ~beyond)


def _no_step(
    take_step: Callable, state: TrainState, row_numbers: Array
) -> tuple[TrainState, _Step]:
    """Return the state unchanged with a report of zeros, in place of `take_step`."""
    report = jax.eval_shape(take_step, state, row_numbers)[1]
    return state, jax.tree.map(jnp.zeros_like, report)


def _summary(state: TrainState, stopped: Array, steps: _Step, minibatches: int) -> Metrics:
    """Reduce the stacked reports of all minibatches to one number per metric."""
    mean, largest = steps.metrics
    # Minibatches after an early stop report zeros, so they add nothing to the sums.
    count = jnp.sum(steps.computed, dtype=jnp.float32)
    taken = steps.computed & ~steps.beyond & ~steps.bad
    finite = jnp.stack([jnp.isfinite(x).all() for x in jax.tree.leaves(state.params)]).all()
    first = {"policy/ratio_error_max": largest, "policy/clipfrac": mean}
    last = steps.computed & (jnp.arange(len(steps.computed)) >= count - minibatches)
    of_last_epoch = {"value/error", "value/squared_error"} & mean.keys()
    return {
        **{name: jnp.sum(x) / count for name, x in mean.items()},
        **{name: jnp.mean(mean[name], where=last) for name in sorted(of_last_epoch)},
        **{name: jnp.max(x) for name, x in largest.items()},
        **{
            name.replace("/", "/first_"): found[name][0]
            for name, found in first.items()
            if name in found
        },
        "optimizer/steps": jnp.sum(taken, dtype=jnp.float32),
        "optimizer/skipped": jnp.sum(steps.bad, dtype=jnp.float32),
        "optimizer/stopped": stopped.astype(jnp.float32),
        "optimizer/finite": finite.astype(jnp.float32),
    }
