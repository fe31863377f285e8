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
from experiments.ablations.report import Interval, final, plot, table
from experiments.ablations.task import PROMPTS, Task
from experiments.ablations.training import LONG, Variant, run
from experiments.folders import open_folder
from ppo_jax import PPOConfig, SettingError, to_json, write_json

Curves = dict[str, dict[str, np.ndarray]]  # The figures of each variant, `[seeds, updates]`.
TITLES = {"score": "score of the samples", "entropy": "entropy (nats per token)"}
BASE = PPOConfig(epochs=1, minibatches=4, vf_coef=0.5, value_clip=None, kl_coef=0.0)
KL_TITLE = {"kl": "KL from the reference (nats per answer)"}


@dataclasses.dataclass(frozen=True)
class Plan:
    """A study: its variants, and its size unless the command says otherwise."""

    make: Callable[[PPOConfig], dict[str, Variant]]
    updates: int
    rows: int
    task: Task
    titles: dict[str, str]
    ages: tuple[int, ...] = (0,)

    def variants(self, learning_rate: float) -> dict[str, Variant]:
        """Return the variants by name."""
        sizes = {"batch_size": self.rows, "max_new_tokens": self.task.longest}
        return self.make(dataclasses.replace(BASE, learning_rate=learning_rate, **sizes))


class Study(enum.Enum):
    """The studies by name."""

    CRITIC = "critic"
    KL = "kl"
    AGE = "age"
    GROUPS = "groups"


PLANS = {
    Study.CRITIC: Plan(critic.variants, 30, 16, Task((100, 200, 300)), TITLES),
    Study.KL: Plan(kl.variants, 80, 64, Task((24,)), TITLES | KL_TITLE),
    Study.AGE: Plan(age.variants, 60, 32, Task((16, 24, 32)), TITLES, age.AGES),
    Study.GROUPS: Plan(groups.variants, 40, 32, Task((16, 24, 32)), TITLES),
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
    learning_rate: float = 3e-3
    """Learning rate of all variants, for the policy and the critic."""
    updates: int | None = None
    """Number of PPO updates. None: that of the study."""
    rows: int | None = None
    """Answers sampled in each update. None: as many as in the study."""
    longest: int | None = None
    """Tokens of the longest answers; others have a third and two thirds of them. None: the lengths
    of the study."""

    def __post_init__(self) -> None:
        """Check every setting."""
        for name, least in (("seeds", 2), ("updates", 1), ("longest", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise SettingError(f"{name} must be at least {least}, not {value}.")
        if self.rows is not None and (self.rows < 1 or self.rows % (4 * PROMPTS)):
            raise SettingError(f"rows={self.rows} must be a multiple of {4 * PROMPTS}.")
        plan = self.plan()
        known = plan.variants(self.learning_rate)
        for name in self.variants:
            if name not in known:
                raise SettingError(f"variants={name} must be among {', '.join(known)}.")
        if not 0 <= self.seed < 2**32:
            raise SettingError(f"seed must lie in 0 .. 2**32 - 1, not {self.seed}.")

    def plan(self) -> Plan:
        """Return the study at the size that the command asks for."""
        plan = PLANS[self.study]
        n = self.longest
        task = plan.task if n is None else Task((-(-n // 3), -(-2 * n // 3), n))
        return dataclasses.replace(
            plan, updates=self.updates or plan.updates, rows=self.rows or plan.rows, task=task
        )


def train_all(settings: Settings, plan: Plan) -> tuple[Curves, dict[str, float]]:
    """Train every variant; return the histories, `[seeds, updates]` each, and the seconds."""
    keys, curves, seconds = jax.random.split(jax.random.key(settings.seed), settings.seeds), {}, {}
    variants = plan.variants(settings.learning_rate)
    for name in settings.variants or variants:
        variant = variants[name]
        history, taken = run(keys, task=plan.task, variant=variant, updates=plan.updates)
        for i, old in enumerate(variant.ages):
            label = name if len(variant.ages) == 1 else f"{name}_{old}"
            curves[label] = {figure: x[i] for figure, x in history.items()}
            seconds[label] = taken / len(variant.ages)
        print(f"{name}: {taken:.0f} s without compilation", flush=True)
    return curves, seconds


def panels_of(plan: Plan, curves: Curves) -> dict[str, dict[str, np.ndarray]]:
    """Return the curves of each panel: a figure, or the score of answers of one age."""
    if plan.ages == (0,):
        return {
            title: {variant: history[figure] for variant, history in curves.items()}
            for figure, title in plan.titles.items()
        }
    return {
        f"score, answers {age} updates old": {
            name.rpartition("_")[0]: history["score"]
            for name, history in curves.items()
            if name.endswith(f"_{age}")
        }
        for age in plan.ages
    }


def figures_of(
    settings: Settings, plan: Plan, curves: Curves, seconds: dict[str, float]
) -> dict[str, dict[str, Interval]]:
    """Return the figures of each variant by their names in the table.

    `score` is that of the last updates, and `average` that of all updates.
    """
    rows: dict[str, dict[str, Interval]] = {}
    for name, history in curves.items():
        score = history["score"]
        rows[name] = row = {"score": final(score), "average": final(score, share=1.0)}
        if settings.study is Study.CRITIC:
            if plan.task.longest >= LONG:
                row["long"] = final(history["long"])
            # The seeds are those of the recipe, so their differences have an interval of their own.
            change = score - curves.get("recipe", history)["score"]
            row["score_change"], row["average_change"] = final(change), final(change, share=1.0)
        if settings.study is Study.KL:
            row["kl"] = final(history["kl"])
        if settings.study is Study.GROUPS:
            until = max(1, int(plan.updates * min(seconds.values()) / seconds[name]))
            row["score_at_equal_time"] = final(score[:, :until])
    return rows


def flattened(rows: dict[str, dict[str, Interval]]) -> dict[str, float]:
    """Return the figures by names such as `score/ppo/mean`."""
    flat: dict[str, float] = {}
    for name, row in rows.items():
        for figure, x in row.items():
            flat |= {f"{figure}/{name}/{part}": y for part, y in x._asdict().items()}
    return flat


def main(settings: Settings) -> dict[str, Any]:
    """Run a study, write the results to `settings.out`, print and return them."""
    start = time.perf_counter()
    out, _folder_lock = settings.out, open_folder(settings.out)  # locked until the end
    plan = settings.plan()
    curves, seconds = train_all(settings, plan)
    rows = figures_of(settings, plan, curves, seconds)
    summary: dict[str, Any] = flattened(rows)
    if settings.study is Study.KL:
        errors = gradient_errors(settings.seed)
        summary |= {f"gradient_error/{name}": error for name, error in errors.items()}
    arrays = {f"{name}/{figure}": x for name, of in curves.items() for figure, x in of.items()}
    np.savez(out / "curves.npz", **arrays)
    plot(panels_of(plan, curves), out / "curves.png")
    (out / "table.md").write_text(table(rows))
    summary |= {f"time/{name}_s": taken for name, taken in seconds.items()}
    summary |= {"time/total_s": time.perf_counter() - start, "settings": to_json(settings)}
    write_json(out / "summary.json", summary)
    print(f"{table(rows)}{summary['time/total_s']:.0f} s")
    return summary


if __name__ == "__main__":
    try:
        chosen = tyro.cli(Settings, config=(tyro.conf.EnumChoicesFromValues,))
    except SettingError as error:
        raise SystemExit(f"ablations: {error}") from error
    main(chosen)
