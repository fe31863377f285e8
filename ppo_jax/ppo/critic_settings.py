"""Which critic a run has, and the settings of a critic with an optimizer of its own."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ppo_jax.errors import SettingError, check_numbers
from ppo_jax.ppo.unread import check_critic_settings

if TYPE_CHECKING:
    from ppo_jax.ppo.settings import PPOConfig


@dataclass(frozen=True, kw_only=True)
class CriticConfig:
    """How the critic is trained, if it has an optimizer of its own.

    Raises:
      SettingError: if a setting is out of range, or set without `learning_rate`.

    Example:
      >>> CriticConfig(learning_rate=1e-4, epochs=8, warmup_updates=10).weight_decay
      0.0
    """

    learning_rate: float | None = None
    """Learning rate of the critic's own optimizer: each update then trains
    the critic on the value loss first, and the policy after that. None: one
    optimizer step trains the policy and the critic together."""
    epochs: int | None = None
    """The critic makes this many passes over the responses of an update, with
    as many minibatches as the policy. None: as many as the policy."""
    warmup_updates: int = 0
    """The policy is frozen during this many first updates of the run, which
    train the critic only (arXiv:2503.01491)."""
    warmup_steps: int = 0
    """The critic's learning rate rises linearly from 0 over this many of its
    optimizer steps."""
    decay_learning_rate: bool = False
    """Decay the critic's learning rate linearly to 0 over the updates of the
    run."""
    weight_decay: float = 0.0
    """Decoupled weight decay of the critic's AdamW."""
    freeze_attention: bool = False
    """The attention layers of a critic with its own trunk keep the parameters
    that they start with (arXiv:2607.07508)."""
    max_grad_norm: float | None = 1.0
    """Gradients of the critic are scaled down to at most this global norm
    (metric critic/grad_norm). None: never."""

    def __post_init__(self) -> None:
        """Check every setting."""
        check_numbers(self, prefix="critic.")
        for name in ("learning_rate", "epochs", "max_grad_norm"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise SettingError(f"critic.{name} must be positive, or none, but is {value}.")
        for name in ("warmup_updates", "warmup_steps", "weight_decay"):
            if getattr(self, name) < 0:
                raise SettingError(
                    f"critic.{name} must not be negative, but is {getattr(self, name)}."
                )
        default = {name: field.default for name, field in self.__dataclass_fields__.items()}
        changed = [name for name, value in vars(self).items() if value != default[name]]
        if changed and self.learning_rate is None:
            raise SettingError(
                f"critic.{changed[0]}={getattr(self, changed[0])} is for a critic with its own "
                "optimizer; set critic.learning_rate as well."
            )


def choose_critic(
    critic: str | Path, ppo: "PPOConfig", *, own_advantage: bool = False
) -> str | Path:
    """Return the critic that "auto" stands for, and check that the settings go with the critic.

    Args:
      critic: "auto", or another critic that `assemble` takes.
      ppo: the settings.
      own_advantage: whether a function of one's own replaces `ppo.advantage`. It may read values or
        not, so that every critic goes with it, and "auto" is a separate one.

    Returns:
      The critic; "auto" becomes "none" if the advantage estimator reads no values, and "separate"
      otherwise.

    Raises:
      SettingError: if the estimator reads values and there is no critic, or the other way round, or
        if a setting has no effect with the critic.

    Example:
      >>> from ppo_jax import PPOConfig
      >>> choose_critic("auto", PPOConfig())
      'separate'
      >>> choose_critic("auto", PPOConfig(advantage="grpo", group_size=2))
      'none'
    """
    reads = own_advantage or ppo.advantage.reads_values
    if critic == "auto":
        critic = "separate" if reads else "none"
    if critic == "none" and reads and not own_advantage:
        raise SettingError(
            "critic=none needs an advantage estimator that reads no values, but "
            f"advantage={ppo.advantage.value} reads them."
        )
    if critic != "none" and not reads:
        raise SettingError(
            f"critic={critic} needs an advantage estimator that reads values, but "
            f"advantage={ppo.advantage.value} reads none; leave out the critic."
        )
    check_critic_settings(ppo, str(critic))
    return critic
