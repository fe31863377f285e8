"""Test `ppo_jax.ops.rewards`: position and scaling of scores, KL penalty, missing end tokens."""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from helpers import assert_jit_and_vmap_agree

from ppo_jax.ops.rewards import (
    MissingEOS,
    ScoreAt,
    apply_missing_eos,
    running_scale,
    score_index,
    token_rewards,
)

B, R = 6, 5
close = partial(np.testing.assert_allclose, rtol=2e-5, atol=2e-6)


@pytest.fixture
def batch():
    rng = np.random.default_rng(0)
    mask = oracles.ragged_mask(rng, B, R, holes=True)
    mask[2] = False  # a row without real tokens
    return oracles.normal(rng, B), oracles.normal(rng, B, R), mask


# --- the position of the score ---


@pytest.mark.parametrize(
    "row, last, after",
    [
        ([1, 1, 0, 0], 1, 2),
        ([1, 1, 1, 1], 3, 3),  # full, so there is no index after the last token
        ([0, 0, 0, 0], 0, 0),  # empty, so the first index rather than -1
        ([1, 0, 1, 0], 2, 3),  # the last real token counts, not the number of them
        ([0, 0, 0, 1], 3, 3),
    ],
)
def test_score_index(row, last, after):
    mask = jnp.array([row, [1, 0, 0, 0]], bool)
    for score_at, expected in zip(ScoreAt, ([last, 0], [after, 1], [3, 3]), strict=True):
        index = score_index(mask, score_at)
        np.testing.assert_array_equal(index, expected)
        assert index.dtype == jnp.int32


@pytest.mark.parametrize("score_at", ScoreAt)
def test_score_index_equals_the_numpy_oracle(batch, score_at):
    mask = batch[-1]
    np.testing.assert_array_equal(
        score_index(mask, score_at), [oracles.score_index(row, score_at.value) for row in mask]
    )
    assert_jit_and_vmap_agree(partial(score_index, score_at=score_at), mask)


# --- token rewards ---


@pytest.mark.parametrize("score_at", ScoreAt)
@pytest.mark.parametrize("with_token_scores", [False, True])
def test_token_rewards_equal_the_numpy_oracle(batch, score_at, with_token_scores):
    scores, kl, mask = batch
    options = {"token_scores": kl[::-1].copy() if with_token_scores else None, "score_at": score_at}
    rewards, steps = token_rewards(scores, kl, mask, kl_coef=0.3, **options)
    close(
        rewards,
        oracles.token_rewards(
            scores, kl, mask, kl_coef=0.3, **options | {"score_at": score_at.value}
        ),
    )
    here = [oracles.score_index(row, score_at.value) for row in mask]
    scored = np.eye(R, dtype=bool)[here] & mask.any(axis=1, keepdims=True)
    np.testing.assert_array_equal(steps, mask | scored)
    assert_jit_and_vmap_agree(
        partial(token_rewards, kl_coef=0.3, score_at=score_at), scores, kl, mask
    )


@pytest.mark.parametrize("score_at", ScoreAt)
def test_rewards_sum_to_the_score_minus_the_penalty(batch, score_at):
    """At every position of the score, a response earns its score minus β times its KL."""
    scores, kl, mask = batch
    rewards, _ = token_rewards(scores, kl, mask, kl_coef=0.3, score_at=score_at)
    expected = scores - 0.3 * np.where(mask, kl, 0).sum(axis=1)
    close(rewards.sum(axis=1), np.where(mask.any(axis=1), expected, 0))


@pytest.mark.parametrize("score_at", ScoreAt)
def test_a_row_without_a_real_token_gets_nothing(score_at):
    mask = jnp.array([[True, False], [False, False]])
    rewards, steps = token_rewards(
        jnp.array([1.0, 5.0]), jnp.zeros((2, 2)), mask, kl_coef=0.1, score_at=score_at
    )
    assert rewards[0].sum() == 1
    np.testing.assert_array_equal(rewards[1], 0)
    np.testing.assert_array_equal(steps[1], False)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.int32])
def test_rewards_are_float32_for_scores_of_any_type(dtype):
    """Fractional scores are not truncated, and integer scores do not truncate the KL penalty."""
    scores = jnp.array([0.5, -0.25]).astype(dtype)
    rewards, _ = token_rewards(scores, jnp.full((2, 3), 0.125), jnp.ones((2, 3), bool), kl_coef=0.5)
    assert rewards.dtype == jnp.float32
    np.testing.assert_array_equal(rewards[:, -1], scores.astype(jnp.float32) - 0.0625)
    np.testing.assert_array_equal(rewards[:, 0], -0.0625)


def test_masked_entries_have_no_influence(batch):
    scores, kl, mask = batch
    of = lambda x: token_rewards(scores, x, mask, kl_coef=0.3, token_scores=x)[0]
    clean, dirty = (of(np.where(mask, kl, np.float32(x))) for x in (0, np.nan))
    np.testing.assert_array_equal(dirty, clean)
    slope = jax.grad(lambda x: of(x).sum())(np.where(mask, kl, np.float32(np.nan)))
    close(slope, mask * (1 - 0.3))


def test_the_coefficient_may_be_traced(batch):
    """An adaptive coefficient is an array, so a new value compiles nothing."""
    traces = []

    @jax.jit
    def of(coef):
        traces.append(coef)
        return token_rewards(*batch, kl_coef=coef)[0]

    for coef in (0.1, 0.7):
        close(of(jnp.float32(coef)), token_rewards(*batch, kl_coef=coef)[0])
    assert len(traces) == 1


@pytest.mark.parametrize("which, bad", [(0, (B, 1)), (1, (B, 1)), (2, (B, R + 1))])
def test_shapes_must_match(batch, which, bad):
    arrays = [jnp.ones(bad, x.dtype) if i == which else x for i, x in enumerate(batch)]
    with pytest.raises(AssertionError):
        token_rewards(*arrays, kl_coef=0.1)
    with pytest.raises(AssertionError):
        token_rewards(*batch, kl_coef=0.1, token_scores=jnp.ones((B, 1)))


@pytest.mark.parametrize("dtype", [np.float32, np.int32])
def test_masks_must_be_bool(batch, dtype):
    scores, kl, mask = batch
    with pytest.raises(AssertionError):
        token_rewards(scores, kl, mask.astype(dtype), kl_coef=0.1)
    with pytest.raises(AssertionError):
        score_index(mask.astype(dtype), ScoreAt.LAST_TOKEN)
    with pytest.raises(AssertionError):
        apply_missing_eos(scores, mask[:, 0].astype(dtype), rule=MissingEOS.REPLACE)


# --- missing EOS ---


@pytest.mark.parametrize(
    "rule, expected",
    [("KEEP", [2.5, -3.5]), ("PENALIZE", [2.5, -4.25]), ("REPLACE", [2.5, -0.75])],
    ids=str,
)
def test_missing_eos(rule, expected):
    of = partial(apply_missing_eos, rule=MissingEOS[rule], penalty=0.75)
    scores, ended = np.array([2.5, -3.5], np.float32), np.array([True, False])
    np.testing.assert_array_equal(of(scores, ended), expected)
    assert_jit_and_vmap_agree(of, scores, ended)
    with pytest.raises(AssertionError):
        of(scores, ended[:1])


# --- running scale ---


def scaled(batches, **options):
    scaling = running_scale(**options)
    state, out, update = scaling.init(), [], jax.jit(scaling.update)
    for batch in batches:
        state, now = update(state, jnp.asarray(batch, jnp.float32))
        out.append(now)
    return state, out


@pytest.mark.parametrize("offset", [0.0, 50.0])
def test_running_scale_equals_the_numpy_oracle(offset):
    """The batches have several sizes, one is constant, and some scores are not finite."""
    rng = np.random.default_rng(0)
    batches = [3 * oracles.normal(rng, n) + offset for n in (8, 3, 17, 1)] + [
        np.full(4, offset, np.float32)
    ]
    batches[1][1], batches[2][4] = np.nan, np.inf
    state, out = scaled(batches, eps=1e-4)
    for now, expected in zip(out, oracles.running_scale(batches, eps=1e-4), strict=True):
        close(now, expected, rtol=1e-4)
    seen = np.concatenate(batches)
    seen = seen[np.isfinite(seen)]
    close(state.count, len(seen))
    close(state.mean, seen.mean(), atol=1e-4)
    close(state.m2, ((seen - seen.mean()) ** 2).sum(), rtol=1e-4)


def test_running_scale_of_one_batch():
    _, (now,) = scaled([[1.0, 2.0, 5.0]])
    close(np.std(now), 1)
    np.testing.assert_array_equal(np.sign(now), 1)  # scores are not centred


def test_running_scale_does_not_depend_on_the_split():
    scores = 2 * oracles.normal(np.random.default_rng(1), 24) + 1
    states = [scaled(np.split(scores, cuts))[0] for cuts in ([], [12], [1, 2, 20])]
    for state in states[1:]:
        jax.tree.map(partial(close, rtol=1e-4), state, states[0])


def test_running_scale_removes_the_scale_of_the_scores():
    batches = [oracles.normal(np.random.default_rng(i), 6) for i in range(3)]
    for a, b in zip(scaled(batches)[1], scaled([100 * x for x in batches])[1], strict=True):
        close(a, b, rtol=1e-4)


@pytest.mark.parametrize(
    "batch", [[1.0, 1.0, 1.0], [1e4] * 64, [3.0], [0.0, 0.0], [math.nan, 2.0]], ids=str
)
def test_running_scale_of_equal_scores(batch):
    """Scores without deviation, equal or single, have no scale and become 0."""
    _, now = scaled([batch, batch])
    real = np.isfinite(batch)
    np.testing.assert_array_equal(np.asarray(now)[:, real], 0)


def test_running_scale_after_equal_scores():
    """Equal scores leave no rounding behind that a later batch would be divided by."""
    _, (first, second, third) = scaled([np.full(64, 1e4 + 0.1)] * 2 + [[1e4, 1e4 + 64]])
    np.testing.assert_array_equal([first, second], 0)
    assert 100 < third[0] < 2e4


def test_running_scale_takes_in_no_overflow():
    state, (first, _) = scaled([[1.0, 3.0], [1e30, -1e30]])
    close(state.count, 2)
    close(state.m2, 2)
    close(first, [1, 3])
