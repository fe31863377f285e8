"""How far the policy has moved: per-token estimators of KL(π ‖ π_ref), and the controllers of the penalty's weight.

With actions sampled from π and `d = log π(a|s) - log π_ref(a|s)`, the estimators need only the two log-probs of each token
(Schulman 2020, http://joschu.net/blog/kl-approx.html); `kl_full` needs both distributions and has no sampling noise.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp


def kl_k1(logprobs: jax.Array, ref_logprobs: jax.Array) -> jax.Array:
    """k1 = d: unbiased, of either sign, high variance.

    Args:
      logprobs: `[...]` float32, log π of the sampled tokens, in nats.
      ref_logprobs: `[...]` float32, log π_ref of the same tokens.

    Returns:
      `[...]` float32, nats per token.

    Example:
      >>> kl_k1(jnp.array([-1.0]), jnp.array([-1.5]))
      Array([0.5], dtype=float32)
    """
    chex.assert_equal_shape([logprobs, ref_logprobs])
    return logprobs - ref_logprobs


def kl_k2(logprobs: jax.Array, ref_logprobs: jax.Array) -> jax.Array:
    """k2 = d²/2: never negative, low variance, biased. Shapes as in `kl_k1`.

    Example:
      >>> kl_k2(jnp.array([-1.0]), jnp.array([-1.5]))
      Array([0.125], dtype=float32)
    """
    return 0.5 * kl_k1(logprobs, ref_logprobs) ** 2


def kl_k3(logprobs: jax.Array, ref_logprobs: jax.Array) -> jax.Array:
    """k3 = exp(-d) - 1 + d: unbiased, never negative, low variance. Shapes as in `kl_k1`.

    Example:
      >>> kl_k3(jnp.array([-1.0]), jnp.array([-1.5])).round(4)
      Array([0.1065], dtype=float32)
    """
    d = kl_k1(logprobs, ref_logprobs)
    return jnp.expm1(-d) + d


def kl_abs(logprobs: jax.Array, ref_logprobs: jax.Array) -> jax.Array:
    """|d|: a distance, not an estimate of the KL. Shapes as in `kl_k1`.

    Example:
      >>> kl_abs(jnp.array([-1.5]), jnp.array([-1.0]))
      Array([0.5], dtype=float32)
    """
    return jnp.abs(kl_k1(logprobs, ref_logprobs))


def kl_full(logits: jax.Array, ref_logits: jax.Array, *, temperature: float = 1.0) -> jax.Array:
    """Exact KL(π ‖ π_ref) = Σᵥ π(v) (log π(v) - log π_ref(v)) of each position.

    Args:
      logits: `[..., V]` float, of π; `-inf` marks a token that π cannot say.
      ref_logits: `[..., V]` float, of π_ref.
      temperature: divides both, as in sampling.

    Returns:
      `[...]` float32, nats.

    Example:
      >>> kl_full(jnp.array([0.0, 0.0]), jnp.array([0.0, 1.0])).round(4)
      Array(0.1201, dtype=float32)
    """
    chex.assert_equal_shape([logits, ref_logits])
    logp = jax.nn.log_softmax(logits.astype(jnp.float32) / temperature)
    logq = jax.nn.log_softmax(ref_logits.astype(jnp.float32) / temperature)
    p = jnp.exp(logp)
    said = p > 0  # 0 · log 0 is 0, in the gradient too
    return jnp.sum(p * (jnp.where(said, logp, 0) - jnp.where(said, logq, 0)), axis=-1)


def reads_logits(estimator: Any) -> bool:
    """Whether a KL estimator reads the logits of both models instead of their log-probs."""
    while isinstance(estimator, functools.partial):
        estimator = estimator.func
    return estimator is kl_full


class KLState(NamedTuple):
    """What a KL controller remembers; part of every checkpoint."""

    coef: jax.Array  # [] float32, β, the weight of the KL penalty


class KLController(NamedTuple):
    """A rule for the penalty's weight, as a pair of pure functions."""

    init: Callable[[], KLState]
    update: Callable[[KLState, jax.Array, int], KLState]


def fixed_kl(coef: float) -> KLController:
    """The weight that never changes.

    Example:
      >>> controller = fixed_kl(0.05)
      >>> controller.update(controller.init(), jnp.array(9.0), 64).coef
      Array(0.05, dtype=float32)
    """
    return KLController(
        init=lambda: KLState(jnp.float32(coef)), update=lambda state, kl, episodes: state
    )


def adaptive_kl(init_coef: float, *, target: float, horizon: float) -> KLController:
    """Moves the weight so that the KL stays near a target:

        e = clip(KL / target - 1, -0.2, 0.2),    β ← β (1 + e · episodes / horizon)

    Args:
      init_coef: β at the start.
      target: the KL to hold, in nats per *sequence*; positive.
      horizon: episodes over which the weight may move by 20 %; positive.

    Returns:
      A controller; its `update` takes the state, the mean KL of the batch's sequences and the number of episodes.

    Raises:
      ValueError: if `target` or `horizon` is not positive.

    Source:
      Ziegler et al. 2019 (https://arxiv.org/abs/1909.08593), section 2.2; `horizon` as in their code, where
      `episodes / horizon` stands for the paper's K_β.

    Example:
      >>> controller = adaptive_kl(0.2, target=6.0, horizon=10000)
      >>> controller.update(controller.init(), jnp.array(12.0), 500).coef
      Array(0.202, dtype=float32)
    """
    if target <= 0 or horizon <= 0:
        raise ValueError(
            f"adaptive_kl needs a positive target and horizon, not target={target} and horizon={horizon}."
        )

    def update(state: KLState, kl: jax.Array, episodes: int) -> KLState:
        error = jnp.clip(kl / target - 1, -0.2, 0.2)
        return KLState(state.coef * (1 + error * (episodes / horizon)))

    return KLController(init=lambda: KLState(jnp.float32(init_coef)), update=update)
