"""The settings of the train loop."""

import dataclasses

from ppo_jax.errors import SettingError, check_numbers
from ppo_jax.run.faults import Faults


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoopConfig:
    """How long to run and what to write. Only the seed shapes the result, and `updates` where the learning rate decays."""

    updates: int = 100
    """PPO updates."""
    seed: int = 0
    """Of sampling, shuffling and new parameters."""
    eval_every: int = 0
    """Updates between evaluations on held-out prompts; 0: only at the end."""
    save_every: int = 50
    """Updates between checkpoints; 0: only at the end."""
    keep: int = 2
    """Newest checkpoints kept, beside the one that evaluated best, which is saved whether due or not."""
    samples: int = 4
    """Sampled texts written an update."""
    tensorboard: bool = True
    """Write TensorBoard events."""
    wandb_project: str | None = None
    """Also log to this Weights & Biases project."""
    progress: bool = True
    """Show a progress bar on stderr, or a line an update where that is no terminal."""
    faults: Faults = dataclasses.field(default_factory=Faults)

    def __post_init__(self):
        check_numbers(self)
        for name in ("updates", "keep"):
            if getattr(self, name) < 1:
                raise SettingError(f"{name} must be at least 1, not {getattr(self, name)}.")
        for name in ("eval_every", "save_every", "samples"):
            if getattr(self, name) < 0:
                raise SettingError(f"{name} must not be negative, but is {getattr(self, name)}.")
