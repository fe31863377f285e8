"""The methods that a setting can choose by name.

Each line of an enumeration pairs a name with an implementation. To add a method to the package,
write its function in a file of its own, import it here and add one line to the enumeration. The
command line then offers it too. A method that only one program uses needs no line here: hand the
function itself to `learn`, `make_experience`, `score_rollout` or `ppo_loss_fn`.
"""

import enum
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, Self

from jax import Array

from ppo_jax.ops import kl, losses
from ppo_jax.ops.advantages import (
    decoupled_gae,
    discounted_returns,
    generalized_advantage_estimation,
    length_adaptive_lambda,
)
from ppo_jax.ops.aggregation import SEQUENCE_SUM, TOKEN_SUM, constant_length
from ppo_jax.ops.dppo import binary_kl, dppo_loss
from ppo_jax.ops.masked import BY_SEQUENCE, BY_TOKEN, Aggregation
from ppo_jax.ops.metrics import policy_metrics
from ppo_jax.ops.policy_losses import cispo_loss, dis_loss, sapo_loss
from ppo_jax.ops.sequence_losses import gmpo_loss, gspo_loss, vespo_loss
from ppo_jax.types import (
    AdvantageFn,
    KLEstimatorFn,
    LossMetrics,
    ResponseLossFn,
    Rollout,
    Scores,
)

if TYPE_CHECKING:
    from ppo_jax.ppo.settings import PPOConfig


def gae(*, gamma: float, lam: float) -> AdvantageFn:
    """Make an `AdvantageFn` of generalized advantage estimation.

    Args:
      gamma: discount per token.
      lam: λ, which trades bias (0) for variance (1).

    Returns:
      The estimator; it needs neither the rollout nor the scores.

    Source:
      Schulman et al. 2015 (https://arxiv.org/abs/1506.02438), equations 11-16.

    Example:
      >>> import jax.numpy as jnp
      >>> rewards, mask = jnp.array([[0.0, 1.0]]), jnp.ones((1, 2), bool)
      >>> advantage_fn = gae(gamma=1.0, lam=0.5)
      >>> advantages, returns = advantage_fn(
      ...     rewards, 0 * rewards, mask, rollout=None, scores=None)
      >>> advantages
      Array([[0.5, 1. ]], dtype=float32)
    """
    estimate = partial(generalized_advantage_estimation, gamma=gamma, lam=lam)
    return lambda rewards, values, mask, *, rollout, scores: estimate(rewards, values, mask)


def vapo_gae(*, gamma: float, alpha: float = 0.05) -> AdvantageFn:
    """Make an `AdvantageFn` whose λ grows with the response, and whose returns have λ = 1.

    Args:
      gamma: discount per token.
      alpha: see `length_adaptive_lambda`. The default is that of VAPO.

    Returns:
      The estimator; it needs neither the rollout nor the scores.

    Source:
      Yue et al. 2025, VAPO (https://arxiv.org/abs/2504.05118).

    Example:
      >>> import jax.numpy as jnp
      >>> rewards, mask = jnp.array([[0.0, 1.0]]), jnp.ones((1, 2), bool)
      >>> advantage_fn = vapo_gae(gamma=1.0, alpha=1.0)
      >>> advantages, returns = advantage_fn(
      ...     rewards, 0 * rewards, mask, rollout=None, scores=None)
      >>> advantages, returns
      (Array([[0.5, 1. ]], dtype=float32), Array([[1., 1.]], dtype=float32))
    """

    def estimate(
        rewards: Array, values: Array, mask: Array, *, rollout: Rollout, scores: Scores
    ) -> tuple[Array, Array]:
        lam = length_adaptive_lambda(mask, alpha=alpha)
        return decoupled_gae(rewards, values, mask, gamma=gamma, lam_policy=lam)

    return estimate


def monte_carlo(*, gamma: float) -> AdvantageFn:
    """Make an `AdvantageFn` that uses the sum of later rewards, without a critic.

    Whitened over the batch, as `whiten_advantages` does, these are the advantages of REINFORCE++.

    Args:
      gamma: discount per token.

    Returns:
      The estimator; it needs neither the values, the rollout nor the scores.

    Source:
      Hu et al. 2025 (https://arxiv.org/abs/2501.03262).

    Example:
      >>> import jax.numpy as jnp
      >>> rewards, mask = jnp.array([[0.0, 1.0]]), jnp.ones((1, 2), bool)
      >>> monte_carlo(gamma=0.5)(rewards, rewards, mask, rollout=None, scores=None)[0]
      Array([[0.5, 1. ]], dtype=float32)
    """

    def estimate(
        rewards: Array, values: Array, mask: Array, *, rollout: Rollout, scores: Scores
    ) -> tuple[Array, Array]:
        returns = discounted_returns(rewards, mask, gamma=gamma)
        return returns, returns

    return estimate


def with_policy_loss(
    config: "PPOConfig", policy_loss: losses.PolicyLossFn
) -> tuple[ResponseLossFn, Callable[..., LossMetrics]]:
    """Combine a loss of the policy with the value loss, entropy and metrics of the settings.

    Args:
      config: the settings.
      policy_loss: the loss of the policy with its hyper-parameters bound.

    Returns:
      The loss of `[B, R]` arrays and its metrics, as `ppo_loss_fn` takes them.

    Example:
      >>> from ppo_jax import PPOConfig, sapo_loss
      >>> loss, metrics = with_policy_loss(PPOConfig(vf_coef=0.5), sapo_loss)
      >>> loss.keywords["vf_coef"]
      0.5
    """
    loss = partial(
        losses.actor_critic_loss,
        policy_loss=policy_loss,
        value_clip=config.value_clip,
        vf_coef=config.vf_coef,
        entropy_coef=config.entropy_coef,
    )
    return loss, partial(policy_metrics, clip_low=config.clip_low, clip_high=config.clip_high)


def _clipped(policy_loss: Callable[..., Array], **options: Any) -> Callable:
    """Make a loss whose clip is that of the settings."""
    return lambda config: with_policy_loss(
        config,
        partial(policy_loss, clip_low=config.clip_low, clip_high=config.clip_high, **options),
    )


def clipped_ppo(config: "PPOConfig") -> tuple[ResponseLossFn, Callable[..., LossMetrics]]:
    """Make the clipped PPO loss and its metrics with the hyper-parameters of the settings.

    Args:
      config: the settings.

    Returns:
      The loss of `[B, R]` arrays and its metrics, as `ppo_loss_fn` takes them.

    Example:
      >>> from ppo_jax import PPOConfig
      >>> loss, metrics = clipped_ppo(PPOConfig(clip_high=0.28))
      >>> loss.keywords["clip_high"], metrics.keywords["clip_high"]
      (0.28, 0.28)
    """
    low, high = config.clip_low, config.clip_high
    loss = partial(
        losses.ppo_loss,
        clip_low=low,
        clip_high=high,
        value_clip=config.value_clip,
        vf_coef=config.vf_coef,
        entropy_coef=config.entropy_coef,
        dual_clip=config.dual_clip,
    )
    return loss, partial(policy_metrics, clip_low=low, clip_high=high)


class _Method(enum.Enum):
    """An enumeration of methods; the value of a member is its name in JSON files and options."""

    function: Any

    def __new__(cls, value: str, function: Any) -> Self:
        """Make the member of one line, `NAME = value, function`."""
        member = object.__new__(cls)
        member._value_ = value
        member.function = function
        return member


class KLEstimator(_Method):
    """The per-token estimate of the KL divergence that is penalized; `function` computes it."""

    function: KLEstimatorFn
    K1 = "k1", kl.kl_k1
    K2 = "k2", kl.kl_k2
    K3 = "k3", kl.kl_k3
    ABS = "abs", kl.kl_abs
    FULL = "full", kl.kl_full


class Advantage(_Method):
    """The advantage estimator; `function` makes it from the settings."""

    function: Callable[["PPOConfig"], AdvantageFn]

    @property
    def reads_values(self) -> bool:
        """Whether the estimator needs a critic."""
        return self not in (Advantage.MONTE_CARLO,)

    GAE = "gae", lambda config: gae(gamma=config.gamma, lam=config.lam)
    VAPO = "vapo", lambda config: vapo_gae(gamma=config.gamma)
    MONTE_CARLO = "monte_carlo", lambda config: monte_carlo(gamma=config.gamma)


class Loss(_Method):
    """The loss of a minibatch and its metrics; `function` makes both from the settings."""

    function: Callable[["PPOConfig"], tuple[ResponseLossFn, Callable[..., LossMetrics]]]
    PPO = "ppo", clipped_ppo
    CISPO = "cispo", _clipped(cispo_loss)
    DIS = "dis", _clipped(dis_loss)
    DPPO_TV = "dppo_tv", _clipped(dppo_loss)
    DPPO_KL = "dppo_kl", _clipped(dppo_loss, divergence=binary_kl)
    SAPO = "sapo", lambda config: with_policy_loss(config, sapo_loss)
    GSPO = "gspo", _clipped(gspo_loss)
    GMPO = "gmpo", _clipped(gmpo_loss)
    VESPO = "vespo", lambda config: with_policy_loss(config, vespo_loss)


class Weighting(_Method):
    """How the loss weighs tokens; `function` computes the mean or sum and its divisor."""

    function: Aggregation
    TOKEN = "token", BY_TOKEN
    SEQUENCE = "sequence", BY_SEQUENCE
    SEQUENCE_SUM = "sequence_sum", SEQUENCE_SUM
    CONSTANT_LENGTH = "constant_length", constant_length()
    TOKEN_SUM = "token_sum", TOKEN_SUM
