"""The names of the methods that a setting can choose.

Each name has its function in a table of `ppo_jax.ppo.methods`. To add a method to the package,
write its function in a file of its own, and add one line here and one there. The command line then
offers it too.

This module does not import JAX, so that the command line can list the names quickly.
"""

import enum
from typing import Any, Self


class _Method(enum.Enum):
    """An enumeration of methods; the value of a member is its name in JSON files and options."""

    reads: tuple[str, ...]

    def __new__(cls, value: str, *reads: str) -> Self:
        """Make the member of one line, `NAME = value, *reads`."""
        member = object.__new__(cls)
        member._value_ = value
        member.reads = reads
        return member

    @property
    def function(self) -> Any:
        """The function of the method, from the tables of `ppo_jax.ppo.methods`."""
        from ppo_jax.ppo.methods import FUNCTIONS  # It imports JAX.

        return FUNCTIONS[self]


class KLEstimator(_Method):
    """The per-token estimate of the KL divergence that is penalized; `function` computes it."""

    K1 = "k1"
    K2 = "k2"
    K3 = "k3"
    ABS = "abs"
    FULL = "full"


class KLLoss(_Method):
    """The KL in the loss; `function` computes it from log-probs and a mask.

    With a plus, the value is that of the estimator and the gradient that of the KL.
    """

    K2 = "k2"
    K1_PLUS = "k1+"
    K3_PLUS = "k3+"
    K3 = "k3"


class Advantage(_Method):
    """The advantage estimator; `function` makes it from the settings and a mapped axis.

    Behind the name stands what the estimator reads besides the rewards: the `values` of a critic,
    or the `groups` of responses to the same prompt.
    """

    GAE = "gae", "values"
    VAPO = "vapo", "values"
    EVPO = "evpo", "values"
    MONTE_CARLO = "monte_carlo"
    GRPO = "grpo", "groups"
    DR_GRPO = "dr_grpo", "groups"
    RLOO = "rloo", "groups"
    MAXRL = "maxrl", "groups"
    REINFORCE_PP = "reinforce_pp"
    REINFORCE_PP_BASELINE = "reinforce_pp_baseline", "groups"
    BATCH_MEAN = "batch_mean"

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

    PPO = "ppo"
    CISPO = "cispo"
    DIS = "dis"
    DPPO_TV = "dppo_tv"
    DPPO_KL = "dppo_kl"
    SAPO = "sapo"
    GSPO = "gspo"
    GMPO = "gmpo"
    VESPO = "vespo"


class Weighting(_Method):
    """How the loss weighs tokens; `function` computes the mean or sum and its divisor."""

    TOKEN = "token"
    SEQUENCE = "sequence"
    SEQUENCE_SUM = "sequence_sum"
    CONSTANT_LENGTH = "constant_length"
    TOKEN_SUM = "token_sum"


class Importance(_Method):
    """The weights of tokens that a sampler drew whose log-probs differ from the trainer's.

    `function` computes them from the log-probs of both and a mask; its keywords `low` and `high`
    have the values of released code by default.
    """

    NONE = "none"
    TIS = "tis"
    SEQUENCE_TIS = "sequence_tis"
    ICEPOP = "icepop"
    SEQUENCE_MASK = "sequence_mask"
    GEOMETRIC_MASK = "geometric_mask"

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
