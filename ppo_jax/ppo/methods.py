"""The functions of the methods that a setting can choose by name.

Each line of a table pairs a name of `ppo_jax.ppo.choices` with its implementation. A method that
only one program uses needs no line: hand the function itself to `learn`, `make_experience`,
`score_rollout` or `ppo_loss_fn`.
"""

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from jax import Array

from ppo_jax.ops import kl, losses
from ppo_jax.ops.aggregation import SEQUENCE_SUM, TOKEN_SUM, constant_length
from ppo_jax.ops.dppo import binary_kl, dppo_loss
from ppo_jax.ops.group_advantages import (
    dr_grpo_advantages,
    grpo_advantages,
    maxrl_advantages,
    rloo_advantages,
)
from ppo_jax.ops.importance import (
    Level,
    bounded_weights,
    sequence_masked_weights,
    truncated_weights,
)
from ppo_jax.ops.kl_loss import kl_loss
from ppo_jax.ops.masked import BY_SEQUENCE, BY_TOKEN, Aggregation
from ppo_jax.ops.metrics import policy_metrics
from ppo_jax.ops.policy_losses import cispo_loss, dis_loss, sapo_loss
from ppo_jax.ops.ratios import hide_masked
from ppo_jax.ops.sequence_losses import gmpo_loss, gspo_loss, vespo_loss
from ppo_jax.ppo.choices import Advantage, Importance, KLEstimator, KLLoss, Loss, Weighting
from ppo_jax.ppo.estimators import (
    batch_mean,
    evpo,
    gae,
    monte_carlo,
    of_groups,
    reinforce_pp,
    vapo_gae,
)
from ppo_jax.types import AdvantageFn, Aggregate, KLEstimatorFn, LossMetrics

if TYPE_CHECKING:
    from ppo_jax.ppo.settings import PPOConfig


def with_policy_loss(
    config: "PPOConfig", policy_loss: losses.PolicyLossFn
) -> tuple[losses.ResponseLossFn, Callable[..., LossMetrics]]:
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


def clipped_ppo(config: "PPOConfig") -> tuple[losses.ResponseLossFn, Callable[..., LossMetrics]]:
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
    metrics = partial(policy_metrics, clip_low=low, clip_high=high)
    return loss, metrics if config.dual_clip is None else partial(
        metrics, dual_clip=config.dual_clip
    )


def _plain_k3(
    logprobs: Array, ref_logprobs: Array, mask: Array, *, old_logprobs: Array, aggregate: Aggregate
) -> Array:
    """The estimate k3 itself as a loss, whose gradient is biased."""
    return aggregate(kl.kl_k3(*hide_masked(mask, logprobs, ref_logprobs)), mask)


_KL_ESTIMATORS: dict[KLEstimator, KLEstimatorFn] = {
    KLEstimator.K1: kl.kl_k1,
    KLEstimator.K2: kl.kl_k2,
    KLEstimator.K3: kl.kl_k3,
    KLEstimator.ABS: kl.kl_abs,
    KLEstimator.FULL: kl.kl_full,
}

_KL_LOSSES: dict[KLLoss, Callable[..., Array]] = {
    KLLoss.K2: kl_loss,
    KLLoss.K1_PLUS: partial(kl_loss, estimator=kl.kl_k1),
    KLLoss.K3_PLUS: partial(kl_loss, estimator=kl.kl_k3),
    KLLoss.K3: _plain_k3,
}

_ADVANTAGES: dict[Advantage, Callable[..., AdvantageFn]] = {
    Advantage.GAE: lambda config, axis_name=None: gae(gamma=config.gamma, lam=config.lam),
    Advantage.VAPO: lambda config, axis_name=None: vapo_gae(gamma=config.gamma),
    Advantage.EVPO: evpo,
    Advantage.MONTE_CARLO: lambda config, axis_name=None: monte_carlo(gamma=config.gamma),
    Advantage.GRPO: of_groups(grpo_advantages),
    Advantage.DR_GRPO: of_groups(dr_grpo_advantages),
    Advantage.RLOO: of_groups(rloo_advantages),
    Advantage.MAXRL: of_groups(maxrl_advantages),
    Advantage.REINFORCE_PP: reinforce_pp(baseline=False),
    Advantage.REINFORCE_PP_BASELINE: reinforce_pp(baseline=True),
    Advantage.BATCH_MEAN: batch_mean,
}

_LOSSES: dict[
    Loss, Callable[["PPOConfig"], tuple[losses.ResponseLossFn, Callable[..., LossMetrics]]]
] = {
    Loss.PPO: clipped_ppo,
    Loss.CISPO: _clipped(cispo_loss),
    Loss.DIS: _clipped(dis_loss),
    Loss.DPPO_TV: _clipped(dppo_loss),
    Loss.DPPO_KL: _clipped(dppo_loss, divergence=binary_kl),
    Loss.SAPO: lambda config: with_policy_loss(config, sapo_loss),
    Loss.GSPO: _clipped(gspo_loss),
    Loss.GMPO: _clipped(gmpo_loss),
    Loss.VESPO: lambda config: with_policy_loss(config, vespo_loss),
}

_WEIGHTINGS: dict[Weighting, Aggregation] = {
    Weighting.TOKEN: BY_TOKEN,
    Weighting.SEQUENCE: BY_SEQUENCE,
    Weighting.SEQUENCE_SUM: SEQUENCE_SUM,
    Weighting.CONSTANT_LENGTH: constant_length(),
    Weighting.TOKEN_SUM: TOKEN_SUM,
}

_IMPORTANCE: dict[Importance, Callable[..., Array] | None] = {
    Importance.NONE: None,
    Importance.TIS: partial(truncated_weights, low=0.0, high=2.0),
    Importance.SEQUENCE_TIS: partial(truncated_weights, low=0.0, high=2.0, level=Level.SEQUENCE),
    Importance.ICEPOP: partial(bounded_weights, low=0.5, high=5.0),
    Importance.SEQUENCE_MASK: partial(bounded_weights, low=0.0, high=3.0, level=Level.SEQUENCE),
    Importance.GEOMETRIC_MASK: partial(sequence_masked_weights, low=0.5, high=5.0),
}

FUNCTIONS: dict[Any, Any] = {
    **_KL_ESTIMATORS,
    **_KL_LOSSES,
    **_ADVANTAGES,
    **_LOSSES,
    **_WEIGHTINGS,
    **_IMPORTANCE,
}
