"""Test `ppo_jax.ops.sampling`: filters against `transformers`, samples against probabilities."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
import torch
from helpers import assert_jit_and_vmap_agree
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from ppo_jax.ops import sampling
from ppo_jax.ops.sampling import (
    filter_top_k,
    filter_top_p,
    greedy_token,
    process_logits,
    sample_token,
)

close = partial(np.testing.assert_allclose, rtol=2e-5, atol=2e-6)
draw = jax.jit(jax.vmap(sample_token, in_axes=(0, None)))


def random_logits(*shape: int, seed: int = 0) -> np.ndarray:
    return 3 * oracles.normal(np.random.default_rng(seed), *shape)


# --- filters ---


@pytest.mark.parametrize("k", [1, 2, 7, 300, 1000])
def test_top_k_equals_transformers(k):
    logits = random_logits(16, 300)
    filtered = filter_top_k(logits, k)
    np.testing.assert_array_equal(filtered, TopKLogitsWarper(k)(None, torch.tensor(logits)).numpy())
    np.testing.assert_array_equal(
        filtered, [oracles.top_k(row, k).astype(np.float32) for row in logits]
    )
    assert_jit_and_vmap_agree(partial(filter_top_k, k=k), logits)


@pytest.mark.parametrize("p", [1e-6, 0.1, 0.5, 0.9, 0.99])
def test_top_p_equals_transformers(p):
    logits = random_logits(16, 300)
    filtered = filter_top_p(logits, p)
    np.testing.assert_array_equal(filtered, TopPLogitsWarper(p)(None, torch.tensor(logits)).numpy())
    np.testing.assert_array_equal(
        filtered, [oracles.top_p(row, p).astype(np.float32) for row in logits]
    )
    assert_jit_and_vmap_agree(partial(filter_top_p, p=p), logits)


def test_top_p_of_1_keeps_all():
    """This includes the far tail, where a cumulative sum in float32 is already 1."""
    logits = random_logits(16, 20000)
    np.testing.assert_array_equal(filter_top_p(logits, 1.0), logits)


def test_filters_keep_ties_and_excluded_tokens():
    logits = jnp.array([2.0, 2.0, 1.0, -jnp.inf])
    np.testing.assert_array_equal(filter_top_k(logits, 1), [2, 2, -np.inf, -np.inf])
    np.testing.assert_array_equal(filter_top_k(logits, 4), logits)
    np.testing.assert_array_equal(filter_top_p(logits, 0.3), [2, 2, -np.inf, -np.inf])
    np.testing.assert_array_equal(filter_top_p(logits, 1.0), logits)


@pytest.mark.parametrize(
    "options",
    [{}, {"temperature": 0.7}, {"top_k": 20}, {"temperature": 1.5, "top_k": 30, "top_p": 0.8}],
)
def test_process_logits_equals_transformers(options):
    """The order is temperature, top-k, top-p, as in `transformers`."""
    logits = random_logits(16, 300)
    theirs = torch.tensor(logits)
    for name, warper in (
        ("temperature", TemperatureLogitsWarper),
        ("top_k", TopKLogitsWarper),
        ("top_p", TopPLogitsWarper),
    ):
        theirs = warper(options[name])(None, theirs) if name in options else theirs
    ours = process_logits(logits, **options)
    close(ours, theirs.numpy())
    assert process_logits(jnp.asarray(logits, jnp.bfloat16), **options).dtype == jnp.float32


@pytest.mark.parametrize("k", [0, -1])
def test_invalid_top_k_is_refused(k):
    with pytest.raises(ValueError, match="top_k"):
        filter_top_k(jnp.zeros(3), k)


@pytest.mark.parametrize("p", [0.0, -0.1, 1.1])
def test_invalid_top_p_is_refused(p):
    with pytest.raises(ValueError, match="top_p"):
        filter_top_p(jnp.zeros(3), p)


# --- samples ---


def assert_drawn_from(tokens, probs) -> None:
    """Assert that χ² is within five deviations of its mean; rare tokens are pooled."""
    counts, expected = np.bincount(tokens, minlength=len(probs)), probs * len(tokens)
    assert len(counts) == len(probs)
    np.testing.assert_array_equal(counts[probs == 0], 0)
    groups = np.floor(np.cumsum(expected) / 20).astype(
        int
    )  # contiguous groups of tokens with about 20 draws each
    counts, expected = (
        np.bincount(np.unique(groups, return_inverse=True)[1], x) for x in (counts, expected)
    )
    counts, expected = counts[expected > 5], expected[expected > 5]
    chi2, freedom = ((counts - expected) ** 2 / expected).sum(), len(expected) - 1
    assert abs(chi2 - freedom) < 5 * np.sqrt(2 * max(freedom, 1)), (chi2, freedom)


@pytest.mark.parametrize("V", [2, 256, 257, 1000, 50257])
@pytest.mark.parametrize("scale", [0.0, 1.0, 3.0], ids=["flat", "mild", "peaked"])
def test_samples_follow_the_distribution(V, scale):
    """Vocabularies are below and above a search block of 256; a fifth of the tokens is excluded."""
    rng = np.random.default_rng(V)
    logits = scale * oracles.normal(rng, V)
    logits[rng.random(V) < 0.2] = -np.inf
    logits[V // 2] = 0
    tokens, logprobs = draw(jax.random.split(jax.random.key(V), 20000), logits)
    logp = oracles.log_softmax(logits)
    assert_drawn_from(np.asarray(tokens), np.exp(logp))
    close(logprobs, logp[np.asarray(tokens)], atol=1e-5)
    assert tokens.dtype == jnp.int32 and logprobs.dtype == jnp.float32


@pytest.mark.parametrize("V", [3, 600])
def test_the_only_allowed_token_is_always_drawn(V):
    """The token is first, last, or at the edge of a block; its log-prob is 0."""
    for only in {0, 255, 256, V // 2, V - 1} & set(range(V)):
        logits = np.full(V, -np.inf, np.float32)
        logits[only] = -3
        tokens, logprobs = draw(jax.random.split(jax.random.key(only), 200), logits)
        np.testing.assert_array_equal(tokens, only)
        np.testing.assert_allclose(logprobs, 0, atol=1e-6)


def test_improbable_tokens_at_the_end_are_not_drawn():
    """Rounding of the cumulative sum must not move draws to the last, improbable tokens."""
    logits = np.zeros(5000, np.float32)
    logits[-2000:] = -60
    tokens, _ = draw(jax.random.split(jax.random.key(0), 50000), logits)
    assert tokens.max() < 3000


NEAR_1 = 1 - 2**-24


@pytest.mark.parametrize(
    "u, v, token", [(0, 0, 1), (0, 0.5, 100), (0.5, 0, 256), (0.5, 0.5, 258), (NEAR_1, NEAR_1, 258)]
)
def test_two_uniform_numbers_choose_block_and_token(monkeypatch, u, v, token):
    """A block owns the interval `[c, c + p)` of the first number, a token that of the second.

    The largest number below 1 chooses the last token.
    """
    monkeypatch.setattr(
        jax.random, "uniform", lambda *args, **kwargs: jnp.array([u, v], jnp.float32)
    )
    logits = np.full(600, -np.inf, np.float32)
    logits[[1, 100, 256, 258]] = 0
    assert sample_token(jax.random.key(0), logits)[0] == token


@pytest.mark.parametrize("target, index", [(-1e-6, 1), (1.5, 2), (2.0, 2), (2.5, 2), (np.nan, 2)])
def test_search_tolerates_rounding(target, index):
    """If rounding moves a target outside the block, tokens of weight 0 are still not found."""
    assert sampling._first_beyond(jnp.array([0.0, 1.0, 1.0, 0.0]), jnp.float32(target)) == index


@pytest.mark.parametrize(
    "logits, allowed",
    [
        ([1e30, 0, -1e30], {0}),
        ([-1e30, -1e30, -np.inf], {0, 1}),
        ([3e38, -3e38, 3e38], {0, 2}),
        ([-1e4, -1e4 - 200, -2e4], {0}),
    ],
)
def test_extreme_logits(logits, allowed):
    logits = np.array(logits, np.float32)
    tokens, logprobs = draw(jax.random.split(jax.random.key(0), 200), logits)
    assert set(np.asarray(tokens).tolist()) == allowed
    assert np.isfinite(logprobs).all()
    assert int(greedy_token(logits)[0]) == min(allowed)


def test_nan_logits_still_give_a_token_of_the_vocabulary():
    """A diverged model should be reported by its loss, not by a failure on an invalid token."""
    assert 0 <= sample_token(jax.random.key(0), jnp.full(300, jnp.nan))[0] < 300


def test_samples_do_not_depend_on_the_batch():
    """With a key per row, sampling rows at once, in parts or one by one gives the same tokens."""
    keys, logits = jax.random.split(jax.random.key(3), 8), random_logits(8, 700)
    rows, one = jax.jit(jax.vmap(sample_token)), jax.jit(sample_token)
    together, logprobs = rows(keys, logits)
    assert len(set(np.asarray(together).tolist())) > 1
    parts = [rows(keys[i:j], logits[i:j]) for i, j in ((0, 2), (2, 3), (3, 8))]
    np.testing.assert_array_equal(jnp.concatenate([tokens for tokens, _ in parts]), together)
    close(jnp.concatenate([logp for _, logp in parts]), logprobs)
    np.testing.assert_array_equal(
        [one(k, x)[0] for k, x in zip(keys, logits, strict=True)], together
    )


def test_greedy_takes_the_first_maximum():
    logits = random_logits(16, 300)
    tokens, logprobs = jax.vmap(greedy_token)(logits)
    np.testing.assert_array_equal(tokens, logits.argmax(axis=1))
    close(logprobs, oracles.log_softmax(logits).max(axis=1))
    tied = np.array([0, 5, 1, 5, -np.inf], np.float32)
    token, logprob = jax.jit(greedy_token)(tied)
    assert token == 1 and token.dtype == jnp.int32
    close(logprob, oracles.log_softmax(tied)[1])


@pytest.mark.parametrize("size", [3, 300, 9000])
def test_the_form_for_a_tpu_draws_the_same_tokens(size):
    """Also where most tokens have no weight, or one of them has nearly all."""
    logits = jnp.concatenate([jnp.array(random_logits(40, size)), 30 * random_logits(24, size)])
    logits = logits.at[::2, size // 3 :].set(-jnp.inf)
    numbers = jax.random.uniform(jax.random.key(1), (64, 2))
    (want, logprob), (got, other) = (
        jax.jit(jax.vmap(form))(logits, numbers)
        for form in (sampling.by_blocks, sampling.by_chunks)
    )
    np.testing.assert_array_equal(got, want)
    np.testing.assert_allclose(other, logprob, rtol=1e-5, atol=1e-5)
    assert 0 <= sampling.by_chunks(jnp.full(size, jnp.nan), numbers[0])[0] < size


@pytest.mark.parametrize("function", [greedy_token, partial(sample_token, jax.random.key(0))])
def test_a_batch_without_vmap_is_refused(function):
    """A batch with one key would silently share its randomness over rows."""
    with pytest.raises(AssertionError):
        function(jnp.zeros((2, 3)))
