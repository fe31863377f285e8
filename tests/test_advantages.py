"""Test `ppo_jax.ops.advantages` against numpy, rlax, GAE's limits and a TRL update."""

import json
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
import rlax
from helpers import assert_jit_and_vmap_agree

from ppo_jax.ops import kl, rewards
from ppo_jax.ops.advantages import generalized_advantage_estimation
from ppo_jax.ops.masked import masked_whiten

B, R = 6, 9
gae = jax.jit(generalized_advantage_estimation)  # γ and λ are traced, so each shape compiles once
GOLDEN = Path(__file__).parent / "golden" / "trl_one_update"
close = partial(np.testing.assert_allclose, rtol=2e-5, atol=2e-5)


@pytest.fixture(params=["full", "holes"])
def batch(request):
    rng = np.random.default_rng(len(request.param))
    mask = oracles.ragged_mask(rng, B, R, holes=request.param == "holes")
    mask = np.ones_like(mask) if request.param == "full" else mask
    mask[2] = request.param == "full"  # or a row without a real step
    return oracles.normal(rng, B, R), oracles.normal(rng, B, R), mask


def test_by_hand():
    """GAE of two real steps around a masked one equals the result worked out by hand.

    With γ = ½ and λ = ½:

    δ₂ = 4 - 2 = 2 = A₂;  δ₀ = 1 + ½·2 - 6 = -4;  A₀ = -4 + ¼·2 = -3.5;  G = A + V = 2.5, 4.
    """
    x = lambda *row: jnp.array([row], jnp.float32)
    advantages, returns = gae(
        x(1, 99, 4), x(6, 99, 2), jnp.array([[True, False, True]]), gamma=0.5, lam=0.5
    )
    np.testing.assert_array_equal(advantages, x(-3.5, 2, 2))
    np.testing.assert_array_equal(returns[:, ::2], x(2.5, 4))


@pytest.mark.parametrize("gamma", [1.0, 0.97, 0.0])
@pytest.mark.parametrize("lam", [1.0, 0.9, 0.0])
@pytest.mark.parametrize("bootstrap", [False, True])
def test_equals_the_numpy_oracle(batch, gamma, lam, bootstrap):
    r, v, mask = batch
    after = np.linspace(-1, 1, B, dtype=np.float32) if bootstrap else None
    advantages, returns = gae(r, v, mask, gamma=gamma, lam=lam, bootstrap_value=after)
    close(advantages, oracles.gae(r, v, mask, gamma, lam, after))
    close(returns, advantages + oracles.carried_values(v, mask, after))


def test_gamma_and_lambda_of_each_step(batch):
    """γ and λ may differ per step; γ = 0 at a step hides later rewards from earlier steps."""
    r, v, mask = batch
    rng = np.random.default_rng(3)
    gamma, lam = (
        (rng.random((B, R)) * (rng.random((B, R)) < 0.7)).astype(np.float32) for _ in range(2)
    )
    close(gae(r, v, mask, gamma=gamma, lam=lam)[0], oracles.gae(r, v, mask, gamma, lam))
    gamma[:, 4] = 0
    later = r.copy()
    later[:, 5:] += 10
    now, before = (gae(x, v, mask, gamma=gamma, lam=lam)[0] for x in (later, r))
    np.testing.assert_array_equal(np.where(mask, now, 0)[:, :5], np.where(mask, before, 0)[:, :5])


@pytest.mark.parametrize("gamma", [1.0, 0.9])
@pytest.mark.parametrize("lam", [1.0, 0.8, 0.0])
def test_equals_rlax(gamma, lam):
    rng = np.random.default_rng(4)
    r, v = oracles.normal(rng, B, R), oracles.normal(rng, B, R + 1)
    theirs = jax.vmap(partial(rlax.truncated_generalized_advantage_estimation, lambda_=lam))(
        r, np.full((B, R), gamma, np.float32), values=v
    )
    close(gae(r, v[:, :-1], gamma=gamma, lam=lam, bootstrap_value=v[:, -1])[0], theirs)


def real_steps(x, mask):
    return [row[m] for row, m in zip(np.asarray(x), mask, strict=True)]


def test_lambda_0_is_the_td_error(batch):
    r, v, mask = batch
    advantages, _ = gae(r, v, mask, gamma=0.9, lam=0.0)
    for a, r_t, v_t in zip(*(real_steps(x, mask) for x in (advantages, r, v)), strict=True):
        close(a, r_t + 0.9 * np.append(v_t[1:], 0) - v_t)


def test_lambda_1_is_the_return_minus_the_value(batch):
    r, v, mask = batch
    advantages, returns = gae(r, v, mask, gamma=1.0, lam=1.0)
    for a, g, r_t, v_t in zip(
        *(real_steps(x, mask) for x in (advantages, returns, r, v)), strict=True
    ):
        reward_to_go = np.cumsum(r_t[::-1])[::-1]
        close(a, reward_to_go - v_t)
        close(g, reward_to_go)


def test_linear_in_rewards(batch):
    r, v, mask = batch
    other = np.random.default_rng(5).normal(size=r.shape).astype(np.float32)
    of = lambda r, v: gae(r, v, mask, gamma=0.95, lam=0.9)[0]
    close(of(2 * r - 3 * other, v), of(r, v) + of(r - 3 * other, 0 * v))


def test_true_values_leave_no_advantage(batch):
    """If the values are the true returns to go, every advantage is 0 for any λ."""
    r, _, mask = batch
    v = oracles.gae(r, 0 * r, mask, 0.9, 1.0).astype(np.float32)
    advantages, _ = gae(r, v, mask, gamma=0.9, lam=0.7)
    np.testing.assert_allclose(np.where(mask, advantages, 0), 0, atol=1e-5)


def test_bootstrap_follows_the_last_real_step(batch):
    """`bootstrap_value` follows the last real step of a row, even if padding stands between."""
    r, v, mask = batch
    after = np.full(B, 5, np.float32)
    with_value, without = (
        gae(r, v, mask, gamma=0.9, lam=0.0, bootstrap_value=x)[0] for x in (after, None)
    )
    last = np.array([max(np.flatnonzero(row), default=-1) for row in mask])
    expected = (np.arange(R) == last[:, None]) * 4.5
    close(np.where(mask, with_value - without, 0), expected)


def test_masked_steps_have_no_influence(batch):
    """Rewards and values of masked steps, even NaN, change no real step and no gradient."""
    r, v, mask = batch
    weights = np.linspace(-1, 2, R, dtype=np.float32)[None]

    def total(r, v):
        advantages, returns = gae(r, v, mask, gamma=0.9, lam=0.8)
        return jnp.sum(jnp.where(mask, (advantages + 2 * returns) * weights, 0))

    run = jax.jit(jax.value_and_grad(total, argnums=(0, 1)))
    clean = run(*(np.where(mask, x, np.float32(0)) for x in (r, v)))
    for filler in (1e6, np.nan):
        now = run(*(np.where(mask, x, np.float32(filler)) for x in (r, v)))
        jax.tree.map(np.testing.assert_array_equal, now, clean)
    for gradient in clean[1]:
        np.testing.assert_array_equal(np.asarray(gradient)[~mask], 0)


def test_any_rank_jit_and_vmap(batch):
    r, v, mask = batch
    assert_jit_and_vmap_agree(partial(generalized_advantage_estimation, gamma=0.9, lam=0.8), *batch)
    rows = [gae(*row, gamma=0.9, lam=0.8) for row in zip(r, v, mask, strict=True)]  # `[R]`
    stacked = gae(*(x[None] for x in (r, v, mask)), gamma=0.9, lam=0.8)  # `[1, B, R]`
    for k in range(2):
        close(stacked[k][0], [row[k] for row in rows])


def test_no_mask_is_a_full_mask():
    r = oracles.normal(np.random.default_rng(0), B, R)
    jax.tree.map(
        np.testing.assert_array_equal,
        gae(r, r, gamma=0.9, lam=0.8),
        gae(r, r, np.ones((B, R), bool), gamma=0.9, lam=0.8),
    )


@pytest.mark.parametrize(
    "argument, bad", [("values", (B, 1)), ("mask", (B, R - 1)), ("bootstrap_value", (1,))]
)
def test_shapes_must_match(argument, bad):
    good = {"rewards": jnp.ones((B, R)), "values": jnp.ones((B, R)), "mask": jnp.ones((B, R), bool)}
    with pytest.raises(AssertionError):
        gae(
            **good | {argument: jnp.ones(bad, bool if argument == "mask" else float)},
            gamma=1.0,
            lam=1.0,
        )


@pytest.fixture(scope="module")
def trl():
    with np.load(GOLDEN / "step.npz") as step:
        return dict(step), json.loads((GOLDEN / "meta.json").read_text())["config"]


def test_trl_update(trl):
    """TRL's log-probs, values and scores give its rewards, returns and whitened advantages."""
    step, config = trl
    mask = ~step["padding_mask"]
    token_rewards, steps = rewards.token_rewards(
        step["scores"],
        kl.kl_k1(step["logprobs"], step["ref_logprobs"]),
        mask,
        kl_coef=config["kl_coef"],
        score_at=rewards.ScoreAt.AFTER_LAST_TOKEN,
    )
    np.testing.assert_array_equal(steps, ~step["padding_mask_p1"])
    np.testing.assert_allclose(token_rewards, step["rewards"], atol=1e-5)

    advantages, returns = gae(
        token_rewards, step["values"], steps, gamma=config["gamma"], lam=config["gae_lambda"]
    )
    np.testing.assert_allclose(
        np.where(steps, returns, 0), np.where(steps, step["returns"], 0), atol=1e-5
    )
    white = masked_whiten(
        advantages, mask, unbiased=True
    )  # over the real tokens only: the step after them does not count
    np.testing.assert_allclose(white, step["advantages"], atol=1e-5)


def test_a_masked_step_takes_value_and_advantage_of_the_next_real_one():
    rewards, values = jnp.array([[0.0, 0.0, 0.0, 1.0]]), jnp.array([[0.5, 0.9, 0.3, 0.7]])
    mask = jnp.array([[True, False, True, False]])
    advantages, returns = generalized_advantage_estimation(
        rewards, values, mask, gamma=1.0, lam=1.0
    )
    np.testing.assert_allclose(advantages[0, 1], advantages[0, 2])
    np.testing.assert_allclose(returns[0, 1], advantages[0, 2] + 0.3, rtol=1e-6)
    broken = jnp.where(mask, values, jnp.nan), jnp.where(mask, rewards, jnp.nan)
    assert np.isfinite(
        generalized_advantage_estimation(broken[1], broken[0], mask, gamma=1.0, lam=1.0)[1]
    ).all()


def test_bfloat16_values_are_computed_in_float32():
    out = generalized_advantage_estimation(
        jnp.ones((1, 3)), jnp.ones((1, 3), jnp.bfloat16), gamma=0.99, lam=0.95
    )
    assert {x.dtype for x in out} == {jnp.dtype("float32")}
