"""One PPO update: epochs of freshly shuffled minibatches, each a sum over micro-batches and one optimizer step.

A new loss is a function `(params, batch, counts) -> (loss, LossMetrics)`; `ppo_loss_fn` below makes the standard one.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import optax
from flax.training.train_state import TrainState

from ppo_jax import losses
from ppo_jax.masked import BY_TOKEN, Aggregation
from ppo_jax.metrics import LossMetrics, Metrics, add_parts, policy_metrics
from ppo_jax.models.sharding import constrain_params, constrain_rows, map_over_data
from ppo_jax.scoring import forward_responses, split_rows
from ppo_jax.types import CriticFn, Experience, LanguageModel, Params, overlay


class Counts(NamedTuple):
    """What the means of a minibatch divide by, over all its micro-batches and devices; `[]` float32 each."""

    tokens: jax.Array  # of the response mask
    policy: jax.Array  # of the response mask, as the aggregation counts
    value: jax.Array  # of the value mask, as the aggregation counts


class LossFn(Protocol):
    def __call__(self, params: Params, batch: Experience, counts: Counts) -> tuple[jax.Array, LossMetrics]:
        """The part that `batch`, a micro-batch, has in its minibatch's loss and metrics.

        On a mesh it may run once for each place on `data`, and the parts are added up: it divides by `counts`, not by its own rows.
        Where it says itself how an array lies, it does so by `models.sharding.constrain`, which knows that.
        """


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
            model, critic, params, batch.tokens, batch.mask, prompt_length, temperature=temperature, chunk=chunk
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
            out.logprobs, batch.logprobs, batch.response_mask, clip_low=clip_low, clip_high=clip_high, count=counts.tokens
        )
        return loss, LossMetrics({"loss/total": loss, **terms, **moved.mean}, moved.max)

    return loss_fn


def minibatch_gradient(
    loss_fn: LossFn,
    params: Params,
    batch: Experience,
    *,
    micro_batches: int = 1,
    aggregation: Aggregation = BY_TOKEN,
    axis_name: str | None = None,
) -> tuple[Params, LossMetrics]:
    """Gradient and metrics of a minibatch, a micro-batch at a time, with one reduction over devices at the end.

    Args:
      loss_fn: the part that a micro-batch has in the loss.
      params: what the gradient is of.
      batch: the minibatch; its rows are a multiple of `micro_batches`.
      micro_batches: how many parts.
      aggregation: how the loss counts.
      axis_name: mapped axis over which the minibatch is spread.

    Returns:
      The gradient, like `params`, and the metrics of the whole minibatch.
    """
    counts = Counts(
        tokens=BY_TOKEN.count(batch.response_mask, axis_name=axis_name),
        policy=aggregation.count(batch.response_mask, axis_name=axis_name),
        value=aggregation.count(batch.value_mask, axis_name=axis_name),
    )

    def part(micro_batch: Experience) -> tuple[Params, LossMetrics]:
        (_, metrics), grads = jax.value_and_grad(loss_fn, has_aux=True)(params, micro_batch, counts)
        return constrain_params(grads), metrics  # else the compiler may add up whole gradients on each device

    def add(total, micro_batch):
        grads, metrics = part(micro_batch)
        return (jax.tree.map(jnp.add, total[0], grads), add_parts(total[1], metrics)), None

    if micro_batches == 1:
        grads, metrics = part(batch)
    else:
        parts = split_rows(batch, micro_batches)
        shapes = jax.eval_shape(part, jax.tree.map(lambda x: x[0], parts))
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        (grads, metrics), _ = jax.lax.scan(add, zeros, parts)
    if axis_name is not None:
        grads, mean = jax.lax.psum((grads, metrics.mean), axis_name)
        metrics = LossMetrics(mean, jax.lax.pmax(metrics.max, axis_name))
    return grads, metrics


def all_finite(tree: Any) -> jax.Array:
    """Whether no number of any array is an infinity or NaN: `[]` bool."""
    return jnp.stack([jnp.isfinite(x).all() for x in jax.tree.leaves(tree)]).all()


def schedule_at(state: TrainState, step: jax.Array) -> TrainState:
    """Sets the learning rate's schedule to `step`, so that it counts the steps that were due and not those that were taken."""

    def is_schedule(path: tuple, _: Any) -> bool:
        return getattr(path[-1], "tuple_name", "") == "ScaleByScheduleState"

    if not optax.tree.get_all_with_path(state.opt_state, "count", is_schedule):
        return state  # a constant rate
    return state.replace(opt_state=optax.tree.set(state.opt_state, is_schedule, count=step))


def shuffled_minibatches(key: jax.Array, rows: int, *, epochs: int, minibatches: int, axis_name: str | None = None) -> jax.Array:
    """Row numbers of each minibatch: `[epochs · minibatches, rows / minibatches]` int32, a fresh permutation each epoch.

    Under `axis_name`, the part of each minibatch that this device takes.

    Example:
      >>> sorted(shuffled_minibatches(jax.random.key(0), 4, epochs=1, minibatches=2).ravel().tolist())
      [0, 1, 2, 3]
    """
    keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, jnp.arange(epochs))
    order = jax.vmap(lambda k: jax.random.permutation(k, rows))(keys).reshape(epochs * minibatches, -1)
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
        raise ValueError(f"{rows} rows do not divide into minibatches={minibatches} of micro_batches={micro_batches}.")
    order = shuffled_minibatches(key, rows, epochs=epochs, minibatches=minibatches, axis_name=axis_name)

    def take_step(state: TrainState, rows_of: jax.Array) -> tuple[TrainState, _Step]:
        batch = constrain_rows(jax.tree.map(lambda x: x[rows_of], experience))

        def gradient(params: tuple[Params, Params | None], batch: Experience, data_axis: str | None):
            return minibatch_gradient(
                lambda own, rows, counts: loss_fn(overlay(params[1], own), rows, counts), params[0], batch,
                micro_batches=micro_batches, aggregation=aggregation, axis_name=axis_name or data_axis,
            )  # fmt: skip

        trees = (state.params, frozen)
        grads, metrics = (
            map_over_data(gradient, trees, batch, parts=micro_batches) if axis_name is None else gradient(trees, batch, None)
        )
        norm = optax.tree.norm(grads)
        beyond = jnp.bool_(False) if target_kl is None else metrics.mean["policy/approx_kl"] > target_kl
        new = state.apply_gradients(grads=grads)
        bad = ~jnp.isfinite(norm) if skip_nonfinite else jnp.bool_(False)
        if target_kl is not None or skip_nonfinite:
            new = jax.tree.map(lambda a, b: jnp.where(beyond | bad, a, b), state, new)
        return new, _Step(metrics, norm, computed=jnp.bool_(True), taken=~(beyond | bad), bad=bad & ~beyond, beyond=beyond)

    def step(carry, rows_of):
        state, stopped = carry
        if target_kl is None:
            state, done = take_step(state, rows_of)
        else:
            state, done = jax.lax.cond(stopped, _no_step(take_step), take_step, state, rows_of)
        return (state, stopped | done.beyond), done

    (state, stopped), steps = jax.lax.scan(step, (state, jnp.bool_(False)), order)
    return state, {**_summary(steps, stopped), "optimizer/finite": all_finite(state.params).astype(jnp.float32)}


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
    mean = {name: jnp.sum(x) / count for name, x in {**steps.metrics.mean, "optimizer/grad_norm": steps.norm}.items()}
    return {
        **mean,
        **{name: jnp.max(x) for name, x in steps.metrics.max.items()},
        "policy/first_ratio_error_max": steps.metrics.max["policy/ratio_error_max"][0],
        "policy/first_clipfrac": steps.metrics.mean["policy/clipfrac"][0],
        "optimizer/steps": jnp.sum(steps.taken, dtype=jnp.float32),
        "optimizer/skipped": jnp.sum(steps.bad, dtype=jnp.float32),
        "optimizer/stopped": stopped.astype(jnp.float32),
    }
