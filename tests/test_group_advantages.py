"""Test the advantages of groups and of the whole batch against numpy, and over devices."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from helpers import on_devices

from ppo_jax.ops.advantages import (
    decoupled_gae,
    discounted_returns,
    generalized_advantage_estimation,
    length_adaptive_lambda,
)
from ppo_jax.ops.baselines import (
    batch_mean_advantages,
    evpo_advantages,
    reinforce_plus_plus_advantages,
)
from ppo_jax.ops.group_advantages import (
    dr_grpo_advantages,
    grpo_advantages,
    maxrl_advantages,
    rloo_advantages,
)
from ppo_jax.ops.masked import masked_whiten
from ppo_jax.ops.scores import informative

B, R = 16, 5
close = partial(np.testing.assert_allclose, rtol=2e-5, atol=2e-6)
GROUPED = {
    grpo_advantages: lambda own, group: (own - group.mean()) / (group.std(ddof=1) + 1e-6),
    dr_grpo_advantages: lambda own, group: own - group.mean(),
    rloo_advantages: lambda own, group: own - (group.sum() - own) / (len(group) - 1),
    maxrl_advantages: lambda own, group: own / group.mean() - 1 if group.mean() > 0 else 0,
}


@pytest.fixture
def batch():
    """Return `rewards, mask, groups`: an equal group, a row alone, and rows without a token."""
    rng = np.random.default_rng(0)
    mask = oracles.ragged_mask(rng, B, R, holes=True)
    mask[:, 0] = True
    mask[[3, 8]] = False
    groups = rng.permutation([*np.repeat([4, -1, 7], 5), 9]).astype(np.int32)
    rewards = np.where(mask, np.abs(oracles.normal(rng, B, R)), 7).astype(np.float32)
    rewards[groups == 7] = np.where(np.arange(R) == 0, 0.1, 0)
    return rewards, mask, groups


@pytest.mark.parametrize("function", GROUPED)
def test_advantages_of_groups(batch, function):
    rewards, mask, groups = batch
    scores, real = np.where(mask, rewards, 0).sum(axis=1, dtype=np.float64), mask.any(axis=1)
    expected = np.zeros((B, R))
    for b in np.flatnonzero(real):
        group = scores[(groups == groups[b]) & real]
        if np.ptp(group) > 1e-9:
            expected[b] = np.where(mask[b], GROUPED[function](scores[b], group), 0)
    advantages, returns = jax.jit(function)(*batch)
    close(advantages, expected)
    np.testing.assert_array_equal(np.asarray(advantages)[expected == 0], 0)
    kept = np.where(mask, rewards, 0)
    close(returns, np.where(mask, np.cumsum(kept[:, ::-1], axis=1)[:, ::-1], 0))


def test_equal_scores_have_no_advantage():
    """The mean of equal numbers is rounded; the difference must not be scaled up."""
    rewards, mask = jnp.full((7, 1), 0.1), jnp.ones((7, 1), bool)
    for function in map(jax.jit, GROUPED):
        np.testing.assert_array_equal(function(rewards, mask, jnp.zeros(7, int))[0], 0)


@pytest.mark.parametrize("function", GROUPED)
def test_scores_that_are_equal_up_to_rounding_have_no_advantage(function):
    """Seven rewards of 0.1 add up to another float than one of 0.7."""
    rewards = jnp.full((4, 7), 0.1).at[1].set(jnp.array([0.7, *[0] * 6]))
    assert len(set(np.asarray(rewards.sum(axis=1)).tolist())) == 2
    rewards = rewards.at[2].set(0.1 + 1e-5)
    mask, groups = jnp.ones((4, 7), bool), jnp.array([0, 0, 1, 1])
    advantages, _ = function(rewards, mask, groups)
    np.testing.assert_array_equal(advantages[:2], 0)
    assert np.all(np.asarray(advantages)[2] > 0) and np.all(np.asarray(advantages)[3] < 0)


def test_an_infinite_score_is_equal_to_no_other():
    scores, mask = jnp.array([jnp.inf, 1.0, jnp.inf, jnp.inf]), jnp.ones(4, bool)
    found = informative(scores, jnp.array([0, 0, 1, 1]))
    np.testing.assert_array_equal(found, [True, True, False, False])
    white = masked_whiten(scores, mask)
    assert not np.isfinite(white).any()  # so that the fault is seen


def test_whitened_returns(batch):
    rewards, mask, groups = batch
    returns = oracles.gae(rewards, np.zeros((B, R)), mask, 0.9, 1.0)
    ours = reinforce_plus_plus_advantages(rewards, mask, gamma=0.9)
    close(ours[0], oracles.whiten(returns, mask, unbiased=True))
    close(ours[1], np.where(mask, returns, 0))
    raw = np.asarray(dr_grpo_advantages(*batch)[0])
    ours = reinforce_plus_plus_advantages(rewards, mask, groups, unbiased=False)
    close(ours[0], oracles.whiten(raw, mask))


def test_batch_mean(batch):
    rewards, mask, _ = batch
    scores, real = np.where(mask, rewards, 0).sum(axis=1), mask.any(axis=1)
    expected = np.where(mask, (scores - scores[real].mean())[:, None], 0)
    close(batch_mean_advantages(rewards, mask)[0], expected)


@pytest.mark.parametrize("noise, critic_helps", [(0.1, True), (10.0, False)])
def test_the_critic_is_used_while_it_explains_variance(batch, noise, critic_helps):
    rewards, mask, _ = batch
    returns = discounted_returns(rewards, mask, gamma=0.9)
    values = returns + noise * oracles.normal(np.random.default_rng(1), B, R)
    ours = evpo_advantages(rewards, values, mask, gamma=0.9, lam=0.8)
    estimates = generalized_advantage_estimation(rewards, values, mask, gamma=0.9, lam=0.8)
    with_critic, targets = (np.where(mask, x, 0) for x in estimates)
    close(ours[0], with_critic if critic_helps else batch_mean_advantages(rewards, mask)[0])
    close(ours[1], targets)


def test_length_adaptive_lambda_in_the_test_case_of_slime():
    """The first advantage is λ⁹ with λ = 1 - 1 / 15."""
    mask, zeros = jnp.ones((1, 10), bool), jnp.zeros((1, 10))
    lam = length_adaptive_lambda(mask, alpha=1.5)
    advantages, returns = decoupled_gae(
        zeros.at[0, -1].set(1), zeros, mask, gamma=1.0, lam_policy=lam
    )
    np.testing.assert_allclose(advantages[0, 0], 0.53744124, rtol=1e-6)
    np.testing.assert_array_equal(returns, 1)


def test_each_lambda_has_its_own_part(batch):
    rewards, mask, _ = batch
    values = oracles.normal(np.random.default_rng(1), B, R)
    lam = length_adaptive_lambda(mask, alpha=0.7)
    length = mask.sum(axis=1, keepdims=True)
    expected = np.maximum(1 - 1 / (0.7 * np.maximum(length, 1e-9)), 0)
    close(lam, expected)
    ours = decoupled_gae(rewards, values, mask, gamma=0.9, lam_policy=lam, lam_value=0.8)
    close(ours[0], oracles.gae(rewards, values, mask, 0.9, expected))
    carried = oracles.carried_values(values, mask)
    close(ours[1], oracles.gae(rewards, values, mask, 0.9, 0.8) + carried)


# Every method as a function of `rewards, values, mask, groups`.
ALL = {
    **{
        f.__name__: lambda r, v, m, g, axis_name=None, f=f: f(r, m, g, axis_name=axis_name)
        for f in (*GROUPED, reinforce_plus_plus_advantages)
    },
    "batch_mean": lambda r, v, m, g, **axis: batch_mean_advantages(r, m, **axis),
    "evpo": lambda r, v, m, g, **axis: evpo_advantages(r, v, m, gamma=0.9, lam=0.8, **axis),
}


def every(*arrays, **axis):
    return {name: f(*arrays, **axis) for name, f in ALL.items()}


@pytest.mark.parametrize("how", ["vmap", "pmap", "shard_map"])
def test_groups_split_over_devices(batch, how):
    rewards, mask, groups = batch
    arrays = (rewards, rewards * 9, mask, groups)
    sharded = jax.jit(partial(on_devices, how, partial(every, axis_name="devices")))
    jax.tree.map(
        lambda piece, x: close(piece.reshape(x.shape), x),
        sharded(*arrays),
        jax.jit(every)(*arrays),
    )


def test_responses_without_a_position_have_no_advantages():
    empty, mask = jnp.zeros((2, 0)), jnp.zeros((2, 0), bool)
    for advantages, returns in every(empty, empty, mask, jnp.zeros(2, int)).values():
        assert advantages.shape == returns.shape == (2, 0)


def test_integer_rewards_count_as_floats(batch):
    _, mask, groups = batch
    rewards = np.arange(B * R).reshape(B, R) % 4
    now, expected = (every(x, x, mask, groups) for x in (rewards, rewards.astype(np.float32)))
    jax.tree.map(np.testing.assert_array_equal, now, expected)


def test_a_mask_or_groups_of_another_type_are_named(batch):
    rewards, mask, groups = batch
    for name, function in ALL.items():
        with pytest.raises(AssertionError, match=r"^mask must be of type bool, but is of int32\.$"):
            function(rewards, rewards, mask.astype(np.int32), groups)
        if name in {f.__name__ for f in GROUPED}:
            with pytest.raises(AssertionError, match=r"^groups must be of type int, but is of fl"):
                function(rewards, rewards, mask, groups.astype(np.float32))


def test_masked_entries_have_no_influence(batch):
    rewards, mask, groups = batch
    hidden = np.where(mask, rewards, np.nan)
    run = jax.jit(every)
    plain = run(rewards, rewards, mask, groups)
    jax.tree.map(np.testing.assert_array_equal, plain, run(hidden, hidden, mask, groups))
