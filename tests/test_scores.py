"""Test scores of responses and the entropy controller, beside what test_peers compares."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import on_devices

from ppo_jax.ops.entropy_control import adaptive_entropy
from ppo_jax.ops.scores import (
    informative,
    least_score,
    mean_score,
    overlong_penalty,
    uncertainty_weighted_score,
    weighted_score,
)


def test_overlong_penalty_grows_over_the_buffer():
    mask = jnp.arange(12)[None, :] < jnp.arange(1, 13)[:, None]
    excess = np.maximum(np.arange(1, 13) - 6, 0)
    ours = overlong_penalty(mask, max_length=10, buffer=4, weight=2.0)
    np.testing.assert_allclose(ours, -2 * np.minimum(excess / 4, 1))
    with pytest.raises(ValueError, match="buffer=0 must lie in"):
        overlong_penalty(mask, max_length=10, buffer=0)


def test_informative_groups_over_devices():
    rng = np.random.default_rng(0)
    groups = rng.permutation(np.repeat(np.arange(8), 2)).astype(np.int32)
    scores = np.where(groups < 4, groups * 0.1, rng.random(16)).astype(np.float32)
    mask = groups != 5
    expected = (groups >= 4) & mask
    np.testing.assert_array_equal(informative(scores, groups, mask), expected)
    mapped = lambda *arrays: informative(*arrays, axis_name="devices")
    sharded = jax.jit(lambda *arrays: on_devices("shard_map", mapped, *arrays))
    np.testing.assert_array_equal(sharded(scores, groups, mask).ravel(), expected)
    assert not informative(jnp.ones(1), jnp.zeros(1, int)).any()


def test_ensembles():
    scores = np.random.default_rng(0).normal(size=(4, 7)).astype(np.float32)
    np.testing.assert_allclose(mean_score(scores), scores.mean(axis=0), rtol=1e-5)
    np.testing.assert_array_equal(least_score(scores), scores.min(axis=0))
    expected = scores.mean(axis=0) - 0.3 * scores.var(axis=0, ddof=1)
    np.testing.assert_allclose(
        uncertainty_weighted_score(scores, coef=0.3), expected, rtol=1e-5, atol=1e-6
    )
    with pytest.raises(ValueError, match="at least 2 reward models"):
        uncertainty_weighted_score(scores[:1], coef=0.3)


def test_parts_need_their_weights():
    nan = np.nan
    parts = {"a": jnp.array([1.0, nan, nan]), "b": jnp.array([2.0, 4.0, nan])}
    np.testing.assert_array_equal(weighted_score(parts, {"b": 0.5, "a": 3.0}), [4.0, 2.0, nan])
    with pytest.raises(ValueError, match="must agree"):
        weighted_score(parts, {"a": 1.0})


def test_entropy_is_kept_near_its_target():
    controller = adaptive_entropy(0.1, target=1.0, step=0.25, least=0.0, most=0.5)
    state, seen = controller.init(), []
    for entropy in (0.5, 0.5, 2.0, np.nan, 2.0, 2.0, 0.9):
        state = controller.update(state, jnp.float32(entropy))
        seen.append((float(state.coef), float(state.weight)))
    expected = [(0.35, 0.35), (0.5, 0.5), (0.25, 0), (0.25, 0), (0, 0), (0, 0), (0.25, 0.25)]
    np.testing.assert_allclose(seen, expected, rtol=1e-6)
    with pytest.raises(ValueError, match="needs a positive step"):
        adaptive_entropy(0.1, target=1.0, step=0.0)
    with pytest.raises(ValueError, match="least <= init_coef <= most"):
        adaptive_entropy(0.1, target=1.0, most=0.05)
