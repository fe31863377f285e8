"""Test everything that takes an `axis_name`: 8 shards give the value and gradient of one batch."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracles
import pytest
from flax.training.train_state import TrainState
from helpers import MAPPINGS, axis_of, on_devices

from ppo_jax.ops import masked
from ppo_jax.ops.aggregation import TOKEN_SUM, constant_length
from ppo_jax.ops.masked import BY_SEQUENCE, BY_TOKEN
from ppo_jax.ops.metrics import experience_metrics, explained_variance
from ppo_jax.ops.rewards import running_scale
from ppo_jax.ppo.estimators import gae
from ppo_jax.ppo.gradients import minibatch_gradient
from ppo_jax.ppo.scoring import make_experience
from ppo_jax.ppo.update import ppo_update, shuffled_minibatches
from ppo_jax.types import Experience, LossMetrics, Rollout, Scores

B, R = 16, 5
close = partial(np.testing.assert_allclose, rtol=2e-5, atol=2e-5)


@pytest.fixture
def batch():
    """Return `x [B, R]` and a mask; the first shard has no real token and the second no padding."""
    rng = np.random.default_rng(0)
    mask = oracles.ragged_mask(rng, B, R)
    mask[:2], mask[2:4] = False, True
    return oracles.normal(rng, B, R) + 2, mask


def experience_of(x, mask) -> tuple[Rollout, Scores, Experience, jax.Array]:
    rollout = Rollout(
        jnp.ones((len(x), R + 2), int), jnp.ones((len(x), R + 2), bool), mask, x, mask[:, 0]
    )
    scores = Scores(x, x / 2, x / 2, abs(x), x * x)
    return rollout, scores, jnp.where(mask, x, 0).sum(axis=1)


def made_experience(x, mask, axis_name=None):
    """Return every float array of an experience with whitened rewards and advantages."""
    rollout, scores, task_scores = experience_of(x, mask)
    experience, rewards = make_experience(
        rollout,
        scores,
        task_scores,
        kl_coef=0.1,
        advantage_fn=gae(gamma=0.9, lam=0.8),
        whiten_rewards=True,
        axis_name=axis_name,
    )
    return experience.advantages, experience.returns, rewards


def batch_metrics(x, mask, axis_name=None):
    rollout, scores, task_scores = experience_of(x, mask)
    arrays = (rollout.tokens, rollout.mask, mask, mask, x, x, x, x * x)
    return experience_metrics(
        rollout, scores, Experience(*arrays), x, task_scores, axis_name=axis_name
    )


# Functions of `x [B, R]` and a mask. Those of WHOLE return numbers that all shards hold, and those
# of ROWS arrays of the rows.
WHOLE = {
    "masked_sum": masked.masked_sum,
    "masked_mean": masked.masked_mean,
    "masked_var": masked.masked_var,
    "masked_var_unbiased": partial(masked.masked_var, unbiased=True),
    "explained_variance": lambda x, m, axis_name=None: explained_variance(
        x, x**2, m, axis_name=axis_name
    ),
    "running_scale_state": lambda x, m, axis_name=None: running_scale().update(
        running_scale().init(), x[:, 0], axis_name=axis_name
    )[0],
    "experience_metrics": batch_metrics,
}
ROWS = {
    "masked_whiten": masked.masked_whiten,
    "masked_whiten_keep_mean": partial(masked.masked_whiten, shift_mean=False, unbiased=True),
    "running_scale": lambda x, m, axis_name=None: running_scale().update(
        running_scale().init(), x[:, 0], axis_name=axis_name
    )[1],
    "make_experience": made_experience,
}


def weighted(tree):
    """Return a number that depends on every entry of a tree with another weight."""
    return sum(
        jnp.sum(jnp.cos(jnp.arange(x.size).reshape(x.shape)) * x) for x in jax.tree.leaves(tree)
    )


@pytest.mark.parametrize("how", MAPPINGS)
@pytest.mark.parametrize("name", WHOLE)
def test_whole_values_and_gradients(batch, how, name):
    function = WHOLE[name]
    loss = lambda x, m, axis_name=None: weighted(function(x, m, axis_name=axis_name))
    value, slope = function(*batch), jax.grad(loss)(*batch)
    mapped = partial(function, axis_name=axis_of(how))
    pieces = on_devices(how, mapped, *batch)
    jax.tree.map(lambda piece, x: close(piece, np.full(8, x)), pieces, value)
    slopes = on_devices(how, jax.grad(partial(loss, axis_name=axis_of(how))), *batch)
    close(slopes.reshape(slope.shape), slope)


@pytest.mark.parametrize("how", MAPPINGS)
@pytest.mark.parametrize("name", ROWS)
def test_values_and_gradients_of_rows(batch, how, name):
    function = ROWS[name]
    value = function(*batch)
    pieces = on_devices(how, partial(function, axis_name=axis_of(how)), *batch)
    jax.tree.map(lambda piece, x: close(piece.reshape(x.shape), x), pieces, value)
    weights = jax.tree.map(lambda x: np.cos(np.arange(x.size)).reshape(x.shape), value)

    def loss(x, m, weights, axis_name=None):
        out = function(x, m, axis_name=axis_name)
        return sum(jax.tree.leaves(jax.tree.map(lambda a, w: jnp.sum(a * w), out, weights)))

    slope = jax.grad(loss)(*batch, weights)
    leaves, tree = jax.tree.flatten(weights)
    mapped = lambda x, m, *leaves: jax.grad(partial(loss, axis_name=axis_of(how)))(
        x, m, jax.tree.unflatten(tree, leaves)
    )
    close(on_devices(how, mapped, *batch, *leaves).reshape(slope.shape), slope)


@pytest.mark.parametrize("how", MAPPINGS)
@pytest.mark.parametrize(
    "count",
    [masked.masked_count, masked.sequence_count, TOKEN_SUM.count, constant_length(7).count],
)
def test_counts(batch, how, count):
    mask = batch[1]
    close(on_devices(how, partial(count, axis_name=axis_of(how)), mask), np.full(8, count(mask)))


# --- the update ---


def squared_error(aggregation):
    """Return a loss of the parameter `w` whose gradient differs from row to row."""

    def loss_fn(params, batch, counts):
        error = (params["w"] * batch.values - batch.returns) ** 2
        loss = aggregation.mean(error, batch.response_mask, count=counts.policy)
        means = dict.fromkeys(("loss/total", "policy/approx_kl", "policy/clipfrac"), loss)
        return loss, LossMetrics(means, {"policy/ratio_error_max": jnp.max(error)})

    return loss_fn


def columns(batch):
    """Return the arrays of an `Experience`."""
    x, mask = batch
    tokens = np.ones((B, R + 2), np.int32)
    arrays = (tokens, tokens > 0, mask, mask, x, x, x, (x + 1) ** 2)
    return tuple(jnp.asarray(array) for array in arrays)


@pytest.mark.parametrize("how", MAPPINGS)
@pytest.mark.parametrize("micro_batches", [1, 2])
@pytest.mark.parametrize("aggregation", [BY_TOKEN, BY_SEQUENCE], ids=["token", "sequence"])
def test_minibatch_gradient(batch, how, micro_batches, aggregation):
    """The parameters are the same array on all devices, as in a training loop."""

    def gradient(*arrays, axis_name=None):
        params = {"w": jnp.float32(0.5)}
        options = {"micro_batches": micro_batches, "aggregation": aggregation}
        return minibatch_gradient(
            squared_error(aggregation), params, Experience(*arrays), axis_name, **options
        )

    whole = gradient(*columns(batch))
    pieces = on_devices(how, partial(gradient, axis_name=axis_of(how)), *columns(batch))
    jax.tree.map(lambda piece, x: close(piece, np.full(8, x), rtol=1e-4), pieces, whole)


@pytest.mark.parametrize("how", MAPPINGS)
@pytest.mark.parametrize("options", [{}, {"target_kl": 1e3, "skip_nonfinite": True}], ids=str)
def test_ppo_update(batch, how, options):
    """Several steps of momentum reach the same parameter and report the same metrics."""

    def update(*arrays, axis_name=None):
        state = TrainState.create(
            apply_fn=None, params={"w": jnp.float32(0.5)}, tx=optax.sgd(1e-3, momentum=0.9)
        )
        settings = {"epochs": 2, "minibatches": 2, "axis_name": axis_name, **options}
        state, metrics = ppo_update(
            state,
            Experience(*arrays),
            jax.random.key(0),
            loss_fn=squared_error(BY_TOKEN),
            **settings,
        )
        return state.params["w"], metrics

    whole = update(*columns(batch))
    assert abs(whole[0] - 0.5) > 0.01
    pieces = on_devices(how, partial(update, axis_name=axis_of(how)), *columns(batch))
    jax.tree.map(lambda piece, x: close(piece, np.full(8, x), rtol=1e-4), pieces, whole)


@pytest.mark.parametrize("how", MAPPINGS)
def test_shuffled_minibatches(how):
    """The shares of the devices, side by side, are the minibatches of one device."""
    draw = partial(shuffled_minibatches, jax.random.key(0), B, epochs=2, minibatches=2)
    shares = on_devices(how, lambda _: draw(axis_name=axis_of(how)), np.zeros(8))
    np.testing.assert_array_equal(np.concatenate(shares, axis=1), draw())
