"""Test the choice of tokens by their rank in the batch against numpy, and over devices."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from helpers import assert_mask_hides, on_devices

from ppo_jax.ops.masked import masked_mean
from ppo_jax.ops.selection import clip_cov_mask, covariances, kl_cov_loss, m2po_mask

B, R = 16, 6
close = partial(np.testing.assert_allclose, rtol=2e-5, atol=2e-6)
CLIPS = {"clip_low": 0.2, "clip_high": 0.2}


@pytest.fixture
def batch():
    rng = np.random.default_rng(0)
    mask = oracles.ragged_mask(rng, B, R, holes=True)
    mask[:2] = False
    old = -np.abs(oracles.normal(rng, B, R))
    return old + oracles.normal(rng, B, R) / 3, old, oracles.normal(rng, B, R), mask


def covariance_of(new, advantages, mask) -> np.ndarray:
    centred = [np.float64(x) - oracles.mean(x, mask) for x in (new, advantages)]
    return np.where(mask, centred[0] * centred[1], -np.inf)


@pytest.mark.parametrize("threshold", [0.01, 0.05, 10.0, 0.0])
def test_m2po_drops_as_few_tokens_as_possible(batch, threshold):
    new, old, _, mask = batch
    squares = np.sort((np.float64(new) - np.float64(old))[mask] ** 2)
    means = np.cumsum(squares) / np.arange(1, len(squares) + 1)
    kept = np.asarray(m2po_mask(new, old, mask, threshold=threshold))
    number = max(int((means < threshold).sum()), 1)
    assert kept.sum() == number and not (kept & ~mask).any()
    close(np.sort((new - old)[kept] ** 2), squares[:number])


def test_covariances(batch):
    new, _, advantages, mask = batch
    close(covariances(new, advantages, mask), covariance_of(new, advantages, mask))


def test_kl_cov_holds_the_tokens_with_the_largest_covariance(batch):
    new, old, advantages, mask = batch
    covariance = covariance_of(new, advantages, mask)
    number = int(0.2 * mask.sum())
    held = covariance >= np.sort(covariance[mask])[-number]
    change = np.float64(new) - old
    terms = 0.5 * np.abs(change) * held - np.exp(change) * advantages
    slopes = 0.5 * np.sign(change) * held - np.exp(change) * advantages
    value, slope = jax.value_and_grad(kl_cov_loss)(*batch, part=0.2, coef=0.5)
    close(value, oracles.mean(terms, mask))
    close(slope, np.where(mask, slopes, 0) / mask.sum())


def test_clip_cov_drops_random_candidates(batch):
    new, old, advantages, mask = batch
    covariance, ratio = covariance_of(new, advantages, mask), np.exp(new - old)
    clipped = np.where(advantages > 0, ratio > 1.2, ratio < 0.8)
    candidates = mask & ~clipped & (covariance > 0.1) & (covariance < 5.0)
    run = jax.jit(lambda key: clip_cov_mask(key, *batch, **CLIPS, part=0.05, least=0.1))
    dropped = [mask & ~np.asarray(run(jax.random.key(seed))) for seed in range(3)]
    assert all(x.sum() == int(0.05 * mask.sum()) < candidates.sum() for x in dropped)
    assert not (np.any(dropped, axis=0) & ~candidates).any()
    assert (dropped[0] != dropped[1]).any()


def every(new, old, advantages, mask, axis_name=None):
    axis, key = {"axis_name": axis_name}, jax.random.key(1)
    aggregate = partial(masked_mean, axis_name=axis_name)
    return {
        "m2po": m2po_mask(new, old, mask, **axis),
        "covariances": jnp.where(mask, covariances(new, advantages, mask, **axis), 0),
        "clip_cov": clip_cov_mask(
            key, new, old, advantages, mask, **CLIPS, part=0.1, least=0.1, **axis
        ),
        "kl_cov": jnp.broadcast_to(
            kl_cov_loss(new, old, advantages, mask, part=0.1, aggregate=aggregate, **axis),
            mask.shape,
        ),
    }


@pytest.mark.parametrize("how", ["vmap", "pmap", "shard_map"])
def test_ranks_over_devices(batch, how):
    sharded = jax.jit(partial(on_devices, how, partial(every, axis_name="devices")))
    jax.tree.map(
        lambda piece, x: close(piece.reshape(x.shape), x), sharded(*batch), jax.jit(every)(*batch)
    )


def test_masked_entries_have_no_influence(batch):
    *arrays, mask = batch
    assert_mask_hides(lambda *x: kl_cov_loss(*x, mask, part=0.2), tuple(arrays), mask)
    hidden = [np.where(mask, x, np.nan) for x in arrays]
    run = jax.jit(every)
    jax.tree.map(np.testing.assert_array_equal, run(*hidden, mask), run(*batch))
