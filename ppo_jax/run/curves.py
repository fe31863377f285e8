"""Curves of metrics over the updates, as points of inline SVG."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from ppo_jax.run.history import History

WIDTH, HEIGHT = 380, 190  # in units of the SVG
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 10, 10, 24  # margins around the plotted area
_MOST_POINTS = 120  # more updates are averaged in bins


class Curve(NamedTuple):
    """The curve of a group of runs, as the attributes `points` of SVG elements.

    Attributes:
      group: the number of the group.
      line: the mean over the runs.
      band: the outline of the area between the least and the greatest run; empty for one run.
      last: the mean at the end.
    """

    group: int
    line: str
    band: str
    last: float


class Tick(NamedTuple):
    """A tick of an axis: its place in the SVG and its label."""

    at: float
    label: str


class Chart(NamedTuple):
    """The curves of one metric with their axes.

    Attributes:
      name: the name of the metric.
      title: the title in words.
      curves: one curve for each group that has the metric.
      x_ticks: ticks of the updates.
      y_ticks: ticks of the values.
    """

    name: str
    title: str
    curves: list[Curve]
    x_ticks: list[Tick]
    y_ticks: list[Tick]


def make_chart(name: str, title: str, groups: Sequence[Sequence[History]]) -> Chart | None:
    """Make the chart of a metric.

    Args:
      name: the name of the metric. An evaluation is drawn at the number of updates before it.
      title: the title in words.
      groups: groups of runs that differ only in their seed.

    Returns:
      The chart, or None if no run has a finite value of the metric.
    """
    found = {i: x for i, group in enumerate(groups) if len(x := _binned(name, group)[0])}
    if not found:
        return None
    bins = {i: _binned(name, groups[i]) for i in found}
    every = np.concatenate([band.ravel() for _, band in bins.values()])
    x_low, x_high = _range(np.concatenate([x for x, _ in bins.values()]))
    y_low, y_high = _range(every)

    def place_x(x: float) -> float:
        return _LEFT + (x - x_low) / (x_high - x_low) * (WIDTH - _LEFT - _RIGHT)

    def place_y(y: float) -> float:
        return _TOP + (y_high - y) / (y_high - y_low) * (HEIGHT - _TOP - _BOTTOM)

    def points(x: np.ndarray, y: np.ndarray) -> str:
        return " ".join(f"{place_x(a):.1f},{place_y(b):.1f}" for a, b in zip(x, y, strict=True))

    curves = []
    for i, (x, (mean, low, high)) in bins.items():
        outline = points(np.r_[x, x[::-1]], np.r_[low, high[::-1]]) if len(groups[i]) > 1 else ""
        curves.append(Curve(i, points(x, mean), outline, float(mean[-1])))
    x_ticks = [Tick(place_x(x), f"{x:g}") for x in ticks(x_low, x_high)]
    y_ticks = [Tick(place_y(y), f"{y:g}") for y in ticks(y_low, y_high)]
    return Chart(name, title, curves, x_ticks, y_ticks)


def _binned(name: str, group: Sequence[History]) -> tuple[np.ndarray, np.ndarray]:
    """Return the updates `[n]`, and mean, least and greatest value over the runs, `[3, n]`."""
    series = [run.series(name) for run in group]
    updates = np.unique(np.concatenate([x for x, _ in series]))
    if not len(updates):
        return updates, np.empty((3, 0))
    bins = np.array_split(updates, min(_MOST_POINTS, len(updates)))
    places = np.array([part.mean() for part in bins]) + name.startswith("eval/")
    starts = np.array([part[0] for part in bins])
    values = np.full((len(group), len(bins)), np.nan)
    for row, (x, y) in zip(values, series, strict=True):
        at = np.searchsorted(starts, x, side="right") - 1
        for i in np.unique(at):
            row[i] = y[at == i].mean()
    every = [np.nanmean(values, axis=0), np.nanmin(values, axis=0), np.nanmax(values, axis=0)]
    return places, np.stack(every)


def _range(x: np.ndarray) -> tuple[float, float]:
    """Return the least and the greatest value, a little apart if they are equal."""
    low, high = float(x.min()), float(x.max())
    margin = 0.5 * max(abs(low), 1e-6) if high - low <= 1e-9 * max(abs(low), abs(high)) else 0.0
    return low - margin, high + margin


def ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Return round numbers between two numbers, at most `most` of them.

    Args:
      low: the lower number.
      high: the higher number.
      most: the greatest number of ticks; at least 3.

    Example:
      >>> ticks(0.1, 3.9)
      [1.0, 2.0, 3.0]
    """
    power = 10.0 ** math.floor(math.log10((high - low) / most))
    for step in (power, 2 * power, 5 * power, 10 * power):
        first, last = math.ceil(low / step), math.floor(high / step)
        if last - first < most:
            return [float(f"{i * step:.12g}") for i in range(first, last + 1)]
    raise AssertionError("Ten times the power of ten gives at most `most` ticks.")
