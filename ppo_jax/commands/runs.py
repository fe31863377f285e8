"""The commands `ppo-jax replay`, which repeats an update of a run, and `ppo-jax compare`."""

import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NoReturn

import tyro

from ppo_jax import hashing
from ppo_jax.commands.train import Train
from ppo_jax.errors import SettingError
from ppo_jax.run import provenance
from ppo_jax.run.checkpoints import Checkpoints
from ppo_jax.run.compare import compare, metric_differences
from ppo_jax.run.files import check_free, read_lines, store_url
from ppo_jax.run.forks import Fork
from ppo_jax.run.history import by_settings, read_history
from ppo_jax.run.logging import SKIPPED, finite
from ppo_jax.run.remote import local_copy
from ppo_jax.run.resume import read_config
from ppo_jax.run.score_tables import print_scores
from ppo_jax.run.serialize import from_json
from ppo_jax.run.stored import newest_good
from ppo_jax.run.trainer import Trainer


@dataclass(frozen=True, kw_only=True)
class Compare:
    """Compare the scores of runs, with 95% intervals over prompts and over seeds.

    Runs that differ only in their seed form a group. The score is that of the last evaluation on
    held-out prompts, if all runs have one, and otherwise that of the last tenth of the updates.
    """

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Folders of two or more runs of ppo-jax train."""
    exact: bool = False
    """Compare two runs bit by bit instead: settings, metrics, tokens and final parameters. The exit
    status is 1 if they differ."""

    def run(self) -> None:
        """Print the scores, or the differences."""
        if len(self.runs) < 2 or (self.exact and len(self.runs) > 2):
            number = "exactly two runs" if self.exact else "two runs or more"
            raise ValueError(f"compare needs {number}, but got {len(self.runs)}.")
        if self.exact:
            self._compare_exactly(*self.runs)
        groups = by_settings([read_history(local_copy(folder)) for folder in self.runs])
        print_scores(groups)

    def _compare_exactly(self, run_a: Path, run_b: Path) -> NoReturn:
        runs = local_copy(run_a), local_copy(run_b)
        found = compare(*runs)
        ended = all((run / "summary.json").exists() for run in runs)
        parameters = (
            ", final parameters."
            if ended
            else "; the final parameters are unknown, because not both runs have a summary.json."
        )
        same = f"The runs are the same: settings, metrics (timings apart), samples{parameters}"
        print("\n".join(found) or same)
        raise SystemExit(1 if found else 0)


@dataclass(frozen=True, kw_only=True)
class Replay:
    """Repeat one update of a run of `ppo-jax train`, to the same bits.

    It starts from the newest good checkpoint before the update, or from the beginning.
    """

    run_folder: tyro.conf.Positional[Path]
    """Folder of the run. Nothing in it changes. Relative paths in its settings are resolved against
    the current folder."""
    update: int
    """Number of the update to repeat, counted from 0."""
    out: Path
    """Folder for the metrics of the update, all of its samples, and the checkpoint after it."""

    def run(self) -> None:
        """Repeat the update and print whether its metrics are those of the run."""
        check_free(self.out)
        if store_url(self.run_folder):
            replace(self, run_folder=local_copy(self.run_folder)).run()
            return
        command = self._command()
        if command.deterministic:
            provenance.make_deterministic()
        trainer = start_at(command, self.run_folder, self.update)
        metrics = json.loads(json.dumps(finite(trainer.step() or SKIPPED)))
        trainer.save()
        trainer.checkpoints.close()
        trainer.log.close()
        hashes = (read_config(folder)["hashes"] for folder in (self.run_folder, self.out))
        for name, before, now in provenance.differences(*hashes):
            print(f"The {name} of the run had the hash {before}, and has {now} here.")
        print(
            f"Update {self.update} is in {self.out}; digest of the parameters after it: "
            f"{hashing.digest(trainer.state.params)}."
        )
        lines = read_lines(self.run_folder / "metrics.jsonl")
        if row := next((row for row in lines if row["update"] == self.update), None):
            found = metric_differences(row, {"update": self.update, **metrics})
            print(
                f"It differs from the run: {found[0]}."
                if found
                else "All its metrics are those of the run."
            )

    def _command(self) -> Train:
        """Return the options of the run, with the `out` of this command."""
        check_free(self.out)
        command = replace(stored_command(self.run_folder), out=self.out, resume="no")
        first = (read_config(self.run_folder).get("forked_from") or {}).get("update", 0)
        updates = command.loop.updates
        if not first <= self.update < updates:
            raise ValueError(
                f"update={self.update} must lie in {first} .. {updates - 1}, the updates of "
                f"{self.run_folder}."
            )
        return command


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


def start_at(command: Train, run_folder: Path, update: int) -> Trainer:
    """Make a trainer in the state that a run had before one of its updates.

    It starts from the newest good checkpoint at or before the update, or from the beginning if
    there is none, which is a checkpoint of another run if this one was forked, and repeats the
    updates in between.

    Args:
      command: the options of the run. The trainer writes to its `out`.
      run_folder: the folder of the run.
      update: the number of the update.

    Returns:
      The trainer.

    Raises:
      ValueError: if the run has such checkpoints, but all of them are damaged.
    """
    checkpoints = Checkpoints(run_folder / "checkpoints", read_only=True)
    earlier = [step for step in checkpoints.steps() if step <= update]
    if not earlier and update > 0:
        print(
            f"{run_folder} has no checkpoint at or before update {update}; all updates before it "
            "are repeated.",
            file=sys.stderr,
        )
    samples = command.ppo.batch_size
    loop = replace(command.loop, samples=samples, tensorboard=False, wandb_project=None)
    origin = read_config(run_folder).get("forked_from")
    fork = None if earlier or origin is None else Fork(Path(origin["run"]), origin["update"])
    trainer = command.build(command.out, loop, fork)
    if earlier:
        trainer.state = newest_good(checkpoints, trainer.state, earlier)
    checkpoints.close()
    while int(trainer.state.update) < update:
        trainer.step()
    return trainer
