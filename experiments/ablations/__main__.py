"""The command of the ablations: `python -m experiments.ablations --study critic --out DIR`."""

import dataclasses
import enum
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tyro

from experiments.ablations import age, critic, groups, kl
from experiments.ablations.gradients import gradient_errors
from experiments.ablations.report import final, plot, table
from experiments.ablations.task import RULES, Task
from experiments.ablations.training import LONG, Variant, run
from ppo_jax import SettingError, create_run_folder, lock_folder, to_json, write_json

TITLES = {"score": "score of the samples", "entropy": "entropy (nats per token)"}
KL_TITLE = {"kl": "KL from the reference (nats per answer)"}


@dataclasses.dataclass(frozen=True)
class Plan:
    """A study: its variants, and its size unless the command says otherwise."""

    variants: Callable[[Task, int], dict[str, Variant]]
    updates: int
    rows: int
    task: Task
    titles: dict[str, str]


class Study(enum.Enum):
    """The studies by name."""

    CRITIC = "critic"
    KL = "kl"
    AGE = "age"
    GROUPS = "groups"


PLANS = {
    Study.CRITIC: Plan(critic.variants, 60, 16, Task(100, 400), TITLES),
    Study.KL: Plan(kl.variants, 200, 64, Task(24, 24), TITLES | KL_TITLE),
    Study.AGE: Plan(age.variants, 100, 32, Task(16, 32), TITLES),
    Study.GROUPS: Plan(groups.variants, 100, 32, Task(16, 32), TITLES),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """Compare methods over many seeds, and write summary.json, table.md and curves.png."""

    study: Study
    """The study."""
    out: Path
    """Folder for the results; must not hold another run."""
    seed: int = 0
    """Seed of the models and the sampling."""
    seeds: int = 8
    """Number of models that each variant trains at once."""
    variants: tuple[str, ...] = ()
    """Names of the variants to train. Without any: all of the study."""
    updates: int | None = None
    """Number of PPO updates. None: that of the study."""
    rows: int | None = None
    """Answers sampled in each update. None: as many as in the study."""
    longest: int | None = None
    """Tokens of the longest answers; the shortest have a quarter of them. None: those of the
    study."""

    def __post_init__(self) -> None:
        """Check every setting."""
        for name in ("seeds", "updates", "longest"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise SettingError(f"{name} must be at least 1, not {value}.")
        if self.rows is not None and (self.rows < 1 or self.rows % (4 * RULES)):
            raise SettingError(f"rows={self.rows} must be a multiple of {4 * RULES}.")
        plan = self.plan()
        known = plan.variants(plan.task, plan.rows)
        for name in self.variants:
            if name not in known:
                raise SettingError(f"variants={name} must be among {', '.join(known)}.")
        if not 0 <= self.seed < 2**32:
            raise SettingError(f"seed must lie in 0 .. 2**32 - 1, not {self.seed}.")

    def plan(self) -> Plan:
        """Return the study at the size that the command asks for."""
        plan = PLANS[self.study]
        longest = self.longest
        task = plan.task if longest is None else Task(max(1, longest // 4), longest)
        return dataclasses.replace(
            plan, updates=self.updates or plan.updates, rows=self.rows or plan.rows, task=task
        )


def train_all(
    settings: Settings, plan: Plan
) -> tuple[dict[str, dict[str, np.ndarray]], dict[str, float]]:
    """Train every variant; return the histories, `[seeds, updates]` each, and the seconds."""
    keys, curves, seconds = jax.random.split(jax.random.key(settings.seed), settings.seeds), {}, {}
    variants = plan.variants(plan.task, plan.rows)
    for name in settings.variants or variants:
        variant = variants[name]
        history, taken = run(keys, task=plan.task, variant=variant, updates=plan.updates)
        for i, old in enumerate(variant.ages):
            label = name if len(variant.ages) == 1 else f"{name}_{old}"
            curves[label] = {figure: x[i] for figure, x in history.items()}
            seconds[label] = taken / len(variant.ages)
        print(f"{name}: {taken:.0f} s without compilation", flush=True)
    return curves, seconds


def figures_of(
    plan: Plan, curves: dict[str, dict[str, np.ndarray]], seconds: dict[str, float]
) -> dict[str, dict[str, Any]]:
    """Return the final figures of each variant by their names in the table."""
    least = min(seconds.values())
    rows: dict[str, dict[str, Any]] = {}
    for name, history in curves.items():
        rows[name] = {"score": final(history["score"])}
        if plan.task.longest >= LONG:
            rows[name]["long"] = final(history["long"])
        if plan.titles.keys() >= KL_TITLE.keys():
            rows[name]["kl"] = final(history["kl"])
        if plan.variants is groups.variants:
            until = max(1, int(plan.updates * least / seconds[name]))
            rows[name]["score_at_equal_time"] = final(history["score"], until)
            rows[name]["updates_at_equal_time"] = float(until)
    return rows


def main(settings: Settings) -> dict[str, Any]:
    """Run a study, write the results to `settings.out`, print and return them."""
    start = time.perf_counter()
    try:
        out = create_run_folder(settings.out)
        _folder_lock = lock_folder(out)  # held until the end
    except (OSError, ValueError) as error:
        raise SystemExit(f"out={settings.out} cannot be used: {error}") from error
    plan = settings.plan()
    curves, seconds = train_all(settings, plan)
    rows = figures_of(plan, curves, seconds)
    summary: dict[str, Any] = {}
    for name, row in rows.items():
        for figure, x in row.items():
            parts = x._asdict() if isinstance(x, tuple) else {"": x}
            summary |= {f"{figure}/{name}/{part}".rstrip("/"): y for part, y in parts.items()}
        summary[f"time/{name}_s"] = seconds[name]
    if settings.study is Study.KL:
        summary |= {
            f"gradient_error/{name}": x for name, x in gradient_errors(settings.seed).items()
        }
        summary |= {f"optimum/{name}": x for name, x in kl.best_probability(plan.task).items()}
    text = table(rows)
    (out / "table.md").write_text(text)
    np.savez(
        out / "curves.npz",
        **{f"{name}/{figure}": x for name, h in curves.items() for figure, x in h.items()},
    )
    plot(curves, plan.titles, out / "curves.png")
    summary |= {"time/total_s": time.perf_counter() - start, "settings": to_json(settings)}
    write_json(out / "summary.json", summary)
    print(f"{text}{summary['time/total_s']:.0f} s")
    return summary


if __name__ == "__main__":
    try:
        chosen = tyro.cli(Settings)
    except SettingError as error:
        raise SystemExit(f"ablations: {error}") from error
    main(chosen)
