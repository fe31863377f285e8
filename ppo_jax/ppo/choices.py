"""The methods that a setting can choose by name.

A method is one line: its name, its function and what it reads. To add one to the package, write its
function in a file of its own and add its line here. A method that only one program uses needs no
line: hand the function itself to `learn`, `make_experience`, `score_rollout` or `ppo_loss_fn`.

The functions are looked up when they are first needed, because their modules import JAX, and the
command line should list the names quickly.
"""

import enum
import functools
import importlib
from collections.abc import Callable
from functools import partial
from typing import Any, Self


class _Module:
    """A module that is imported when one of its attributes is first needed."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, attribute: str) -> Any:
        return getattr(importlib.import_module(self._name), attribute)


def _ops(name: str) -> _Module:
    """Return a module of `ppo_jax.ops`."""
    return _Module(f"ppo_jax.ops.{name}")


aggregation, dppo, groups = _ops("aggregation"), _ops("dppo"), _ops("group_advantages")
importance, kl, kl_loss = _ops("importance"), _ops("kl"), _ops("kl_loss")
masked, policy_losses = _ops("masked"), _ops("policy_losses")
sequence_losses = _ops("sequence_losses")
estimators, methods = _Module("ppo_jax.ppo.estimators"), _Module("ppo_jax.ppo.methods")

_CLIP = ("clip_low", "clip_high")
_ANY = "any clip_low"
_BOUNDS = ("importance_range",)
_OTHERS = ("values", "groups", _ANY)  # What a line may hold that is no setting.


class Method(enum.Enum):
    """An enumeration of methods; the value of a member is its name in JSON files and options.

    The items after its function are what it reads: settings, by which the check in `unread` refuses
    those that the chosen method does not read, the inputs `values` and `groups`, and what else the
    enumeration says.
    """

    reads: tuple[str, ...]
    look_up: Callable[[], Any]

    def __new__(cls, value: str, look_up: Callable[[], Any], *reads: str) -> Self:
        """Make the member of one line, `NAME = value, look_up, *reads`."""
        member = object.__new__(cls)
        member._value_ = value
        member.look_up = functools.cache(look_up)
        member.reads = reads
        return member

    @property
    def function(self) -> Any:
        """The function of the method, always the same object."""
        return self.look_up()

    @classmethod
    def settings(cls) -> tuple[str, ...]:
        """The settings that some method of this kind reads."""
        read = dict.fromkeys(name for member in cls for name in member.reads)
        return tuple(name for name in read if name not in _OTHERS)

    @property
    def unread(self) -> tuple[str, ...]:
        """The settings that other methods of this kind read, but not this one."""
        return tuple(name for name in self.settings() if name not in self.reads)


class KLEstimator(Method):
    """The per-token estimate of the KL divergence that is penalized; `function` computes it."""

    K1 = "k1", lambda: kl.kl_k1
    K2 = "k2", lambda: kl.kl_k2
    K3 = "k3", lambda: kl.kl_k3
    ABS = "abs", lambda: kl.kl_abs
    FULL = "full", lambda: kl.kl_full


class KLLoss(Method):
    """The KL in the loss; `function` computes it from log-probs and a mask.

    Names with "+" have the estimator's value but the gradient of the true KL.
    """

    K2 = "k2", lambda: kl_loss.kl_loss
    K1_PLUS = "k1+", lambda: partial(kl_loss.kl_loss, estimator=kl.kl_k1)
    K3_PLUS = "k3+", lambda: partial(kl_loss.kl_loss, estimator=kl.kl_k3)
    K3 = "k3", lambda: methods.plain_k3


class Advantage(Method):
    """The advantage estimator; `function` makes it from the settings and a mapped axis.

    Besides rewards, it may read the `values` of a critic, the `groups` of responses to the same
    prompt, and settings.
    """

    GAE = "gae", lambda: methods.with_settings(estimators.gae), "values", "gamma", "lam"
    VAPO = "vapo", lambda: methods.with_settings(estimators.vapo_gae), "values", "gamma"
    SAO = "sao", lambda: methods.with_settings(estimators.sao_gae), "values", "gamma"
    EVPO = "evpo", lambda: estimators.evpo, "values", "gamma", "lam"
    MONTE_CARLO = "monte_carlo", lambda: methods.with_settings(estimators.monte_carlo), "gamma"
    GRPO = "grpo", lambda: estimators.of_groups(groups.grpo_advantages), "groups"
    DR_GRPO = "dr_grpo", lambda: estimators.of_groups(groups.dr_grpo_advantages), "groups"
    RLOO = "rloo", lambda: estimators.of_groups(groups.rloo_advantages), "groups"
    MAXRL = "maxrl", lambda: estimators.of_groups(groups.maxrl_advantages), "groups"
    REINFORCE_PP = "reinforce_pp", lambda: estimators.reinforce_pp(baseline=False), "gamma"
    REINFORCE_PP_BASELINE = (
        "reinforce_pp_baseline",
        lambda: estimators.reinforce_pp(baseline=True),
        "groups",
        "gamma",
    )
    BATCH_MEAN = "batch_mean", lambda: estimators.batch_mean

    @property
    def reads_values(self) -> bool:
        """Whether the estimator needs a critic."""
        return "values" in self.reads

    @property
    def reads_groups(self) -> bool:
        """Whether the estimator compares several responses to each prompt."""
        return "groups" in self.reads


class Loss(Method):
    """The loss of a minibatch and its metrics; `function` makes both from the settings.

    `clip_low` may be over 1 only in a loss that has "any clip_low" in its line. In the others it is
    the bound of a ratio or of a probability.
    """

    PPO = "ppo", lambda: methods.clipped_ppo, *_CLIP, "dual_clip"
    CISPO = (
        "cispo",
        lambda: methods.clipped(policy_losses.cispo_loss, policy_losses.cispo_clip),
        *_CLIP,
        _ANY,
    )
    DIS = "dis", lambda: methods.clipped(policy_losses.dis_loss, policy_losses.dis_clip), *_CLIP
    DPPO_TV = "dppo_tv", lambda: methods.clipped(dppo.dppo_loss, dppo.dppo_clip), *_CLIP
    DPPO_KL = (
        "dppo_kl",
        lambda: methods.clipped(dppo.dppo_loss, dppo.dppo_clip, divergence=dppo.binary_kl),
        *_CLIP,
        _ANY,
    )
    SAPO = "sapo", lambda: methods.unclipped(policy_losses.sapo_loss)
    GSPO = (
        "gspo",
        lambda: methods.clipped(sequence_losses.gspo_loss, sequence_losses.gspo_clip),
        *_CLIP,
    )
    GMPO = (
        "gmpo",
        lambda: methods.clipped(sequence_losses.gmpo_loss, sequence_losses.gmpo_clip),
        *_CLIP,
        _ANY,
    )
    VESPO = "vespo", lambda: methods.unclipped(sequence_losses.vespo_loss)

    @property
    def any_clip_low(self) -> bool:
        """Whether `clip_low` may be over 1."""
        return _ANY in self.reads


class Weighting(Method):
    """How the loss weighs tokens; `function` computes the mean or sum and its divisor."""

    TOKEN = "token", lambda: masked.BY_TOKEN
    SEQUENCE = "sequence", lambda: masked.BY_SEQUENCE
    SEQUENCE_SUM = "sequence_sum", lambda: aggregation.SEQUENCE_SUM
    CONSTANT_LENGTH = "constant_length", lambda: aggregation.constant_length()
    TOKEN_SUM = "token_sum", lambda: aggregation.TOKEN_SUM


class Importance(Method):
    """The weights of tokens that a sampler drew whose log-probs differ from the trainer's.

    `function` computes them from the log-probs of both and a mask; its keywords `low` and `high`
    have the values of released code by default.
    """

    NONE = "none", lambda: None
    TIS = "tis", lambda: methods.truncated(0.0, 2.0), *_BOUNDS
    SEQUENCE_TIS = "sequence_tis", lambda: methods.truncated(0.0, 2.0, by_response=True), *_BOUNDS
    ICEPOP = "icepop", lambda: methods.bounded(0.5, 5.0), *_BOUNDS
    SEQUENCE_MASK = "sequence_mask", lambda: methods.bounded(0.0, 3.0, by_response=True), *_BOUNDS
    GEOMETRIC_MASK = (
        "geometric_mask",
        lambda: partial(importance.sequence_masked_weights, low=0.5, high=5.0),
        *_BOUNDS,
    )

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
