"""The expected gradients of KL penalties, computed exactly for a small model.

The model is a table of logits by the token before. The expectation over its answers is a sum over
all of them, in float64, so nothing is random but the tables of the policy and of the reference.

The KL divergence of answers is `Σ_y π(y) log(π(y) / π_ref(y))`. That of tokens is the divergence of
the next-token distributions, added up over the tokens of answers that are sampled from the policy
and held fixed. A penalty of answers depends on its sum over the answer, and one of tokens does not.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from ppo_jax import kl_k1, kl_k2, kl_k3, kl_loss

LENGTH, VOCABULARY = 3, 4
Penalty = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
"""A penalty as a term of the loss, from the log-probs `[N, LENGTH]` of all answers under policy and
reference and the probabilities `[N]` of the answers, which are constants."""


def of_tokens(estimator: Callable[[jax.Array, jax.Array], jax.Array]) -> Penalty:
    """Make the penalty that adds up an estimate of each token, with its own gradient."""
    return lambda x, ref, p: (p[:, None] * estimator(x, ref)).sum()


def of_answers(estimator: Callable[[jax.Array, jax.Array], jax.Array]) -> Penalty:
    """Make the penalty that is an estimate from the log-probs of whole answers."""
    return lambda x, ref, p: (p * estimator(x.sum(axis=1), ref.sum(axis=1))).sum()


def k1_reward(x: jax.Array, ref: jax.Array, p: jax.Array) -> jax.Array:
    """Compute the policy-gradient term of k1 as a part of the reward of the answer."""
    penalty = jax.lax.stop_gradient(kl_k1(x, ref)).sum(axis=1)
    return (p * penalty * x.sum(axis=1)).sum()


def package_loss(x: jax.Array, ref: jax.Array, p: jax.Array) -> jax.Array:
    """Compute `kl_loss` with the value of k3."""
    expected = lambda terms, mask: (p[:, None] * terms).sum()
    return kl_loss(x, ref, jnp.ones(x.shape, bool), estimator=kl_k3, aggregate=expected)


ANSWERS: dict[str, Penalty] = {
    "k1 in the reward": k1_reward,
    "k2 of the answer in the loss": of_answers(kl_k2),
}
TOKENS: dict[str, Penalty] = {
    "k2 in the loss": of_tokens(kl_k2),
    "kl_loss": package_loss,
    "k3 in the loss": of_tokens(kl_k3),
    "k1 in the loss": of_tokens(kl_k1),
}


def gradient_errors(seed: int) -> dict[str, float]:
    """Return how far the expected gradient of each penalty is from that of the KL divergence.

    Args:
      seed: seed of the tables of policy and reference.

    Returns:
      For each penalty the relative error `|g - g_KL| / |g_KL|` to the divergence of answers or of
      tokens.
    """
    with jax.enable_x64(True):
        shape = (2, VOCABULARY, VOCABULARY)
        policy, reference = jax.random.normal(jax.random.key(seed), shape, jnp.float64)
        answers = jnp.stack(jnp.indices((VOCABULARY,) * LENGTH), -1).reshape(-1, LENGTH)
        before = jnp.pad(answers[:, :-1], ((0, 0), (1, 0)))
        logprobs_of = lambda table: jax.nn.log_softmax(table)[before, answers]
        ref_logprobs = logprobs_of(reference)
        probabilities = jnp.exp(logprobs_of(policy).sum(axis=1))

        def kl_of_answers(table: jax.Array) -> jax.Array:
            logprobs = logprobs_of(table).sum(axis=1)
            return (jnp.exp(logprobs) * (logprobs - ref_logprobs.sum(axis=1))).sum()

        def kl_of_tokens(table: jax.Array) -> jax.Array:
            logs, ref = jax.nn.log_softmax(table), jax.nn.log_softmax(reference)
            kl = (jnp.exp(logs) * (logs - ref)).sum(axis=1)
            return (probabilities[:, None] * kl[before]).sum()

        def error(penalty: Penalty, divergence: Callable[[jax.Array], jax.Array]) -> float:
            term = lambda table: penalty(logprobs_of(table), ref_logprobs, probabilities)
            found, exact = jax.grad(term)(policy), jax.grad(divergence)(policy)
            return float(jnp.linalg.norm(found - exact) / jnp.linalg.norm(exact))

        return {
            **{name: error(penalty, kl_of_answers) for name, penalty in ANSWERS.items()},
            **{name: error(penalty, kl_of_tokens) for name, penalty in TOKENS.items()},
        }
