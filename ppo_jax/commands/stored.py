"""Read the options of a run of `ppo-jax train` from its folder."""

from pathlib import Path

from ppo_jax.commands.train import Train
from ppo_jax.errors import SettingError
from ppo_jax.run.resume import read_config
from ppo_jax.run.serialize import from_json


def stored_command(run_folder: Path) -> Train:
    """Return the options of a run of `ppo-jax train`, from its `config.json`.

    Raises:
      ValueError: if the folder holds no such run, or its options are invalid.
    """
    stored = read_config(run_folder)["settings"].get("command")
    if stored is None:
        raise ValueError(f"{run_folder} was not made by ppo-jax train.")
    try:
        return from_json(Train, stored)
    except SettingError as error:
        raise ValueError(
            f"The settings in {run_folder / 'config.json'} are not those of a run: {error}"
        ) from error
