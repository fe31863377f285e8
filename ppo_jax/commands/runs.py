"""`ppo-jax replay` and `ppo-jax compare`: what a run left, done again and held against another's."""

import dataclasses
import enum
import json
import sys
import types
import typing
from collections.abc import Mapping
from itertools import zip_longest
from pathlib import Path
from typing import Any

import tyro

from ppo_jax import hashing
from ppo_jax.commands.train import Train
from ppo_jax.errors import CheckpointError, SettingError
from ppo_jax.run import provenance
from ppo_jax.run.checkpoints import Checkpoints
from ppo_jax.run.files import check_free, read_json, read_lines
from ppo_jax.run.logging import SKIPPED, finite
from ppo_jax.run.resume import place_differences, read_config, setting_differences
from ppo_jax.run.trainer import Trainer

Row = Mapping[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compare:
    """Say whether and where two runs part: settings, first metric, first token, final parameters. Exit status 1 if they do."""

    run_a: tyro.conf.Positional[Path]
    """Folder of a run of train."""
    run_b: tyro.conf.Positional[Path]
    """Folder of another."""

    def run(self) -> None:
        found = compare(self.run_a, self.run_b)
        ended = all((run / "summary.json").exists() for run in (self.run_a, self.run_b))
        parameters = (
            ", final parameters."
            if ended
            else "; of final parameters nothing is known, as no run has a summary.json."
        )
        print(
            "\n".join(found)
            or f"The runs are the same: settings, metrics (timings apart), samples{parameters}"
        )
        raise SystemExit(1 if found else 0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Replay:
    """Do one update of a run of train again, to the same bits, from its newest good checkpoint before it or the beginning."""

    run_folder: tyro.conf.Positional[Path]
    """Folder of the run. Nothing in it changes; relative paths in its settings are taken from here."""
    update: int
    """Which update, from 0."""
    out: Path
    """Folder for its metrics, all samples, and the checkpoint after it."""

    def run(self) -> None:
        stored = read_config(self.run_folder)["settings"].get("command")
        if stored is None:
            raise ValueError(f"{self.run_folder} was not made by ppo-jax train.")
        check_free(self.out)
        try:
            command = dataclasses.replace(revive(Train, stored), out=self.out, resume="no")
        except (SettingError, TypeError, ValueError) as error:
            raise ValueError(
                f"The settings in {self.run_folder / 'config.json'} are not those of a run: {error}"
            ) from error
        updates = command.loop.updates
        if not 0 <= self.update < updates:
            raise ValueError(
                f"update={self.update} must lie in 0 .. {updates - 1}, the updates of {self.run_folder}."
            )
        before = next(
            (
                row
                for row in read_lines(self.run_folder / "metrics.jsonl")
                if row["update"] == self.update
            ),
            None,
        )
        if command.deterministic:
            provenance.make_deterministic()
        trainer = start_at(command, self.run_folder, self.update)
        numbers = json.loads(json.dumps(finite(trainer.step() or SKIPPED)))
        trainer.save()
        trainer.checkpoints.close()
        trainer.log.close()
        hashes = (read_config(folder)["hashes"] for folder in (self.run_folder, self.out))
        for name, was, now in provenance.differences(*hashes):
            print(f"The {name} of the run had the hash {was}, and has {now} here.")
        print(
            f"Update {self.update} is in {self.out}; digest of the parameters after it: "
            f"{hashing.digest(trainer.state.train.params)}."
        )
        if before is not None:
            part = next(iter(_metric_differences(before, {"update": self.update, **numbers})), None)
            print(
                "All its metrics are those of the run."
                if part is None
                else f"It parts from the run: {part}."
            )


def start_at(command: Train, run_folder: Path, update: int) -> Trainer:
    """A trainer of the run in `run_folder` just before `update`, that writes to the command's `out`.

    It starts from the newest good checkpoint at or before it; from the beginning, if there is none.

    Raises:
      ValueError: if there are some, but none is good.
    """
    checkpoints = Checkpoints(run_folder / "checkpoints", read_only=True)
    earlier = [step for step in checkpoints.steps() if step <= update]
    if not earlier and update > 0:
        print(
            f"{run_folder} has no checkpoint at or before update {update}: all before it is done again.",
            file=sys.stderr,
        )
    loop = dataclasses.replace(
        command.loop, samples=command.ppo.batch_size, tensorboard=False, wandb_project=None
    )
    trainer = command.build(command.out, loop)[0]
    for step in reversed(earlier):
        try:
            trainer.state, _ = checkpoints.restore(trainer.state, step)
            break
        except CheckpointError as error:
            if step == earlier[0]:
                raise
            print(f"{error} The one before it is tried.", file=sys.stderr)
    checkpoints.close()
    while int(trainer.state.update) < update:
        trainer.step()
    return trainer


def compare(a: Path, b: Path) -> list[str]:
    """A sentence for each way in which two runs differ, the first of its kind; none, if they are the same."""
    config_a, config_b = read_config(a), read_config(b)
    found = [
        f"{name} is {x} and {y}."
        for name, x, y in setting_differences(config_a["settings"], config_b["settings"])
    ]
    pairs = provenance.differences(config_a["hashes"], config_b["hashes"])
    found += [f"The hash of the {name} is {x} and {y}." for name, x, y in pairs]
    kinds = (
        ("metrics.jsonl", _metric_differences),
        ("samples.jsonl", _sample_differences),
        ("faults.jsonl", _sample_differences),
    )
    for name, parts in kinds:
        for row_a, row_b in zip_longest(read_lines(a / name), read_lines(b / name)):
            if row_a is None or row_b is None:
                found.append(f"{name}: {(row_a or row_b)['update']} is an update of one run only.")
                break
            first = next(iter(parts(row_a, row_b)), None)
            if first is not None:
                found.append(f"{name}: first at update {row_a['update']}: {first}.")
                break
    digests = [
        _digest(read_json(file)) if (file := folder / "summary.json").exists() else None
        for folder in (a, b)
    ]
    if None not in digests and digests[0] != digests[1]:  # a run that has not ended has none
        found.append(f"Final parameters: digest {digests[0]} and {digests[1]}.")
    return _causes(config_a, config_b) + found if found else []


def _causes(a: Row, b: Row) -> list[str]:
    """What may part two runs in their last bits, though no setting that shapes the result does."""
    meshes = provenance.differences(
        *({"mesh": (run["settings"].get("command") or {}).get("mesh")} for run in (a, b))
    )
    return [
        f"{name} is {x} and {y}."
        for name, x, y in (*meshes, *place_differences(a["processes"], b["processes"]))
    ]


def _digest(summary: Any) -> Any:
    return summary.get("digest") if isinstance(summary, dict) else None


def _metric_differences(a: Row, b: Row) -> list[str]:
    names = [name for name in dict.fromkeys([*a, *b]) if not name.startswith(("time/", "perf/"))]
    return [
        f"{name} is {a.get(name)} and {b.get(name)}" for name in names if a.get(name) != b.get(name)
    ]


def _sample_differences(a: Row, b: Row) -> list[str]:
    tokens = zip_longest(*(x if isinstance(x := row.get("tokens"), list) else () for row in (a, b)))
    first = next(((t, x, y) for t, (x, y) in enumerate(tokens) if x != y), None)
    if first is not None and a.get("prompt") == b.get("prompt"):
        return [f"after {a['prompt']!r} token {first[0]} is {first[1]} and {first[2]}"]
    return [
        f"{name} is {a.get(name)!r} and {b.get(name)!r}"
        for name in dict.fromkeys([*a, *b])
        if a.get(name) != b.get(name)
    ]


def revive(kind: Any, stored: Any) -> Any:
    """A value of type `kind` from what `files.plain` made of it.

    Raises:
      SettingError: if it is of another type, or out of range.

    Example:
      >>> from ppo_jax.run.trainer import LoopConfig
      >>> revive(LoopConfig, {"updates": 3, "wandb_project": None}).updates
      3
    """
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        kinds = [part for part in typing.get_args(kind) if part is not type(None)]
        return None if stored is None else revive(kinds[0], stored)
    if dataclasses.is_dataclass(kind) and isinstance(stored, dict):
        hints, values = typing.get_type_hints(kind), {}
        for name in hints.keys() & stored.keys():
            try:
                values[name] = revive(hints[name], stored[name])
            except (SettingError, ValueError) as error:
                raise SettingError(f"{name}: {error}") from error
        return kind(**values)
    if typing.get_origin(kind) is tuple and isinstance(stored, list):
        return tuple(revive(typing.get_args(kind)[0], x) for x in stored)
    if typing.get_origin(kind) is typing.Literal and stored in typing.get_args(kind):
        return stored
    plain = {float: (int, float)}.get(kind, kind)
    if (
        kind in (bool, int, float, str)
        and isinstance(stored, plain)
        and (kind is bool or not isinstance(stored, bool))
    ):
        return stored
    if isinstance(kind, type) and issubclass(kind, enum.Enum | Path) and isinstance(stored, str):
        return kind(stored)
    raise SettingError(f"{stored!r:.60} is no {getattr(kind, '__name__', kind)}.")
