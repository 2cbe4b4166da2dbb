"""Plots of curves with standard errors, for paper: told apart by dash and marker, not by colour."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

DASHES = ("-", "--", "-.", ":", (0, (6, 1, 1, 1, 1, 1)))
MARKERS = "osD^vPX*<>"
LEGEND_COLUMNS = 4
LETTER, SAMPLE = 0.075, 0.8
"""Inches of a legend's letter, and of the line before it."""
WIDE = 300.0
"""A ratio of the largest to the smallest x from which on only powers of ten are labelled."""
COLOURS = ("#000000", "#1b6f6a", "#a4508b", "#c47f17", "#4a6fb5", "#7f7f7f")


@dataclass(frozen=True)
class Curve:
    """A line: x, mean and standard error at each place."""

    label: str
    x: Sequence[float]
    mean: Sequence[float]
    error: Sequence[float]


@dataclass(frozen=True)
class Panel:
    """One pair of axes; `level` draws a horizontal line."""

    title: str
    across: str
    up: str
    curves: Sequence[Curve]
    level: float | None = None


def draw(
    path: Path,
    rows: Sequence[Sequence[Panel]],
    height: float = 3.0,
    legend_columns: int = LEGEND_COLUMNS,
) -> None:
    """Write a PNG with a panel a place; one legend for all of them. Rows may be short."""
    mpl.rcParams["font.size"] = 9
    columns = max(len(row) for row in rows)
    figure = Figure(figsize=(4.4 * columns, height * len(rows) + 0.6), layout="constrained")
    places = figure.subplots(len(rows), columns, squeeze=False)
    labels: dict[str, int] = {}
    for row, axes_row in zip(rows, places, strict=True):
        for axes in axes_row[len(row) :]:
            axes.set_visible(False)
        for panel, axes in zip(row, axes_row, strict=False):
            for curve in panel.curves:
                labels.setdefault(curve.label, len(labels))
            _panel(axes, panel, labels)
    handles = {
        label: handle
        for axes in places.flat
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    widest = SAMPLE + LETTER * max(map(len, handles), default=0)
    figure.legend(
        handles.values(),
        handles,
        loc="outside lower center",
        ncols=max(1, min(legend_columns, len(handles), int(figure.get_figwidth() / widest))),
        frameon=False,
        handlelength=4,
    )
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=110, metadata={"Software": None})


def _panel(axes: Axes, panel: Panel, labels: dict[str, int]) -> None:
    for curve in panel.curves:
        place = labels[curve.label]
        dash = list(zip(range(place + 1), cycle(DASHES), strict=False))[-1][1]
        colour = COLOURS[place % len(COLOURS)]
        axes.plot(
            curve.x,
            curve.mean,
            label=curve.label,
            color=colour,
            linewidth=1.3,
            linestyle=dash,
            marker=MARKERS[place % len(MARKERS)],
            markersize=3.5,
        )
        low = [m - e for m, e in zip(curve.mean, curve.error, strict=True)]
        high = [m + e for m, e in zip(curve.mean, curve.error, strict=True)]
        axes.fill_between(curve.x, low, high, color=colour, alpha=0.15, linewidth=0)
    if panel.level is not None:
        axes.axhline(panel.level, color="black", linewidth=0.7)
    axes.set_xscale("log")
    places = [x for curve in panel.curves for x in curve.x if x > 0]
    wide = bool(places) and max(places) / min(places) > WIDE
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0,) if wide else (1.0, 2.0, 5.0), numticks=12))
    axes.xaxis.set_major_formatter(FuncFormatter(_short))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_title(panel.title, fontsize=9)
    axes.set_xlabel(panel.across)
    axes.set_ylabel(panel.up)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25, linewidth=0.5)


def _short(value: float, _: int) -> str:
    for size, name in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:g}{name}"
    return f"{value:g}"
