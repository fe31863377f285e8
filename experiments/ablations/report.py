"""Intervals over seeds, the figure and the table of a study."""

from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
from scipy import stats

matplotlib.use("Agg")
import matplotlib.pyplot as plt

LAST = 0.1  # The final figures are means over this share of the updates, the last ones.


class Interval(NamedTuple):
    """A mean over seeds and its 95 % confidence interval by Student's t."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        """Return the mean and the interval."""
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]"


def interval(values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return mean and 95 % confidence interval over the first axis, the seeds."""
    n, mean = len(values), values.mean(axis=0)
    half = stats.t.ppf(0.975, n - 1) * values.std(axis=0, ddof=1) / n**0.5
    return mean, mean - half, mean + half


def final(curves: np.ndarray, share: float = LAST) -> Interval:
    """Return the interval of the mean of the last updates.

    Args:
      curves: `[seeds, updates]`; NaN where an update has no such figure.
      share: the share of the updates that counts.
    """
    count = max(1, round(share * curves.shape[1]))
    return Interval(*(float(x) for x in interval(np.nanmean(curves[:, -count:], axis=1))))


def plot(panels: dict[str, dict[str, np.ndarray]], path: Path) -> None:
    """Plot the mean over seeds and its confidence interval.

    Args:
      panels: for each panel, by its title, the curve of each variant, `[seeds, updates]`.
      path: file to write.
    """
    size = (3.4 * len(panels) + 1.4, 3.2)
    figure, axes = plt.subplots(1, len(panels), figsize=size, squeeze=False)
    for axis, (title, curves) in zip(axes[0], panels.items(), strict=True):
        for variant, curve in curves.items():
            mean, low, high = interval(curve)
            (line,) = axis.plot(mean, label=variant, linewidth=1.2)
            axis.fill_between(range(len(mean)), low, high, color=line.get_color(), alpha=0.15)
        axis.set(xlabel="update", title=title)
        axis.grid(alpha=0.3)
    figure.legend(
        *axes[0, 0].get_legend_handles_labels(), loc="outside right upper", fontsize="small"
    )
    figure.set_layout_engine("constrained")
    figure.savefig(path, dpi=100)
    plt.close(figure)


def table(rows: dict[str, dict[str, Interval]]) -> str:
    """Return a Markdown table with one line per variant and one column per figure."""
    names = list(next(iter(rows.values())))
    head = f"| variant | {' | '.join(names)} |\n|{'---|' * (len(names) + 1)}"
    lines = [f"| {name} | {' | '.join(map(str, row.values()))} |" for name, row in rows.items()]
    return "\n".join([head, *lines]) + "\n"
