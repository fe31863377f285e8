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


class _Method(enum.Enum):
    """An enumeration of methods; the value of a member is its name in JSON files and options."""

    function: Any
    reads: tuple[str, ...]

    def __new__(cls, value: str, function: Any, *reads: str) -> Self:
        """Make the member of one line, `NAME = value, function, *reads`."""
        member = object.__new__(cls)
        member._value_ = value
        member.function, member.reads = function, reads
        return member


class KLEstimator(_Method):
    """The per-token estimate of the KL divergence that is penalized; `function` computes it."""

    function: KLEstimatorFn
    K1 = "k1", kl.kl_k1
    K2 = "k2", kl.kl_k2
    K3 = "k3", kl.kl_k3
    ABS = "abs", kl.kl_abs
    FULL = "full", kl.kl_full


def _plain_k3(
    logprobs: Array, ref_logprobs: Array, mask: Array, *, old_logprobs: Array, aggregate: Aggregate
) -> Array:
    """The estimate k3 itself as a loss, whose gradient is biased."""
    return aggregate(kl.kl_k3(*hide_masked(mask, logprobs, ref_logprobs)), mask)


class KLLoss(_Method):
    """The KL in the loss; `function` computes it from log-probs and a mask.

    With a plus, the value is that of the estimator and the gradient that of the KL.
    """

    function: Callable[..., Array]
    K2 = "k2", kl_loss
    K1_PLUS = "k1+", partial(kl_loss, estimator=kl.kl_k1)
    K3_PLUS = "k3+", partial(kl_loss, estimator=kl.kl_k3)
    K3 = "k3", _plain_k3


class Advantage(_Method):
    """The advantage estimator; `function` makes it from the settings and a mapped axis.

    Behind the function stands what the estimator reads besides the rewards: the `values` of a
    critic, or the `groups` of responses to the same prompt.
    """

    function: Callable[..., AdvantageFn]
    GAE = "gae", lambda config, axis_name=None: gae(gamma=config.gamma, lam=config.lam), "values"
    VAPO = "vapo", lambda config, axis_name=None: vapo_gae(gamma=config.gamma), "values"
    EVPO = "evpo", evpo, "values"
    MONTE_CARLO = "monte_carlo", lambda config, axis_name=None: monte_carlo(gamma=config.gamma)
    GRPO = "grpo", of_groups(grpo_advantages), "groups"
    DR_GRPO = "dr_grpo", of_groups(dr_grpo_advantages), "groups"
    RLOO = "rloo", of_groups(rloo_advantages), "groups"
    MAXRL = "maxrl", of_groups(maxrl_advantages), "groups"
    REINFORCE_PP = "reinforce_pp", reinforce_pp(baseline=False)
    REINFORCE_PP_BASELINE = "reinforce_pp_baseline", reinforce_pp(baseline=True), "groups"
    BATCH_MEAN = "batch_mean", batch_mean

    @property
    def reads_values(self) -> bool:
        """Whether the estimator needs a critic."""
        return "values" in self.reads

    @property
    def reads_groups(self) -> bool:
        """Whether the estimator compares several responses to each prompt."""
        return "groups" in self.reads


class Loss(_Method):
    """The loss of a minibatch and its metrics; `function` makes both from the settings."""

    function: Callable[["PPOConfig"], tuple[losses.ResponseLossFn, Callable[..., LossMetrics]]]
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


class Importance(_Method):
    """The weights of tokens that a sampler drew whose log-probs differ from the trainer's.

    `function` computes them from the log-probs of both and a mask; its keywords `low` and `high`
    have the values of released code by default.
    """

    function: Callable[..., Array] | None
    NONE = "none", None
    TIS = "tis", partial(truncated_weights, low=0.0, high=2.0)
    SEQUENCE_TIS = (
        "sequence_tis",
        partial(truncated_weights, low=0.0, high=2.0, level=Level.SEQUENCE),
    )
    ICEPOP = "icepop", partial(bounded_weights, low=0.5, high=5.0)
    SEQUENCE_MASK = (
        "sequence_mask",
        partial(bounded_weights, low=0.0, high=3.0, level=Level.SEQUENCE),
    )
    GEOMETRIC_MASK = "geometric_mask", partial(sequence_masked_weights, low=0.5, high=5.0)

    @property
    def by_token(self) -> bool:
        """Whether the tokens of a response may have different weights."""
        return self in (Importance.TIS, Importance.ICEPOP, Importance.GEOMETRIC_MASK)


class OldLogprobs(enum.Enum):
    """Which log-probs the probability ratio divides by.

    Attributes:
      SCORED: those that the trainer computes before the update.
      SAMPLER: those that the sampler computed.
    """

    SCORED = "scored"
    SAMPLER = "sampler"
