"""Compare two runs bit by bit: settings, metrics, tokens and final parameters."""

from collections.abc import Mapping
from itertools import zip_longest
from pathlib import Path
from typing import Any

from ppo_jax.run import provenance
from ppo_jax.run.differences import environment_differences, setting_differences
from ppo_jax.run.files import config_file, read_json, read_lines
from ppo_jax.run.resume import read_config

Row = Mapping[str, Any]


def compare(a: Path, b: Path) -> list[str]:
    """Compare two runs bit by bit.

    Args:
      a: the folder of one run.
      b: the folder of the other.

    Returns:
      A sentence for the first difference of each kind: settings, hashes, metrics, samples, faults
      and final parameters. The list is empty if the runs are the same.

    Raises:
      ValueError: if a folder does not hold a run, or a file cannot be read.
    """
    config_a, config_b = (read_config(folder, config_file(folder)) for folder in (a, b))
    found = [
        f"{name} is {x} and {y}."
        for name, x, y in setting_differences(config_a["settings"], config_b["settings"])
    ]
    pairs = provenance.differences(config_a["hashes"], config_b["hashes"])
    found += [f"The hash of the {name} is {x} and {y}." for name, x, y in pairs]
    kinds = (
        ("metrics.jsonl", metric_differences),
        ("samples.jsonl", _sample_differences),
        ("evaluations.jsonl", _sample_differences),
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
    if None not in digests and digests[0] != digests[1]:  # an unfinished run has no summary
        found.append(f"Final parameters: digest {digests[0]} and {digests[1]}.")
    return _causes(config_a, config_b) + found if found else []


def _causes(a: Row, b: Row) -> list[str]:
    """Return sentences for differences of mesh, versions, devices and flags.

    These can change the last bits of a result.
    """
    mesh_a, mesh_b = ((run["settings"].get("command") or {}).get("mesh") for run in (a, b))
    found = [("mesh", mesh_a, mesh_b)] if mesh_a != mesh_b else []
    found += environment_differences(a["processes"], b["processes"])
    return [f"{name} is {x} and {y}." for name, x, y in found]


def _digest(summary: Any) -> Any:
    return summary.get("digest") if isinstance(summary, dict) else None


def metric_differences(a: Row, b: Row) -> list[str]:
    """Return a clause for each metric that differs between two lines of `metrics.jsonl`.

    Timings are left out, because they differ between any two runs.

    Args:
      a: the metrics of an update, by name.
      b: the metrics of the same update in the other run.
    """
    return [
        f"{name} is {x} and {y}"
        for name, x, y in provenance.differences(a, b)
        if not name.startswith(("time/", "perf/"))
    ]


def _sample_differences(a: Row, b: Row) -> list[str]:
    tokens = zip_longest(*(x if isinstance(x := row.get("tokens"), list) else () for row in (a, b)))
    first = next(((t, x, y) for t, (x, y) in enumerate(tokens) if x != y), None)
    if first is not None and a.get("prompt") == b.get("prompt"):
        return [f"after {a['prompt']!r} token {first[0]} is {first[1]} and {first[2]}"]
    return [f"{name} is {x!r} and {y!r}" for name, x, y in provenance.differences(a, b)]
