"""Test importance weights and masks against numpy."""

from functools import partial

import jax
import numpy as np
import oracles
import pytest

from ppo_jax.ops.importance import (
    Level,
    bounded_weights,
    importance_mask,
    importance_weights,
    truncated_weights,
)

B, R = 12, 6
close = partial(np.testing.assert_allclose, rtol=2e-5)


@pytest.fixture
def batch():
    rng = np.random.default_rng(0)
    mask = oracles.ragged_mask(rng, B, R, holes=True)
    mask[3] = False
    sampler = -np.abs(oracles.normal(rng, B, R))
    return sampler + oracles.normal(rng, B, R) / 3, sampler, mask


def weights_of(new, sampler, mask, level) -> np.ndarray:
    out = np.zeros((B, R))
    for b in np.flatnonzero(mask.any(axis=1)):
        logs = np.float64(new[b, mask[b]]) - np.float64(sampler[b, mask[b]])
        power = {Level.TOKEN: logs, Level.SEQUENCE: logs.sum(), Level.GEOMETRIC: logs.mean()}
        out[b, mask[b]] = np.exp(power[level])
    return out


@pytest.mark.parametrize("level", Level)
def test_weights_of_each_level(batch, level):
    mask = batch[-1]
    expected = weights_of(*batch, level)
    close(importance_weights(*batch, level=level), expected)
    for function in (truncated_weights, bounded_weights, importance_mask):
        by_member, by_name = (
            function(*batch, low=0.8, high=1.2, level=x) for x in (level, level.value)
        )
        np.testing.assert_array_equal(by_name, by_member)
    truncated = truncated_weights(*batch, level=level, low=0.8, high=1.2)
    close(truncated, np.where(mask, expected.clip(0.8, 1.2), 0))
    inside = (expected >= 0.8) & (expected <= 1.2)
    assert (inside & mask).any() and (~inside & mask).any()
    close(bounded_weights(*batch, level=level, low=0.8, high=1.2), np.where(inside, expected, 0))
    kept = importance_mask(*batch, level=level, low=0.8, high=1.2)
    np.testing.assert_array_equal(kept, inside & mask)
    whole = importance_mask(*batch, level=level, low=0.8, high=1.2, whole=True)
    np.testing.assert_array_equal(whole, mask & (inside | ~mask).all(axis=1, keepdims=True))


def test_an_unknown_level_is_refused(batch):
    with pytest.raises(ValueError, match="level must be one of token, sequence, geometric, but is"):
        importance_weights(*batch, level="response")


def test_weights_are_constants_and_ignore_masked_entries(batch):
    new, sampler, mask = batch
    weights = importance_weights(new, sampler, mask, level=Level.SEQUENCE)
    hidden = (np.where(mask, x, np.nan) for x in (new, sampler))
    np.testing.assert_array_equal(importance_weights(*hidden, mask, level=Level.SEQUENCE), weights)
    slope = jax.grad(lambda x: importance_weights(x, sampler, mask).sum())(new)
    np.testing.assert_array_equal(slope, 0)


def test_weights_are_bounded(batch):
    new, sampler, mask = batch
    far = importance_weights(new + 500, sampler, mask, level=Level.SEQUENCE)
    close(far, np.where(mask, np.exp(20.0), 0))
