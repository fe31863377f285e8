"""Per-token estimators of KL(π ‖ π_ref), and controllers of the weight of the KL penalty.

Most estimators read only the log-probs of the sampled tokens. With tokens sampled from π, they are
functions of `d = log π(a|s) - log π_ref(a|s)`. `kl_full` reads the logits of both models and has no
sampling noise. It is marked by `of_logits`, so that callers know what to pass; mark an estimator of
your own in the same way if it reads logits.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple, TypeGuard, TypeVar

import chex
import jax
import jax.numpy as jnp
from jax import Array

from ppo_jax.ops.masked import widen
from ppo_jax.ops.options import check_not_negative, check_positive

MAX_LOG_RATIO = 20.0  # In nats: exp(20) is 4.9e8, beyond which one token would be the whole batch.

_Estimator = TypeVar("_Estimator", bound=Callable[..., Array])


def of_logits(estimator: _Estimator) -> _Estimator:
    """Mark a KL estimator that reads logits instead of the log-probs of the sampled tokens.

    Args:
      estimator: a function `(logits, ref_logits, *, temperature) -> kl` of logits `[B, R, V]` float
        and the sampling temperature, which returns `[B, R]` float32 in nats.

    Returns:
      The same function, for which `reads_logits` is true.

    Example:
      >>> @of_logits
      ... def reverse_kl(logits, ref_logits, *, temperature):
      ...     return kl_full(ref_logits, logits, temperature=temperature)
      >>> reads_logits(reverse_kl)
      True
    """
    vars(estimator)["of_logits"] = True
    return estimator


def reads_logits(estimator: Callable[..., Array]) -> TypeGuard[Callable[..., Array]]:
    """Tell whether a KL estimator, or the function inside a `functools.partial`, reads logits.

    Args:
      estimator: a KL estimator.

    Returns:
      True if the estimator is to be called as `estimator(logits, ref_logits, temperature=...)`, and
      false if it is to be called as `estimator(logprobs, ref_logprobs)`.

    Example:
      >>> reads_logits(kl_full), reads_logits(partial(kl_full)), reads_logits(kl_k1)
      (True, True, False)
    """
    while isinstance(estimator, partial):
        estimator = estimator.func
    return getattr(estimator, "of_logits", False)


def kl_k1(logprobs: Array, ref_logprobs: Array) -> Array:
    """Estimate the KL by `k1 = d`, which is unbiased but has a high variance and either sign.

    Args:
      logprobs: `[...]` float, log π of the sampled tokens, in nats.
      ref_logprobs: `[...]` float, log π_ref of the same tokens, in nats.

    Returns:
      `[...]` float32, in nats per token.

    Raises:
      AssertionError: if the shapes differ.

    Source:
      Schulman 2020 (http://joschu.net/blog/kl-approx.html), k1.

    Example:
      >>> kl_k1(jnp.array([-1.0]), jnp.array([-1.5]))
      Array([0.5], dtype=float32)
    """
    chex.assert_equal_shape([logprobs, ref_logprobs])
    return widen(logprobs) - widen(ref_logprobs)


def kl_k2(logprobs: Array, ref_logprobs: Array) -> Array:
    """Estimate the KL by `k2 = d²/2`, which is never negative and has a low variance but is biased.

    Args:
      logprobs: `[...]` float, log π of the sampled tokens, in nats.
      ref_logprobs: `[...]` float, log π_ref of the same tokens, in nats.

    Returns:
      `[...]` float32, in nats per token.

    Raises:
      AssertionError: if the shapes differ.

    Source:
      Schulman 2020 (http://joschu.net/blog/kl-approx.html), k2.

    Example:
      >>> kl_k2(jnp.array([-1.0]), jnp.array([-1.5]))
      Array([0.125], dtype=float32)
    """
    return 0.5 * kl_k1(logprobs, ref_logprobs) ** 2


def kl_k3(logprobs: Array, ref_logprobs: Array) -> Array:
    """Estimate the KL by `k3 = exp(-d) - 1 + d`: unbiased, never negative, of low variance.

    A `d` below -20 counts as -20, so that a single token can neither overflow nor outweigh all
    others; the gradient is then 0.

    Args:
      logprobs: `[...]` float, log π of the sampled tokens, in nats.
      ref_logprobs: `[...]` float, log π_ref of the same tokens, in nats.

    Returns:
      `[...]` float32, in nats per token.

    Raises:
      AssertionError: if the shapes differ.

    Source:
      Schulman 2020 (http://joschu.net/blog/kl-approx.html), k3.

    Example:
      >>> kl_k3(jnp.array([-1.0]), jnp.array([-1.5])).round(4)
      Array([0.1065], dtype=float32)
    """
    d = jnp.maximum(kl_k1(logprobs, ref_logprobs), -MAX_LOG_RATIO)
    return jnp.expm1(-d) + d


def kl_abs(logprobs: Array, ref_logprobs: Array) -> Array:
    """Compute the distance `|d|`, which is a penalty but not an estimate of the KL.

    Args:
      logprobs: `[...]` float, log π of the sampled tokens, in nats.
      ref_logprobs: `[...]` float, log π_ref of the same tokens, in nats.

    Returns:
      `[...]` float32, in nats per token.

    Raises:
      AssertionError: if the shapes differ.

    Source:
      The `abs` KL penalty of TRL and verl.

    Example:
      >>> kl_abs(jnp.array([-1.5]), jnp.array([-1.0]))
      Array([0.5], dtype=float32)
    """
    return jnp.abs(kl_k1(logprobs, ref_logprobs))


@of_logits
def kl_full(logits: Array, ref_logits: Array, *, temperature: float = 1.0) -> Array:
    """Compute the exact KL of each position, from the logits of both models.

        KL(π ‖ π_ref) = Σᵥ π(v) (log π(v) - log π_ref(v))

    Args:
      logits: `[..., V]` float, of π. A token with the logit `-inf` adds nothing.
      ref_logits: `[..., V]` float, of π_ref.
      temperature: divides both logits, as in sampling; positive.

    Returns:
      `[...]` float32, in nats per token.

    Raises:
      AssertionError: if the shapes differ.
      ValueError: if `temperature` is not positive.

    Source:
      Kullback & Leibler 1951, "On Information and Sufficiency".

    Example:
      >>> kl_full(jnp.array([0.0, 0.0]), jnp.array([0.0, 1.0])).round(4)
      Array(0.1201, dtype=float32)
    """
    check_positive(temperature=temperature)
    chex.assert_equal_shape([logits, ref_logits])
    logp, logq = (
        jax.nn.log_softmax(x.astype(jnp.float32) / temperature) for x in (logits, ref_logits)
    )
    p = jnp.exp(logp)
    possible = p > 0  # 0 · log 0 counts as 0, also in the gradient.
    return jnp.sum(p * (jnp.where(possible, logp, 0) - jnp.where(possible, logq, 0)), axis=-1)


class KLState(NamedTuple):
    """The state of a KL controller, which every checkpoint holds.

    Attributes:
      coef: `[]` float32, β, the weight of the KL penalty.

    Example:
      >>> fixed_kl(0.05).init()
      KLState(coef=Array(0.05, dtype=float32))
    """

    coef: Array


class KLController(NamedTuple):
    """A rule for the weight of the KL penalty, as a pair of pure functions.

    Attributes:
      init: returns the first state.
      update: returns the next state from the state, the mean KL of the responses of the batch
        (`[]` float32, in nats per response) and the number of responses.

    Example:
      >>> halving = KLController(
      ...     init=lambda: KLState(jnp.float32(0.5)),
      ...     update=lambda state, kl, episodes: KLState(state.coef / 2),
      ... )
      >>> halving.update(halving.init(), jnp.float32(3.0), 64).coef
      Array(0.25, dtype=float32)
    """

    init: Callable[[], KLState]
    update: Callable[[KLState, Array, int], KLState]


def fixed_kl(coef: float) -> KLController:
    """Keep the weight of the KL penalty constant.

    Args:
      coef: β, at least 0.

    Returns:
      A controller whose `update` returns the state unchanged.

    Raises:
      ValueError: if `coef` is negative.

    Example:
      >>> controller = fixed_kl(0.05)
      >>> controller.update(controller.init(), jnp.array(9.0), 64).coef
      Array(0.05, dtype=float32)
    """
    check_not_negative(coef=coef)
    return KLController(lambda: KLState(jnp.float32(coef)), lambda state, kl, episodes: state)


def adaptive_kl(init_coef: float, *, target: float, horizon: float) -> KLController:
    """Adapt the weight of the KL penalty so that the KL stays near a target.

        e = clip(KL / target - 1, -0.2, 0.2)
        β ← β max(1 + e · episodes / horizon, 0.2)

    The lower bound of the factor keeps β positive where an update has many more responses than
    `horizon`. β stays between 10⁻⁶ and 10⁶ times its first value, because it could never leave 0
    or infinity. A KL that is not finite leaves β unchanged.

    Args:
      init_coef: β at the start; positive, because a β of 0 could not change.
      target: the KL to aim for, in nats per response (not per token); positive.
      horizon: the number of responses over which β changes by at most 20 %; positive.

    Returns:
      A controller. Its `update` takes the state, the mean KL of the responses and their number.

    Raises:
      ValueError: if `init_coef`, `target` or `horizon` is not positive.

    Source:
      Ziegler et al. 2019 (https://arxiv.org/abs/1909.08593), section 2.2. As in their code,
      `episodes / horizon` takes the place of the paper's K_β. Checked against OpenRLHF, which sets
      no bounds.

    Example:
      >>> controller = adaptive_kl(0.2, target=6.0, horizon=10000)
      >>> controller.update(controller.init(), jnp.array(12.0), 500).coef
      Array(0.202, dtype=float32)
    """
    if not (init_coef > 0 and target > 0 and horizon > 0):
        raise ValueError(
            "adaptive_kl needs a positive init_coef, target and horizon, not "
            f"init_coef={init_coef}, target={target} and horizon={horizon}."
        )

    def update(state: KLState, kl: Array, episodes: int) -> KLState:
        error = jnp.clip(kl / target - 1, -0.2, 0.2)
        factor = jnp.maximum(1 + error * (episodes / horizon), 0.2)
        coef = jnp.clip(state.coef * factor, init_coef * 1e-6, init_coef * 1e6)
        return KLState(jnp.where(jnp.isfinite(kl), coef, state.coef))

    return KLController(lambda: KLState(jnp.float32(init_coef)), update)
