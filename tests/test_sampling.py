"""`ppo_jax.ops.sampling`: the filters against `transformers`, and samples against the distribution they claim to be from."""

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
def test_top_k(k):
    logits = random_logits(16, 300)
    filtered = filter_top_k(logits, k)
    np.testing.assert_array_equal(filtered, TopKLogitsWarper(k)(None, torch.tensor(logits)).numpy())
    np.testing.assert_array_equal(
        filtered, [oracles.top_k(row, k).astype(np.float32) for row in logits]
    )
    assert_jit_and_vmap_agree(partial(filter_top_k, k=k), logits)


@pytest.mark.parametrize("p", [1e-6, 0.1, 0.5, 0.9, 0.99])
def test_top_p(p):
    logits = random_logits(16, 300)
    filtered = filter_top_p(logits, p)
    np.testing.assert_array_equal(filtered, TopPLogitsWarper(p)(None, torch.tensor(logits)).numpy())
    np.testing.assert_array_equal(
        filtered, [oracles.top_p(row, p).astype(np.float32) for row in logits]
    )
    assert_jit_and_vmap_agree(partial(filter_top_p, p=p), logits)


def test_top_p_of_1_keeps_all():
    """Also in the far tail, where a running sum in float32 has long reached 1."""
    logits = random_logits(16, 20000)
    np.testing.assert_array_equal(filter_top_p(logits, 1.0), logits)


def test_filters_keep_ties_and_what_is_out_already():
    logits = jnp.array([2.0, 2.0, 1.0, -jnp.inf])
    np.testing.assert_array_equal(filter_top_k(logits, 1), [2, 2, -np.inf, -np.inf])
    np.testing.assert_array_equal(filter_top_k(logits, 4), logits)
    np.testing.assert_array_equal(filter_top_p(logits, 0.3), [2, 2, -np.inf, -np.inf])
    np.testing.assert_array_equal(filter_top_p(logits, 1.0), logits)


@pytest.mark.parametrize(
    "options",
    [{}, {"temperature": 0.7}, {"top_k": 20}, {"temperature": 1.5, "top_k": 30, "top_p": 0.8}],
)
def test_process_logits(options):
    """In the order of `transformers`: the nucleus is that of the tempered distribution over the k likeliest words."""
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
def test_top_k_refuses(k):
    with pytest.raises(ValueError, match="top_k"):
        filter_top_k(jnp.zeros(3), k)


@pytest.mark.parametrize("p", [0.0, -0.1, 1.1])
def test_top_p_refuses(p):
    with pytest.raises(ValueError, match="top_p"):
        filter_top_p(jnp.zeros(3), p)


# --- samples ---


def assert_drawn_from(tokens, probs) -> None:
    """χ² of the counts within five deviations of its mean; words too rare to count one by one are counted with neighbours."""
    counts, expected = np.bincount(tokens, minlength=len(probs)), probs * len(tokens)
    assert len(counts) == len(probs)
    np.testing.assert_array_equal(counts[probs == 0], 0)
    groups = np.floor(np.cumsum(expected) / 20).astype(
        int
    )  # contiguous runs of words of about 20 draws each
    counts, expected = (
        np.bincount(np.unique(groups, return_inverse=True)[1], x) for x in (counts, expected)
    )
    counts, expected = counts[expected > 5], expected[expected > 5]
    chi2, freedom = ((counts - expected) ** 2 / expected).sum(), len(expected) - 1
    assert abs(chi2 - freedom) < 5 * np.sqrt(2 * max(freedom, 1)), (chi2, freedom)


@pytest.mark.parametrize("V", [2, 256, 257, 1000, 50257])
@pytest.mark.parametrize("scale", [0.0, 1.0, 3.0], ids=["flat", "mild", "peaked"])
def test_distribution(V, scale):
    """On both sides of the search's block of 256 words; a flat, a mild and a peaked distribution, a fifth of it forbidden."""
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
def test_only_what_is_allowed_is_drawn(V):
    """One allowed word, first, last and at the edges of blocks, is always drawn, with log-prob 0."""
    for only in {0, 255, 256, V // 2, V - 1} & set(range(V)):
        logits = np.full(V, -np.inf, np.float32)
        logits[only] = -3
        tokens, logprobs = draw(jax.random.split(jax.random.key(only), 200), logits)
        np.testing.assert_array_equal(tokens, only)
        np.testing.assert_allclose(logprobs, 0, atol=1e-6)


def test_rare_words_at_the_end_do_not_gain():
    """The last words have no mass to speak of; rounding of the running sum must not send draws there."""
    logits = np.zeros(5000, np.float32)
    logits[-2000:] = -60
    tokens, _ = draw(jax.random.split(jax.random.key(0), 50000), logits)
    assert tokens.max() < 3000


NEAR_1 = 1 - 2**-24


@pytest.mark.parametrize(
    "u, v, token", [(0, 0, 1), (0, 0.5, 100), (0.5, 0, 256), (0.5, 0.5, 258), (NEAR_1, NEAR_1, 258)]
)
def test_steps_of_the_uniform(monkeypatch, u, v, token):
    """A block owns `[c, c + p)` of the first number's interval, a word of the second's; the number next to 1 is the last's."""
    monkeypatch.setattr(
        jax.random, "uniform", lambda *args, **kwargs: jnp.array([u, v], jnp.float32)
    )
    logits = np.full(600, -np.inf, np.float32)
    logits[[1, 100, 256, 258]] = 0
    assert sample_token(jax.random.key(0), logits)[0] == token


@pytest.mark.parametrize("target, index", [(-1e-6, 1), (1.5, 2), (2.0, 2), (2.5, 2), (np.nan, 2)])
def test_search_forgives_rounding(target, index):
    """What is left to search for in a block may by rounding lie outside it; words of weight 0 are not found even then."""
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


def test_a_token_is_a_word_even_of_nan():
    """A diverged model shows in its loss; a token past the vocabulary would fail somewhere else first."""
    assert 0 <= sample_token(jax.random.key(0), jnp.full(300, jnp.nan))[0] < 300


def test_samples_do_not_depend_on_the_batch():
    """A key for each row: the same rows all at once, in parts, and one by one."""
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


def test_greedy():
    logits = random_logits(16, 300)
    tokens, logprobs = jax.vmap(greedy_token)(logits)
    np.testing.assert_array_equal(tokens, logits.argmax(axis=1))
    close(logprobs, oracles.log_softmax(logits).max(axis=1))
    tied = np.array([0, 5, 1, 5, -np.inf], np.float32)
    token, logprob = jax.jit(greedy_token)(tied)
    assert token == 1 and token.dtype == jnp.int32
    close(logprob, oracles.log_softmax(tied)[1])


@pytest.mark.parametrize("function", [greedy_token, partial(sample_token, jax.random.key(0))])
def test_rows_need_vmap(function):
    """A batch of rows with one key would silently share its randomness."""
    with pytest.raises(AssertionError):
        function(jnp.zeros((2, 3)))
