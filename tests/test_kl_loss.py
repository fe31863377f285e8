"""Test the KL penalty in the loss: its gradient is that of the KL, and that of k1 in the reward."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_mask_hides

from ppo_jax.ops.kl import kl_full, kl_k1, kl_k2, kl_k3
from ppo_jax.ops.kl_loss import kl_loss
from ppo_jax.ops.masked import masked_mean

V = 5
close = partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)


def expected(term, logits, sampler=None):
    """Return the expectation of the gradient of a term over the tokens of a sampler.

    `term` is a function of the log-probs of all tokens, `[1, V]`, each of which is a sample.
    """
    probs = jax.nn.softmax(logits if sampler is None else sampler)
    of_token = lambda v: jax.grad(lambda x: term(jax.nn.log_softmax(x)[None])[0, v])(logits)
    return sum(probs[v] * of_token(v) for v in range(V))


@pytest.fixture
def policies():
    """Return the logits of a policy, a reference and a sampler, and all tokens as a mask."""
    keys = jax.random.split(jax.random.key(0), 3)
    return *(jax.random.normal(key, (V,)) for key in keys), jnp.ones((1, V), bool)


def per_token(x, ref, mask, **options):
    """Return the terms of the loss, `[1, V]`."""
    return kl_loss(x, ref, mask, aggregate=lambda terms, _: terms, **options)


@pytest.mark.parametrize("estimator", [kl_k1, kl_k2, kl_k3])
def test_the_expected_gradient_is_that_of_the_kl(policies, estimator):
    logits, reference, sampler, mask = policies
    ref = jax.nn.log_softmax(reference)[None]
    exact = jax.grad(lambda x: kl_full(x, reference))(logits)
    close(expected(partial(per_token, ref=ref, mask=mask, estimator=estimator), logits), exact)
    old = jax.nn.log_softmax(sampler)[None]
    off_policy = partial(per_token, ref=ref, mask=mask, estimator=estimator, old_logprobs=old)
    close(expected(off_policy, logits, sampler), exact)


def test_other_estimators_in_a_loss_have_other_gradients(policies):
    logits, reference, _, _ = policies
    ref = jax.nn.log_softmax(reference)[None]
    exact = jax.grad(lambda x: kl_full(x, reference))(logits)
    close(expected(lambda x: kl_k1(x, ref), logits), 0)
    assert np.abs(expected(lambda x: kl_k3(x, ref), logits) - exact).max() > 0.05


def test_k2_in_the_loss_is_k1_in_the_reward():
    """Without a clip and on the policy's own tokens, each single gradient is the same."""
    keys = jax.random.split(jax.random.key(1), 3)
    x, ref = -jnp.abs(jax.random.normal(keys[0], (2, 8, 6)))
    mask = jax.random.bernoulli(keys[1], 0.7, (8, 6))
    reward = -kl_k1(x, ref)  # each token's own reward, which is its advantage if γ is 0
    by_reward = jax.grad(lambda y: -masked_mean(jnp.exp(y - x) * reward, mask))(x)
    close(jax.grad(kl_loss)(x, ref, mask), by_reward)


def test_values_and_masked_entries():
    keys = jax.random.split(jax.random.key(2), 4)
    x, ref, old = -jnp.abs(jax.random.normal(keys[0], (3, 8, 6)))
    mask = jax.random.bernoulli(keys[1], 0.7, (8, 6)).at[2].set(False)
    for estimator in (kl_k1, kl_k2, kl_k3):
        close(kl_loss(x, ref, mask, estimator=estimator), masked_mean(estimator(x, ref), mask))
    weighted = masked_mean(jnp.exp(x - old) * kl_k3(x, ref), mask)
    close(kl_loss(x, ref, mask, estimator=kl_k3, old_logprobs=old), weighted)
    assert_mask_hides(
        lambda x, ref, old: kl_loss(x, ref, mask, estimator=kl_k3, old_logprobs=old),
        (x, ref, old),
        mask,
    )


def test_an_estimator_of_logits_is_refused():
    x = jnp.zeros((2, 3))
    with pytest.raises(AssertionError):
        kl_loss(x, x, x == 0, estimator=kl_full)
