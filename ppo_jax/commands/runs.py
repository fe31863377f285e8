"""The commands `ppo-jax replay`, which repeats an update of a run, and `ppo-jax compare`."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import tyro


@dataclass(frozen=True, kw_only=True)
class Compare:
    """Compare the scores of runs, with 95% intervals over prompts and over seeds.

    Runs that differ only in their seed form a group. The score is that of the last evaluation on
    held-out prompts, if all runs have one, and otherwise that of the last tenth of the updates.
    """

    example: ClassVar[str] = "ppo-jax compare runs/a runs/b"

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Folders of two or more runs of ppo-jax train."""
    exact: bool = False
    """Compare two runs bit by bit instead: settings, metrics, tokens and final parameters. The exit
    status is 1 if they differ."""

    def run(self) -> None:
        """Print the scores, or the differences."""
        from ppo_jax.commands.replaying import compare_runs

        compare_runs(self)


@dataclass(frozen=True, kw_only=True)
class Replay:
    """Repeat one update of a run of `ppo-jax train`, to the same bits.

    It starts from the newest good checkpoint before the update, or from the beginning.
    """

    example: ClassVar[str] = "ppo-jax replay runs/a --update 7 --out runs/update_7"

    run_folder: tyro.conf.Positional[Path]
    """Folder of the run. Nothing in it changes. Relative paths in its settings are resolved against
    the current folder."""
    update: int
    """Number of the update to repeat, counted from 0."""
    out: Path
    """Folder for the metrics of the update, all of its samples, and the checkpoint after it."""

    def run(self) -> None:
        """Repeat the update and print whether its metrics are those of the run."""
        from ppo_jax.commands.replaying import replay

        replay(self)
