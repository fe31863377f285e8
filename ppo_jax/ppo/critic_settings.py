"""The settings of a critic with an optimizer of its own."""

from dataclasses import dataclass

from ppo_jax.errors import SettingError, check_numbers


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
