"""The curves of a run as SVG pictures. The only module that imports matplotlib.

    for curve in draw_curves(run.lines, run.history):
        curve.title, curve.light, curve.dark       # "loss", "<?xml ...<svg ...", the same, dark

A picture for each group of numbers that the run has: loss, score, learning rate, gradient norm,
tokens and images per second, data wait, MFU, memory. Text stays text, and the same numbers give
the same bytes.
"""

import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

MOST_POINTS = 600
"""Of a curve; of more, neighbours are averaged."""

SMOOTH_FROM = 40
"""Points from which the loss gets a smoothed line over the measured one."""

FROM_ZERO = (
    *("score", "tokens a second", "images a second"),
    *("time waiting for data, %", "MFU, %", "memory, GiB"),
)
"""Pictures whose vertical axis starts at zero."""

_INK = "#5f5b53"
_GRID = "#e5e2db"
_COLORS = ("#4f46e5", "#d97706", "#0d9488")

_DARK = {
    _INK: "#a9a8b3",
    _GRID: "#2f2f36",
    **dict(zip(_COLORS, ("#9d97ff", "#fbbf24", "#2dd4bf"), strict=True)),
}
"""What stands for each color on a dark page."""


@dataclass(frozen=True, slots=True)
class Curve:
    """One picture."""

    title: str
    light: str
    """SVG for a light page."""

    dark: str
    """The same for a dark one."""


@dataclass(frozen=True, slots=True)
class _Series:
    name: str
    steps: NDArray[np.float64]
    values: NDArray[np.float64]
    has_markers: bool = False


def draw_curves(
    lines: Sequence[Mapping[str, Any]], history: Sequence[Mapping[str, Any]]
) -> list[Curve]:
    """Draw what there is.

    Args:
        lines: of `log.jsonl`.
        history: of `eval/history.jsonl`; perhaps with scores that were measured beside it.
    """
    scores = sorted({name for point in history for name in point} - {"step", "loss"})
    last = max([1, *(point["step"] for point in (*lines, *history))])
    groups: list[tuple[str, list[_Series], float]] = [
        ("loss per label token", [
            *_series(lines, "loss", "training"),
            *_series(history, "loss", "evaluation", has_markers=True),
        ], 1),
        ("score", [s for n in scores for s in _series(history, n, n, has_markers=True)], 1),
        ("learning rate", _series(lines, "learning_rate", "learning rate"), 1),
        ("gradient norm before clipping", _series(lines, "grad_norm", "gradient norm"), 1),
        ("tokens a second", _series(lines, "tokens_per_second", "tokens"), 1),
        ("images a second", _series(lines, "images_per_second", "images"), 1),
        ("time waiting for data, %", _series(lines, "data_wait", "waiting for data"), 100),
        ("MFU, %", _series(lines, "mfu", "MFU"), 100),
        ("memory, GiB", _series(lines, "memory_gib", "peak"), 1),
    ]  # fmt: skip
    curves: list[Curve] = []
    for title, series, factor in groups:
        if series:
            top = 1.03 if title == "score" else None
            svg = _draw(series, factor, last, from_zero=title in FROM_ZERO, top=top)
            curves.append(Curve(title, svg, _darkened(svg)))
    return curves


def _darkened(svg: str) -> str:
    return re.sub("|".join(_DARK), lambda match: _DARK[match[0]], svg)


def _series(
    lines: Sequence[Mapping[str, Any]], key: str, name: str, *, has_markers: bool = False
) -> list[_Series]:
    """The values under a key, as a list of one series, or none where there are no values."""
    points = [(line["step"], line[key]) for line in lines if isinstance(line.get(key), int | float)]
    if not points:
        return []
    steps, values = np.array(points, dtype=np.float64).T
    return [_Series(name, *_thinned(steps, values), has_markers)]


def _thinned(
    steps: NDArray[np.float64], values: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    if len(steps) <= MOST_POINTS:
        return steps, values
    edges = np.linspace(0, len(steps), MOST_POINTS + 1).astype(int)[:-1]
    counts = np.diff([*edges, len(steps)])
    return np.add.reduceat(steps, edges) / counts, np.add.reduceat(values, edges) / counts


def _smoothed(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Mean over a twentieth of the points around each.

    Nearer the ends over fewer, as many on either side: a falling curve is not drawn too high.
    """
    count = len(values)
    sums = np.concatenate([[0.0], np.cumsum(values)])
    places = np.arange(count)
    reach = np.minimum(np.minimum(places, count - 1 - places), max(1, count // 40))
    return (sums[places + reach + 1] - sums[places - reach]) / (2 * reach + 1)


def _draw(
    series: Sequence[_Series], factor: float, last: int, *, from_zero: bool, top: float | None
) -> str:
    settings: dict[Any, Any] = {
        "svg.fonttype": "none",
        "svg.hashsalt": "phi3v",
        "font.family": "sans-serif",
        "font.size": 9,
        "text.color": _INK,
        "axes.edgecolor": _GRID,
        "axes.labelcolor": _INK,
        "xtick.color": _INK,
        "ytick.color": _INK,
        "grid.color": _GRID,
        "grid.linewidth": 0.6,
        "axes.formatter.limits": (-3, 5),
        "legend.frameon": False,
    }
    with mpl.rc_context(settings):
        figure = Figure(figsize=(5.2, 2.5))
        # Fixed margins: a layout engine takes ten times as long.
        axes = figure.add_axes((0.105, 0.165, 0.875, 0.755))
        for color, one in zip(_COLORS, series, strict=False):
            values = one.values * factor
            marker = "o" if one.has_markers or len(values) == 1 else None
            is_rough = one.name == "training" and len(values) >= SMOOTH_FROM
            line = {"color": color, "marker": marker, "markersize": 3}
            if is_rough:
                axes.plot(one.steps, values, color=color, alpha=0.3, linewidth=0.8)
                values = _smoothed(values)
            axes.plot(one.steps, values, label=one.name.replace("$", r"\$"), linewidth=1.6, **line)
        axes.grid(visible=True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_xlabel("step")
        axes.set_xlim(-0.02 * last, 1.02 * last)  # the same steps below each other
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
        if from_zero:  # where the whole tells more than small changes
            highest = max(float(one.values.max()) for one in series) * factor
            axes.set_ylim(0, top or 1.08 * highest or 1)
        if len(series) > 1:
            axes.legend(loc="best")
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    return buffer.getvalue()
