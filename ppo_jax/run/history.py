"""What runs have written: their curves and scores, grouped by settings apart from the seed."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

from ppo_jax.run.differences import setting_differences
from ppo_jax.run.files import config_file, read_lines
from ppo_jax.run.provenance import differences
from ppo_jax.run.resume import read_config

# Hashes that depend on the seed, or on the padding of prompts.
_SEEDED = {"model"}
_LEVEL = 0.95  # of all intervals


class History(NamedTuple):
    """What a run has written.

    Attributes:
      folder: the run's folder.
      config: its `config.json`, or the `run.json` of a supervised run.
      metrics: its lines of metrics.
    """

    folder: Path
    config: Mapping[str, Any]
    metrics: Sequence[Mapping[str, Any]]

    @property
    def seed(self) -> Any:
        """The seed of the run."""
        return (self.config["settings"].get("loop") or {}).get("seed")

    def series(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """The updates that have a metric and its values, `[n]` int and `[n]` float."""
        known = [
            (r["update"], r[name]) for r in self.metrics if isinstance(r.get(name), int | float)
        ]
        updates, values = zip(*known, strict=True) if known else ((), ())
        return np.array(updates, int), np.array(values, float)


class Interval(NamedTuple):
    """A mean and its 95% interval; the interval is NaN if it is unknown.

    Attributes:
      mean: the mean.
      low: the lower end.
      high: the upper end.
    """

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        """Return the mean with its interval."""
        known = f" [{self.low:z.3f}, {self.high:z.3f}]" if np.isfinite(self.low) else ""
        return f"{self.mean:z.3f}{known}"


def read_history(folder: Path) -> History:
    """Read what a run has written.

    Args:
      folder: the run's folder.

    Returns:
      The run's history.

    Raises:
      ValueError: if the folder holds no run, or a run without metrics.
    """
    config = read_config(folder, config_file(folder))
    history = History(folder, config, read_lines(folder / "metrics.jsonl"))
    if not any(row.keys() & {"objective/scores", "train/loss"} for row in history.metrics):
        raise ValueError(f"{folder} holds no metrics yet; wait until the run has made an update.")
    return history


def by_settings(runs: Sequence[History]) -> list[list[History]]:
    """Group runs that differ in nothing but their seed.

    Args:
      runs: the runs.

    Returns:
      The groups, in the order of their first runs.
    """
    groups: list[list[History]] = []
    for run in runs:
        same = (group for group in groups if not run_differences(group[0], run))
        group = next(same, None)
        if group is None:
            groups.append([run])
        else:
            group.append(run)
    return groups


def run_differences(a: History, b: History) -> list[str]:
    """Return a clause for each difference of two runs on which their results depend.

    The seed and what follows from it are left out.

    Args:
      a: a run.
      b: another run.
    """
    old, new = (run.config["settings"] for run in (a, b))
    found = [
        f"{name} is {x} and {y}"
        for name, x, y in setting_differences(old, new)
        if name not in ("loop.seed", "training.eval_seed")
    ]
    model_a, model_b = ((s.get("command") or {}).get("model") for s in (old, new))
    found += [f"model is {model_a} and {model_b}"] if model_a != model_b else []
    hashes = differences(a.config["hashes"], b.config["hashes"])
    return found + [f"the hash of the {name} differs" for name, *_ in hashes if name not in _SEEDED]


def final_score(run: History, *, evaluated: bool) -> Interval:
    """Return the score of a run at its end, with the interval over its prompts.

    Args:
      run: the run.
      evaluated: use the last evaluation on held-out prompts. Otherwise the score is the mean of the
        training scores of the last tenth of the updates, whose interval is unknown, because
        neighbouring updates are not independent.

    Returns:
      The score with the interval of the mean over the held-out prompts.

    Raises:
      ValueError: if the run is a supervised one.
    """
    name = "eval/scores" if evaluated else "objective/scores"
    _, values = run.series(name)
    if not len(values):
        raise ValueError(
            f"{run.folder} is a supervised run, which has no scores; use ppo-jax report."
        )
    if not evaluated:
        return Interval(float(values[-max(len(values) // 10, 1) :].mean()), np.nan, np.nan)
    _, errors = run.series("eval/scores_error")
    half = stats.norm.ppf((1 + _LEVEL) / 2) * (errors[-1] if len(errors) else np.nan)
    return Interval(float(values[-1]), float(values[-1] - half), float(values[-1] + half))


def over_seeds(scores: Sequence[float]) -> Interval:
    """Return the mean over seeds with its interval by Student's t distribution.

    Args:
      scores: one score for each seed.

    Returns:
      The mean and the interval, which is unknown for a single seed.

    Example:
      >>> print(over_seeds([1.0, 2.0, 3.0]))
      2.000 [-0.484, 4.484]
    """
    mean = float(np.mean(scores))
    if len(scores) < 2:
        return Interval(mean, np.nan, np.nan)
    if np.ptp(scores) == 0:
        return Interval(mean, mean, mean)
    low, high = stats.t.interval(_LEVEL, len(scores) - 1, loc=mean, scale=stats.sem(scores))
    return Interval(mean, float(low), float(high))


def difference(a: Sequence[float], b: Sequence[float]) -> Interval:
    """Return the mean of `b` minus the mean of `a` with its interval by Welch's t-test.

    Args:
      a: the scores of one group of seeds.
      b: the scores of another.

    Returns:
      The difference and the interval, which is unknown if a group has a single seed.

    Example:
      >>> print(difference([1.0, 2.0, 3.0], [5.0, 6.0, 7.0]))
      4.000 [1.733, 6.267]
    """
    mean = float(np.mean(b) - np.mean(a))
    if min(len(a), len(b)) < 2:
        return Interval(mean, np.nan, np.nan)
    if np.ptp(a) == np.ptp(b) == 0:
        return Interval(mean, mean, mean)
    low, high = stats.ttest_ind(b, a, equal_var=False).confidence_interval(_LEVEL)
    return Interval(mean, float(low), float(high))
