"""Test `ppo_jax.ops.logprobs`: alignment, log-probs, entropies, and chunked computation."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from helpers import assert_jit_and_vmap_agree

from ppo_jax.ops.kl import kl_k1
from ppo_jax.ops.logprobs import (
    chunked_logprobs_and_entropy,
    entropy,
    response_view,
    token_logprobs,
)

B, R, D, V = 3, 7, 5, 11
close = partial(np.testing.assert_allclose, rtol=2e-5, atol=2e-6)


@pytest.fixture
def logits():
    return 3 * oracles.normal(np.random.default_rng(0), B, R, V)


@pytest.fixture
def tokens():
    return np.random.default_rng(1).integers(0, V, (B, R)).astype(np.int32)


@pytest.mark.parametrize("P", [1, 2, 4])
def test_response_view(P):
    """Entry `t` of the view is position `P + t - 1`, also if there are trailing axes."""
    x = np.random.default_rng(2).normal(size=(B, P + R - 1, 2))
    view = response_view(x, P)
    assert view.shape == (B, R, 2)
    for t in range(R):
        np.testing.assert_array_equal(view[:, t], x[:, P + t - 1])


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_equals_the_numpy_oracle(logits, tokens, temperature):
    close(
        token_logprobs(logits, tokens, temperature=temperature),
        oracles.token_logprobs(logits, tokens, temperature),
    )
    close(entropy(logits, temperature=temperature), oracles.entropy(logits, temperature))
    assert_jit_and_vmap_agree(partial(token_logprobs, temperature=temperature), logits, tokens)
    assert_jit_and_vmap_agree(partial(entropy, temperature=temperature), logits)


def test_probabilities_add_up_to_one(logits):
    every = jnp.stack([token_logprobs(logits, jnp.full((B, R), v)) for v in range(V)], axis=-1)
    close(jnp.exp(every).sum(axis=-1), 1)
    close(-jnp.sum(jnp.exp(every) * every, axis=-1), entropy(logits))


def test_a_policy_has_no_kl_with_itself(logits, tokens):
    """The KL is 0 if policy and reference have equal logits, up to a constant."""
    of = partial(token_logprobs, tokens=tokens, temperature=0.7)
    np.testing.assert_array_equal(kl_k1(of(logits), of(logits)), 0)
    np.testing.assert_allclose(kl_k1(of(logits), of(logits + 8)), 0, atol=1e-5)


def test_bfloat16_logits_are_computed_in_float32(logits, tokens):
    low = jnp.asarray(logits, jnp.bfloat16)
    assert token_logprobs(low, tokens).dtype == entropy(low).dtype == jnp.float32
    close(
        token_logprobs(low, tokens, temperature=0.7),
        oracles.token_logprobs(np.float32(low), tokens, 0.7),
    )
    close(entropy(low, temperature=0.7), oracles.entropy(np.float32(low), 0.7))


@pytest.mark.parametrize("offset", [0, 1e4, -1e4])
def test_extreme_logits(offset):
    """Extreme logits do not overflow."""
    logits = np.array([[0, -200, -300]], np.float32) + np.float32(offset)
    close(token_logprobs(logits, np.array([0])), 0)
    close(token_logprobs(logits, np.array([1])), -200)
    close(entropy(logits), 0)


def test_gradients(logits, tokens):
    """`∂ log π(a) / ∂ℓ = 1[a] - π` and `∂H / ∂ℓ = -π (log π + H)`."""
    logp = oracles.log_softmax(logits)
    pi, h = np.exp(logp), oracles.entropy(logits)[..., None]
    close(jax.grad(lambda x: token_logprobs(x, tokens).sum())(logits), np.eye(V)[tokens] - pi)
    close(jax.grad(lambda x: entropy(x).sum())(logits), -pi * (logp + h), atol=1e-5)


def test_tokens_of_probability_0_change_nothing(logits, tokens):
    """Logits of -inf, as in a padded vocabulary, change no value and no gradient."""
    padded = np.concatenate([logits, np.full((B, R, 2), -np.inf, np.float32)], axis=-1)
    for of in (partial(token_logprobs, tokens=tokens), entropy):
        close(of(padded), of(logits))
        slope = np.asarray(jax.grad(lambda x, of=of: of(x).sum())(padded))
        close(slope[..., :V], jax.grad(lambda x, of=of: of(x).sum())(logits))
        np.testing.assert_array_equal(slope[..., V:], 0)


def test_shapes_must_match(logits, tokens):
    with pytest.raises(AssertionError):
        token_logprobs(logits, tokens[:, 1:])
    with pytest.raises(AssertionError):
        chunked_logprobs_and_entropy(lambda h: h, logits, tokens[:, 1:])


# --- chunked computation ---


@pytest.fixture
def model():
    rng = np.random.default_rng(3)
    return oracles.normal(rng, D, V), 2 * oracles.normal(rng, B, R, D)


CHUNKS = [1, 3, 4, R, R + 1]


@pytest.mark.parametrize("chunk", [None, *CHUNKS])
def test_chunked_values(model, tokens, chunk):
    weight, hidden = model
    of = jax.jit(
        partial(chunked_logprobs_and_entropy, lambda h: h @ weight, temperature=0.7, chunk=chunk)
    )
    logits, (logp, entropies) = hidden @ weight, of(hidden, tokens)
    close(logp, oracles.token_logprobs(logits, tokens, 0.7), atol=1e-5)
    close(entropies, oracles.entropy(logits, 0.7), atol=1e-5)


def test_chunked_jit_and_vmap(model, tokens):
    weight, hidden = model
    assert_jit_and_vmap_agree(
        partial(chunked_logprobs_and_entropy, lambda h: h @ weight, chunk=3), hidden, tokens
    )


@pytest.mark.parametrize("chunk", CHUNKS)
def test_chunked_gradients(model, tokens, chunk):
    """Gradients by the hidden states and by the matrix that `unembed` closes over do not change."""
    mix = oracles.normal(np.random.default_rng(4), 2, B, R)

    def total(weight, hidden, chunk):
        logp, entropies = chunked_logprobs_and_entropy(
            lambda h: h @ weight, hidden, tokens, temperature=0.7, chunk=chunk
        )
        return jnp.sum(logp * mix[0] + entropies * mix[1])

    gradients = jax.jit(jax.grad(total, argnums=(0, 1)), static_argnums=2)
    jax.tree.map(partial(close, atol=2e-5), gradients(*model, chunk), gradients(*model, None))


def largest_array(function, *args) -> int:
    """Return the number of elements of the largest array in the traced function."""
    shapes = re.findall(r"(?:f32|bf16|i32|bool)\[([\d,]+)\]", str(jax.make_jaxpr(function)(*args)))
    return max(int(np.prod([int(n) for n in shape.split(",")])) for shape in shapes)


@pytest.mark.parametrize("chunk", [2, 3])
def test_chunks_never_hold_all_logits(chunk):
    """Neither the forward pass nor the gradient holds an array as large as all logits."""
    B, R, V = 4, 60, 97  # large enough that no other array has as many entries
    weight, hidden, tokens = (
        np.ones((D, V), np.float32),
        np.ones((B, R, D), np.float32),
        np.zeros((B, R), np.int32),
    )

    def total(hidden, chunk):
        return sum(
            x.sum()
            for x in chunked_logprobs_and_entropy(lambda h: h @ weight, hidden, tokens, chunk=chunk)
        )

    for function in (total, jax.grad(total)):
        assert largest_array(partial(function, chunk=chunk), hidden) <= B * R * V // 10
        assert (
            largest_array(partial(function, chunk=None), hidden) >= B * R * V
        )  # without chunks the logits are found


@pytest.mark.parametrize("chunk", [None, 3])
def test_ratio_with_itself_is_one_in_bfloat16(model, tokens, chunk):
    """A forward pass and one inside a gradient, compiled apart, agree up to rounding."""
    weight, hidden = (jnp.asarray(x, jnp.bfloat16) for x in model)
    of = lambda h: chunked_logprobs_and_entropy(lambda h: h @ weight, h, tokens, chunk=chunk)[0]
    old = jax.jit(of)(hidden)
    _, new = jax.jit(jax.grad(lambda h: (of(h).sum(), of(h)), has_aux=True))(hidden)
    np.testing.assert_allclose(old, new, atol=1e-6)


@pytest.mark.parametrize("chunk", [0, -2])
def test_chunk_must_be_positive(model, tokens, chunk):
    with pytest.raises(ValueError, match="chunk"):
        chunked_logprobs_and_entropy(lambda h: h @ model[0], model[1], tokens, chunk=chunk)
