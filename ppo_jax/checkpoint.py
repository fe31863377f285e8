"""Checkpoints of a run through Orbax: one pytree of all that changes."""

from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from ppo_jax.iteration import PPOState


class Checkpoints:
    """The newest `keep` checkpoints of a run's folder, each written whole or not at all."""

    def __init__(self, folder: Path, *, keep: int = 2):
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, enable_async_checkpointing=False)
        self._manager = ocp.CheckpointManager(folder.absolute(), options=options)

    def save(self, state: PPOState) -> None:
        self._manager.save(int(state.update), args=ocp.args.StandardSave(_arrays(state)))

    def latest(self) -> int | None:
        """The number of updates of the newest, or None."""
        return self._manager.latest_step()

    def restore(self, like: PPOState, step: int | None = None) -> PPOState:
        """A state of the structure of `like`.

        Raises:
          ValueError: if there is none, or it does not fit.
        """
        step = self.latest() if step is None else step
        if step is None:
            raise ValueError(f"{self._manager.directory} holds no checkpoint to resume from.")
        try:
            stored = self._manager.restore(step, args=ocp.args.StandardRestore(_arrays(like)))
        except (ValueError, KeyError, TypeError, OSError) as error:
            raise ValueError(f"Checkpoint {step} in {self._manager.directory} does not fit this run: {error}") from error
        train = like.train.replace(**stored["train"])
        return like.replace(**{**stored, "train": train, "key": jax.random.wrap_key_data(stored["key"])})

    def close(self) -> None:
        self._manager.close()


def _arrays(state: PPOState) -> dict[str, Any]:
    """The state without what Orbax does not store: functions and typed keys."""
    train = {"step": state.train.step, "params": state.train.params, "opt_state": state.train.opt_state}
    return {
        "train": train,
        "kl": state.kl,
        "scale": state.scale,
        "key": jax.random.key_data(state.key),
        "update": state.update,
    }
