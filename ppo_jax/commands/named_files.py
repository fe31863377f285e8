"""Check the files and folders that a command names, before JAX is imported.

The commands check them again where they read or write them. Here, an error appears within a second.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ppo_jax.commands.convert import Convert
from ppo_jax.commands.evaluation import Evaluate
from ppo_jax.commands.inference import Generate
from ppo_jax.commands.parsing import DryRun
from ppo_jax.commands.plan import Plan
from ppo_jax.commands.report import Report
from ppo_jax.commands.runs import Replay
from ppo_jax.commands.supervised import SFT, Reward
from ppo_jax.commands.train import Train
from ppo_jax.commands.value import Value
from ppo_jax.data.files import check_exists, names_a_file
from ppo_jax.distributed.joining import Processes
from ppo_jax.run.files import check_free, check_links
from ppo_jax.stores import check_local, split_url, store_url


def check_named_files(command: Any) -> None:
    """Check that files to read exist, and that the folder to write to is free.

    Data sets and models of the Hugging Face hub are not looked for. Of several processes, none
    checks anything here: it would end without a word to the others, which wait for it.

    Args:
      command: what `parsing.parse` returned.

    Raises:
      ValueError: if a file does not exist, or the folder cannot be used.
    """
    match command:
        case DryRun():
            check_named_files(command.command)
        case Value():
            check_named_files(command.train)
        case Train():
            if _alone(command.processes):
                _check_run_folder(command)
                _check_rows(command.prompts, command.eval_prompts)
                _check_rewards(command.reward)
        case SFT() | Reward():
            check_free(command.out, resume=command.run_options.resume != "no")
            _check_rows(command.data, command.training.eval_data)
        case Evaluate():
            _check_rows(command.prompts)
            _check_rewards(command.reward)
        case Generate():
            _check_rows(*(text for text in command.prompts if names_a_file(text)))
    match command:
        case Evaluate() | Plan() | Report() | Convert() | Replay() if command.out is not None:
            check_links(command.out)
            if isinstance(command, Plan | Report):
                _check_folder_of(command.out)


def _alone(processes: Processes) -> bool:
    return processes == Processes() and "JAX_COORDINATOR_ADDRESS" not in os.environ


def _check_run_folder(command: Train) -> None:
    if (url := store_url(command.out)) is not None:
        split_url(url)
    else:
        check_free(command.out, resume=command.resume in ("yes", "auto"))


def _check_folder_of(file: Path) -> None:
    if not file.parent.is_dir():
        raise ValueError(f"{file} cannot be written, because {file.parent} is not a folder.")


def _check_rows(*sources: str | None) -> None:
    for source in sources:
        if source is not None:
            check_exists(source)


def _check_rewards(rewards: Sequence[str]) -> None:
    for reward in rewards:
        check_local(reward, "rewards are read from local files")
        file, _, _ = reward.rpartition(":")
        if file.endswith(".py") and not Path(file).is_file():
            raise ValueError(f"The reward file {file} does not exist.")
