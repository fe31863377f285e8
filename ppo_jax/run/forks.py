"""Start a new run from a checkpoint of another run, with other settings."""

from pathlib import Path
from typing import Any, NamedTuple

from ppo_jax.errors import SettingError
from ppo_jax.hashing import digest
from ppo_jax.ppo.state import PPOState
from ppo_jax.run import provenance
from ppo_jax.run.differences import setting_differences
from ppo_jax.run.remote import local_copy
from ppo_jax.run.resume import RunConfig, read_config
from ppo_jax.run.settings import Which
from ppo_jax.run.stored import read_checkpoint
from ppo_jax.stores import store_url

_CONTROLLER = ("kl_coef", "kl_target", "kl_horizon")  # settings of the KL penalty's controller


class Fork(NamedTuple):
    """The checkpoint of another run that a new run starts from.

    Attributes:
      run: the folder of the other run, in which nothing changes.
      which: the number of updates of the checkpoint, "best" or "last".

    Example:
      >>> Fork(Path("runs/a"), 40).which
      40
    """

    run: Path
    which: Which = "last"


def start_from(
    fork: Fork, state: PPOState, config: RunConfig, *, updates: int
) -> tuple[PPOState, dict[str, Any]]:
    """Read the state that a forked run starts from.

    Parameters, the optimizer's state, the moments of the scores and the number of updates are those
    of the checkpoint. The random key is the new run's. The KL controller keeps its state unless
    one of its settings has changed. A moving reference is that of the checkpoint if both runs move
    it, and starts as in a new run otherwise.

    Args:
      fork: the checkpoint.
      state: the initial state of the new run; the result has its structure and sharding.
      config: the settings and hashes of the new run.
      updates: the number of updates of the new run, which includes those of the checkpoint.

    Returns:
      The state, and what `config.json` records: the run, the number of its updates, the digest of
      the parameters, and each setting and hash that differs, with both values.

    Raises:
      ValueError: if there is no such checkpoint, or if its arrays do not fit `state`.
      SettingError: if `updates` is not larger than the number of updates of the checkpoint.
    """
    run = local_copy(fork.run)
    before = read_config(run)
    like = state.replace(reference=state.policy if _moves(before["settings"]) else None)
    stored = read_checkpoint(run, like, fork.which)
    update = int(stored.update)
    if update >= updates:
        raise SettingError(
            f"The checkpoint of {fork.run} already has {update} updates, which count towards "
            f"updates={updates}; set updates above {update}."
        )
    old, new = before["settings"]["ppo"], config.settings["ppo"]
    if any(old[name] != new[name] for name in _CONTROLLER):
        stored = stored.replace(kl=state.kl)
    if state.reference is None or stored.reference is None:
        stored = stored.replace(reference=state.reference)
    changes = [
        *setting_differences(before["settings"], config.settings),
        *provenance.differences(before["hashes"], config.hashes, "hash of"),
    ]
    origin = {
        "run": store_url(fork.run) or str(fork.run.resolve()),
        "update": update,
        "digest": digest(stored.params),
        "changes": {name: [a, b] for name, a, b in changes},
    }
    return stored.replace(key=state.key), origin


def _moves(settings: dict[str, Any]) -> bool:
    """Return whether the reference of a run with these settings moves."""
    ppo = settings["ppo"]
    return ppo["reference_every"] is not None or ppo["reference_decay"] is not None
