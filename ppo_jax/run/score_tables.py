"""Tables of the scores of runs and of groups of seeds, for the terminal."""

from collections.abc import Sequence
from itertools import combinations

from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from ppo_jax.run.history import History, difference, final_score, over_seeds, run_differences


def print_scores(groups: Sequence[Sequence[History]], console: Console | None = None) -> None:
    """Print the scores of runs, their means over seeds, and the differences between groups.

    Args:
      groups: groups of runs that differ only in their seed.
      console: where to print; standard output by default.
    """
    console = console or Console(soft_wrap=True)
    evaluated = all(len(run.series("eval/scores")[0]) for group in groups for run in group)
    where = "on held-out prompts" if evaluated else "in the last tenth of the updates"
    scores = [[final_score(run, evaluated=evaluated) for run in group] for group in groups]
    names = [group_name(i) for i in range(len(groups))]
    title = f"score {where} [95% interval]"
    columns = ("settings", "run", "seed", Column(Text(title)))
    table = Table(*columns, box=None, pad_edge=False)
    for name, group, found in zip(names, groups, scores, strict=True):
        for run, score in zip(group, found, strict=True):
            table.add_row(name, Text(str(run.folder)), str(run.seed), Text(str(score)))
        if len(group) > 1:
            mean = over_seeds([score.mean for score in found])
            table.add_row(name, "mean over seeds", str(len(group)), Text(str(mean)), style="bold")
    console.print(table)
    for (i, a), (j, b) in combinations(enumerate(groups), 2):
        means = [[score.mean for score in scores[k]] for k in (i, j)]
        gap = difference(*means)
        line = f"\n{names[j]} minus {names[i]}: {gap}"
        if len(a) < 2 or len(b) < 2:
            line += ". An interval over seeds needs two runs or more of both."
        console.print(Text(line))
        for clause in run_differences(a[0], b[0]):
            console.print(Text(f"  {clause}"))


def group_name(index: int) -> str:
    """Return the name of a group of runs: A, B, ..., Z, A1, B1, ...

    Example:
      >>> group_name(1), group_name(27)
      ('B', 'B1')
    """
    cycle, letter = divmod(index, 26)
    return chr(ord("A") + letter) + (str(cycle) if cycle else "")
