"""What `ppo-jax compare` and `ppo-jax replay` do."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

from ppo_jax import hashing
from ppo_jax.commands.runs import Compare, Replay
from ppo_jax.commands.stored import stored_command
from ppo_jax.commands.train import Train
from ppo_jax.commands.training import build
from ppo_jax.run import provenance
from ppo_jax.run.checkpoints import Checkpoints
from ppo_jax.run.compare import compare, metric_differences
from ppo_jax.run.files import check_free, read_lines
from ppo_jax.run.forks import Fork
from ppo_jax.run.history import by_settings, read_history
from ppo_jax.run.logging import SKIPPED, finite
from ppo_jax.run.remote import local_copy
from ppo_jax.run.resume import read_config
from ppo_jax.run.score_tables import print_scores
from ppo_jax.run.stored import newest_good
from ppo_jax.run.trainer import Trainer
from ppo_jax.stores import store_url


def compare_runs(options: Compare) -> None:
    """Print a table of scores or, with --exact, the first difference of each kind."""
    if len(options.runs) < 2 or (options.exact and len(options.runs) > 2):
        number = "exactly two runs" if options.exact else "two runs or more"
        raise ValueError(f"compare needs {number}, but got {len(options.runs)}.")
    if options.exact:
        _compare_exactly(*options.runs)
    groups = by_settings([read_history(local_copy(folder)) for folder in options.runs])
    print_scores(groups)


def _compare_exactly(run_a: Path, run_b: Path) -> NoReturn:
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


def replay(options: Replay) -> None:
    """Repeat the update and print whether its metrics are those of the run."""
    check_free(options.out)
    if store_url(options.run_folder):
        replay(replace(options, run_folder=local_copy(options.run_folder)))
        return
    command = _command(options)
    if command.deterministic:
        provenance.make_deterministic()
    trainer = start_at(command, options.run_folder, options.update)
    metrics = json.loads(json.dumps(finite(trainer.step() or SKIPPED)))
    trainer.save()
    trainer.checkpoints.close()
    trainer.log.close()
    hashes = (read_config(folder)["hashes"] for folder in (options.run_folder, options.out))
    for name, before, now in provenance.differences(*hashes):
        print(f"The {name} of the run had the hash {before}, and has {now} here.")
    print(
        f"Update {options.update} is in {options.out}; digest of the parameters after it: "
        f"{hashing.digest(trainer.state.params)}."
    )
    lines = read_lines(options.run_folder / "metrics.jsonl")
    if row := next((row for row in lines if row["update"] == options.update), None):
        found = metric_differences(row, {"update": options.update, **metrics})
        print(
            f"It differs from the run: {found[0]}."
            if found
            else "All its metrics are those of the run."
        )


def _command(options: Replay) -> Train:
    """Return the options of the run, with the `out` of this command."""
    check_free(options.out)
    command = replace(stored_command(options.run_folder), out=options.out, resume="no")
    first = (read_config(options.run_folder).get("forked_from") or {}).get("update", 0)
    updates = command.loop.updates
    if not first <= options.update < updates:
        raise ValueError(
            f"update={options.update} must lie in {first} .. {updates - 1}, the updates of "
            f"{options.run_folder}."
        )
    return command


def start_at(command: Train, run_folder: Path, update: int) -> Trainer:
    """Make a trainer in the state that a run had before one of its updates.

    The trainer starts from the newest good checkpoint at or before the update. Without one, it
    starts from the beginning of the run, which for a forked run is the checkpoint of the other run.
    It then repeats the updates in between.

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
    trainer = build(command, command.out, loop, fork)
    if earlier:
        trainer.state = newest_good(checkpoints, trainer.state, earlier)
    checkpoints.close()
    while int(trainer.state.update) < update:
        trainer.step()
    return trainer
