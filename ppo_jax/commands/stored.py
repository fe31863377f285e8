"""Read the options of a run from its folder."""

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


def split_seed(folder: Path, file: str = "config.json") -> int:
    """Return the seed by which the held-out rows of a run were chosen.

    Args:
      folder: the folder of the run.
      file: the name of the file with its settings.

    Returns:
      The seed; 0 if there is no run, or if it held out no part of its rows.

    Raises:
      ValueError: if the file cannot be read.
    """
    if not (folder / file).exists():
        return 0
    settings = read_config(folder, file)["settings"]
    options = settings.get("training") or settings.get("command") or {}
    return options.get("eval_seed") or 0
