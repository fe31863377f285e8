"""The summary of a run: its final metrics, and its policy before and after training."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ppo_jax.run.files import read_lines, write_json
from ppo_jax.run.logging import PAIRS

# The figures of an evaluation that tables show, with their titles.
FIGURES = {
    "eval/scores": "score",
    "eval/kl": "KL (nats per response)",
    "eval/length_mean": "length (tokens)",
    "eval/distinct_2": "distinct-2",
}
# The same for an evaluation of a supervised run.
SUPERVISED_FIGURES = {"eval/loss": "loss", "eval/accuracy": "accuracy"}
Row = Mapping[str, Any]


def write_summary(
    out: Path, updates: int, digest: str, *, kept: int | None = None
) -> dict[str, Any]:
    """Write `summary.json`.

    Args:
      out: the run's folder, whose metrics and evaluated responses are copied to the summary.
      updates: the number of updates of the run.
      digest: the digest of the final parameters.
      kept: the number of updates after which the result is taken, if it may not be the last one.

    Returns:
      The summary. It holds the metrics of the last update, or of the one before the result; if the
      run was evaluated, also the evaluations `before` and `after` training, and `responses` to some
      prompts from both.
    """
    lines = read_lines(out / "metrics.jsonl")
    number = lines[-1]["update"] if kept is None else kept - 1
    # An update may have two lines, because an evaluation has its own.
    last = [row for row in lines if row["update"] == number]
    metrics = {name: x for row in last for name, x in row.items() if name != "update"}
    taken = {} if kept is None else {"kept": kept}
    summary = {"updates": updates, **taken, "digest": digest, **metrics, **before_and_after(out)}
    write_json(out / "summary.json", summary)
    return summary


def before_and_after(run: Path) -> dict[str, Any]:
    """Read the evaluations before the first and after the last update of a run.

    Args:
      run: the run's folder.

    Returns:
      `before` and `after` with the metrics of the evaluations, and `responses` with prompt,
      responses and scores of both. A run without held-out prompts has none of them, a supervised
      run has no responses, and a run of an older version has no `before`. That of a fork is the
      evaluation of the checkpoint that it starts from.
    """
    rows = read_lines(run / "metrics.jsonl")
    evaluations = [row for row in rows if row.keys() & {"eval/scores", "eval/loss"}]
    texts = read_lines(run / "evaluations.jsonl")
    ends: dict[str, Row] = {}
    # The first line of a run, and of a fork, is the evaluation before its first update.
    if evaluations and evaluations[0] is rows[0]:
        ends["before"] = evaluations[0]
    if evaluations and evaluations[-1] is not rows[0]:
        ends["after"] = evaluations[-1]
    if not ends:
        return {}
    found: dict[str, Any] = {
        when: {name: x for name, x in row.items() if name.startswith("eval/")}
        for when, row in ends.items()
    }
    at = lambda row: [text for text in texts if text["update"] == row["update"]][:PAIRS]
    if len(ends) == 2 and texts:
        pairs = zip(at(ends["before"]), at(ends["after"]), strict=False)
        found["responses"] = [_pair(before, after) for before, after in pairs]
    return found


def _pair(before: Row, after: Row) -> dict[str, Any]:
    """Join the responses to a prompt before and after training."""
    return {
        "prompt": before["prompt"],
        "before": before["response"],
        "score_before": before["score"],
        "after": after["response"],
        "score_after": after["score"],
    }


def print_before_and_after(summary: Row, console: Console | None = None) -> None:
    """Print the figures before and after training as a table, and some responses of both.

    Args:
      summary: what `write_summary` returned. Nothing is printed if the run was not evaluated.
      console: where to print; standard output by default.
    """
    ends = [when for when in ("before", "after") if when in summary]
    if not ends:
        return
    supervised = "eval/loss" in summary[ends[0]]
    figures = SUPERVISED_FIGURES if supervised else shown_figures([summary[x] for x in ends])
    rows = {title: [summary[x].get(name) for x in ends] for name, title in figures.items()}
    console = console or Console(soft_wrap=True)
    title = "on held-out rows" if supervised else "on held-out prompts"
    console.print(figures_table(title, ends, rows))
    for pair in summary.get("responses", ()):
        console.print(Text(f"\n{pair['prompt']}", style="bold"))
        for when in ("before", "after"):
            score = pair[f"score_{when}"]
            shown = "none" if score is None else f"{score:z.3g}"
            console.print(Text(f"  {when} ({shown}): {pair[when]}"))


def shown_figures(evaluations: Sequence[Row]) -> dict[str, str]:
    """Return the figures of evaluations that tables show, with their titles.

    Args:
      evaluations: the metrics `eval/*` of each.

    Returns:
      `FIGURES`, and the means of the named parts of the scores.

    Example:
      >>> list(shown_figures([{"eval/scores": 1.0, "eval/reward/brevity": -2.0}]))[-1]
      'eval/reward/brevity'
    """
    prefix = "eval/reward/"
    parts = [name for row in evaluations for name in row if name.startswith(prefix)]
    return FIGURES | {name: f"reward {name.removeprefix(prefix)}" for name in parts}


def figures_table(
    title: str, columns: Sequence[str], rows: Mapping[str, Sequence[float | str | None]]
) -> Table:
    """Make a table of figures for the terminal.

    Args:
      title: the title of the first column.
      columns: the titles of the other columns.
      rows: the figures by the title of their row. None and NaN are shown as a dash.

    Returns:
      The table.
    """
    table = Table(title, box=None, pad_edge=False, header_style="bold")
    for name in columns:
        table.add_column(Text(name), justify="right", overflow="fold")
    for name, values in rows.items():
        cells = [
            x if isinstance(x, str) else "–" if x is None or x != x else f"{x:z.3f}" for x in values
        ]
        table.add_row(Text(name), *map(Text, cells))
    return table
