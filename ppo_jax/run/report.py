"""A report of runs: one HTML page that loads nothing from outside."""

import base64
import hashlib
import html
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
from flax.traverse_util import flatten_dict
from markupsafe import Markup

from ppo_jax.ppo.settings import PPOConfig
from ppo_jax.run.advice import find_problems
from ppo_jax.run.curves import HEIGHT, WIDTH, Chart, make_chart
from ppo_jax.run.files import read_lines
from ppo_jax.run.history import History, by_settings, over_seeds, read_history
from ppo_jax.run.score_tables import group_name
from ppo_jax.run.serialize import to_json
from ppo_jax.run.summary import SUPERVISED_FIGURES, before_and_after, shown_figures

# The metrics that are shown first, with their titles. All others follow below them.
_TITLES = {
    "objective/scores": "Score in training",
    "eval/scores": "Score on held-out prompts",
    "objective/kl": "KL from the reference (nats per response)",
    "objective/entropy": "Entropy (nats per token)",
    "response/length_mean": "Length (tokens)",
    "response/ended": "Share of responses that ended",
    "value/explained_variance": "Variance explained by the critic",
    "policy/clipfrac": "Share of clipped tokens",
    "eval/distinct_2": "distinct-2 on held-out prompts",
    "train/loss": "Loss in training",
    "eval/loss": "Loss on held-out rows",
    "train/accuracy": "Accuracy in training",
    "eval/accuracy": "Accuracy on held-out rows",
}
# The settings that are shown first in any case.
_NAMED = {
    *("model", "reward", "prompts", "eval_prompts", "critic", "loop.updates"),
    *("data", "from_scratch", "learn_from", "training.epochs", "training.learning_rate"),
}
_MOST_SAMPLES, _SAMPLE_BYTES = 600, 900_000  # of all runs together
_LONGEST_TEXT = 2000  # characters of a prompt or response that are shown
# HTML has no control characters besides tab and line feed, and no surrogates.
_NOT_IN_HTML = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufdd0-\ufdef\ufffe\uffff]")
Row = Mapping[str, Any]


class Group(NamedTuple):
    """Runs that differ only in their seed, as the page shows them.

    Attributes:
      name: the name, such as "A".
      runs: the runs.
      figures: for each figure of an evaluation its title, and its mean over the runs with the
        interval over seeds, before and after training.
    """

    name: str
    runs: Sequence[History]
    figures: list[tuple[str, str, str]]


def make_report(folders: Sequence[Path]) -> str:
    """Make a page about one or more runs.

    Args:
      folders: the folders of the runs.

    Returns:
      The page as HTML.

    Raises:
      ValueError: if a folder holds no run with metrics, or a file in it cannot be read.
    """
    runs = [read_history(folder) for folder in folders]
    ends = {run.folder: before_and_after(run.folder) for run in runs}
    parts = by_settings(runs)
    groups = [
        Group(group_name(i), part, _figures([ends[run.folder] for run in part]))
        for i, part in enumerate(parts)
    ]
    charts, more_charts = _charts(parts)
    style, script = (_template_text(name) for name in ("report.css", "report.js"))
    environment = jinja2.Environment(
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        finalize=_displayed,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.from_string(_template_text("report.html")).render(
        groups=groups,
        several=len(parts) > 1,
        problems=_problems(groups),
        settings=_settings(parts),
        charts=charts,
        more_charts=more_charts,
        width=WIDTH,
        height=HEIGHT,
        pairs=[(run, ends[run.folder].get("responses", [])) for run in runs],
        samples=_samples(runs),
        faults=_faults(runs),
        style=Markup(style),
        script=Markup(script),
        style_hash=_hash(style),
        script_hash=_hash(script),
    )
    return page + "\n"


def _template_text(name: str) -> str:
    return (resources.files("ppo_jax.run") / "templates" / name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    """Return the hash by which a Content-Security-Policy allows a text."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _displayed(x: Any) -> Any:
    """Return what the page shows for a value: numbers are rounded, and None is a dash."""
    if isinstance(x, Markup):
        return x
    if isinstance(x, float):
        return f"{x:z.4g}"
    if x is None:
        return "–"
    return _NOT_IN_HTML.sub("\ufffd", x) if isinstance(x, str) else x


def _problems(groups: Sequence[Group]) -> list[tuple[str, str, list[tuple[History, str]]]]:
    """Return the title and advice of each problem, with what was seen in which run."""
    found: dict[tuple[str, str], list[tuple[History, str]]] = {}
    for group in groups:
        for run in group.runs:
            for problem in find_problems(run):
                seen = found.setdefault((problem.title, problem.advice), [])
                seen.append((run, problem.seen))
    return [(title, advice, seen) for (title, advice), seen in found.items()]


def _figures(ends: Sequence[Row]) -> list[tuple[str, str, str]]:
    """Return the figures before and after training, over the seeds of a group."""
    rows = []
    shown = shown_figures([end[x] for end in ends for x in ("before", "after") if x in end])
    for name, title in {**shown, **SUPERVISED_FIGURES}.items():
        cells = []
        for when in ("before", "after"):
            known = [x for end in ends if (x := end.get(when, {}).get(name)) is not None]
            cells.append(str(over_seeds(known)) if known else "–")
        if cells != ["–", "–"]:
            rows.append((title, cells[0], cells[1]))
    return rows


def _charts(groups: Sequence[Sequence[History]]) -> tuple[list[Chart], list[Chart]]:
    """Return the charts that are shown first and the charts of all other metrics."""
    names = {name for group in groups for run in group for row in run.metrics for name in row}
    others = sorted(names - _TITLES.keys() - {"update"})
    made = [make_chart(name, title, groups) for name, title in _TITLES.items()]
    rest = [make_chart(name, name, groups) for name in others]
    return [x for x in made if x is not None], [x for x in rest if x is not None]


def _settings(groups: Sequence[Sequence[History]]) -> list[tuple[str, list[Any], bool]]:
    """Return the name and the values of each setting, and whether to show it first.

    Those that are not the default, that differ between groups, or that name files come first.
    """
    defaults = flatten_dict({"ppo": to_json(PPOConfig())}, sep=".")
    flat = [_flat_settings(group[0]) for group in groups]
    rows = []
    for name in dict.fromkeys(name for settings in flat for name in settings):
        values = [settings.get(name) for settings in flat]
        changed = name in defaults and any(x != defaults[name] for x in values)
        differs = any(x != values[0] for x in values)
        rows.append((name, values, changed or differs or name in _NAMED))
    return rows


def _flat_settings(run: History) -> dict[str, Any]:
    """Return the settings by the names of their options. The command's copies are left out."""
    groups = {name: group or {} for name, group in run.config["settings"].items()}
    command = {
        name: x
        for name, x in groups.pop("command", {}).items()
        if name not in ("ppo", "loop", "training", "run_options")
    }
    flat = flatten_dict({**command, **groups}, sep=".")
    return {name: x if isinstance(x, str | None) else str(x) for name, x in flat.items()} | {
        name: x for name, x in flat.items() if isinstance(x, bool | int | float)
    }


def _samples(runs: Sequence[History]) -> list[dict[str, Any]]:
    """Return sampled texts of all runs, evenly over their updates, within the limits of a page."""
    rows: list[dict[str, Any]] = []
    for run in runs:
        for kind, name in (("training", "samples.jsonl"), ("held-out", "evaluations.jsonl")):
            lines = read_lines(run.folder / name)
            rows += [
                {**row, "run": str(run.folder), "kind": kind}
                for row in _evenly(lines, _MOST_SAMPLES // (2 * len(runs)))
            ]
    for row in rows:
        row |= {name: _shortened(str(row.get(name, ""))) for name in ("prompt", "response")}
    sizes = [
        len(html.escape(row["prompt"] + row["response"]).encode(errors="replace")) for row in rows
    ]
    return _evenly(rows, _SAMPLE_BYTES // max(sizes, default=1))


def _shortened(text: str) -> str:
    return text if len(text) <= _LONGEST_TEXT else text[:_LONGEST_TEXT] + " …"


def _evenly(rows: Sequence[Any], most: int) -> list[Any]:
    """Return at most `most` rows, evenly spaced, with the first and the last."""
    if len(rows) <= most:
        return list(rows)
    return [rows[i * (len(rows) - 1) // max(most - 1, 1)] for i in range(most)]


def _faults(runs: Iterable[History]) -> list[tuple[str, int, str, str, int]]:
    """Return run, update, kind, message and number of rows of the faults."""
    counts: Counter[tuple[str, int, str, str]] = Counter()
    for run in runs:
        for row in read_lines(run.folder / "faults.jsonl"):
            kind, message = str(row.get("kind")), _shortened(str(row.get("message")))
            counts[str(run.folder), row["update"], kind, message] += 1
    return [(*fault, count) for fault, count in counts.most_common(100)]
