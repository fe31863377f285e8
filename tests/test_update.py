"""Test the compiled update: first ratios, splits, early stopping and skipped steps."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.training.train_state import TrainState
from helpers import small_problem

from ppo_jax.ops import losses
from ppo_jax.ops.clips import ratio_clip
from ppo_jax.ops.masked import BY_SEQUENCE, BY_TOKEN
from ppo_jax.ops.metrics import policy_metrics
from ppo_jax.ppo.loss import ppo_loss_fn
from ppo_jax.ppo.update import ppo_update, shuffled_minibatches

LOSS = (
    functools.partial(
        losses.ppo_loss,
        clip_low=0.2,
        clip_high=0.2,
        value_clip=0.2,
        vf_coef=0.1,
        entropy_coef=0.01,
    ),
    functools.partial(
        policy_metrics, clip=functools.partial(ratio_clip, clip_low=0.2, clip_high=0.2)
    ),
)


def run(
    dtype=jnp.float32,
    *,
    tx=None,
    experience=None,
    aggregation=BY_TOKEN,
    chunk=None,
    key=2,
    **options,
):
    model, critic, params, made = small_problem(dtype)
    loss_fn = ppo_loss_fn(
        model, critic, *LOSS, temperature=0.7, aggregation=aggregation, chunk=chunk
    )
    state = TrainState.create(
        apply_fn=None, params=params, tx=optax.sgd(0.05) if tx is None else tx
    )
    options = {"epochs": 2, "minibatches": 2, "micro_batches": 2} | options
    update = jax.jit(
        functools.partial(ppo_update, loss_fn=loss_fn, aggregation=aggregation, **options)
    )
    return update(state, made if experience is None else experience, jax.random.key(key))


def close(a, b, atol=1e-6):
    for x, y in zip(jax.tree.leaves(a.params), jax.tree.leaves(b.params), strict=True):
        np.testing.assert_allclose(x, y, atol=atol)


@pytest.mark.parametrize(
    "dtype, bound",
    [(jnp.float32, 2e-6), pytest.param(jnp.bfloat16, 5e-3, marks=pytest.mark.slow)],
)
def test_first_ratio_is_one(dtype, bound):
    _, metrics = run(dtype, tx=optax.adam(3e-3), epochs=4)
    assert metrics["policy/first_ratio_error_max"] <= bound
    assert metrics["policy/first_clipfrac"] == 0
    assert metrics["policy/clipfrac"] > 0.01  # clipping is active in later steps


@pytest.mark.slow
@pytest.mark.parametrize("aggregation", [BY_TOKEN, BY_SEQUENCE])
def test_micro_batches_and_chunks_change_nothing(aggregation):
    one, metrics = run(aggregation=aggregation, micro_batches=1)
    many, same = run(aggregation=aggregation, micro_batches=4)
    close(one, many)
    if aggregation is BY_TOKEN:
        close(one, run(chunk=5)[0])
    for name in ("loss/total", "policy/approx_kl", "policy/ratio_max"):
        np.testing.assert_allclose(metrics[name], same[name], rtol=1e-4, atol=1e-6)
    if aggregation is BY_TOKEN:
        with pytest.raises(AssertionError):
            close(one, run(key=3)[0])  # a different shuffle does change them


@pytest.mark.slow
def test_more_padding_changes_nothing():
    experience = small_problem()[3]
    wider = {
        name: jnp.pad(getattr(experience, name), ((0, 0), (2, 3))) for name in ("tokens", "mask")
    }
    for name in ("response_mask", "value_mask", "logprobs", "values", "advantages", "returns"):
        wider[name] = jnp.pad(getattr(experience, name), ((0, 0), (0, 3)))
    close(run()[0], run(experience=experience.replace(**wider))[0])


def test_each_epoch_has_every_row_once_in_a_new_order():
    order = shuffled_minibatches(jax.random.key(0), 12, epochs=3, minibatches=4).reshape(3, 12)
    for epoch in order:
        assert sorted(epoch.tolist()) == list(range(12))
    assert len({tuple(epoch.tolist()) for epoch in order}) == 3
    assert (
        shuffled_minibatches(jax.random.key(1), 12, epochs=3, minibatches=4).reshape(3, 12) != order
    ).any()


@pytest.mark.slow
def test_target_kl_stops_an_update():
    _, free = run(tx=optax.sgd(1.0), epochs=4)
    _, limited = run(tx=optax.sgd(1.0), epochs=4, target_kl=1e-4)
    assert free["optimizer/stopped"] == 0 and free["optimizer/steps"] == 8
    assert limited["optimizer/stopped"] == 1 and 0 < limited["optimizer/steps"] < 8


def test_steps_with_non_finite_gradients_are_skipped_and_counted():
    params, experience = small_problem()[2:]
    bad = experience.replace(advantages=experience.advantages.at[0, 0].set(jnp.inf))
    state, metrics = run(experience=bad, minibatches=1, skip_nonfinite=True)
    assert metrics["optimizer/skipped"] == 2 and metrics["optimizer/steps"] == 0
    jax.tree.map(np.testing.assert_array_equal, state.params, params)


@pytest.mark.slow
def test_non_finite_parameters_are_reported():
    _, metrics = run(
        tx=optax.adamw(3e38, weight_decay=1e3), epochs=1, minibatches=1, skip_nonfinite=True
    )
    assert (
        metrics["optimizer/finite"] == 0
        and metrics["optimizer/skipped"] == 0
        and jnp.isfinite(metrics["optimizer/grad_norm"])
    )
    assert run()[1]["optimizer/finite"] == 1


@pytest.mark.slow
def test_eight_devices_by_pmap_equal_one():
    model, critic, params, experience = small_problem()
    loss_fn = ppo_loss_fn(model, critic, *LOSS, temperature=0.7)
    state = TrainState.create(apply_fn=None, params=params, tx=optax.sgd(0.05))
    spread = jax.tree.map(lambda x: x.reshape(8, -1, *x.shape[1:]), experience)
    update = jax.pmap(
        functools.partial(ppo_update, loss_fn=loss_fn, epochs=2, minibatches=2, axis_name="data"),
        axis_name="data",
        in_axes=(None, 0, None),
    )
    many, metrics = update(state, spread, jax.random.key(2))
    one, same = run(micro_batches=1)
    close(one, jax.tree.map(lambda x: x[3], many))
    np.testing.assert_allclose(metrics["loss/total"][5], same["loss/total"], rtol=1e-4)
