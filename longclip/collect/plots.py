"""Curves of convergence, told apart by colour, marker and dash alike: also in grey, also by the colour-blind."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from longclip.collect.comparison import VAL, Comparison, Line
from longclip.collect.row import EMPTY, LOSS, RECALL, TEST, Curve, Row, count

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Floats = NDArray[np.float64]

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Okabe and Ito's, without the yellow, which is too pale for a line"""
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
DASHES: tuple[Any, ...] = ("-", (0, (6, 2)), (0, (1, 1)), (0, (6, 2, 1, 2)), (0, (3, 1, 1, 1, 1, 1)))
"""7, 8 and 5 have no common factor: 280 runs before two look alike"""
SMOOTH = 50
"""The loss is averaged over the last 1/SMOOTH of the curve's points"""
MOST = 400
"""points of a curve that are drawn; more are not seen, and make files of megabytes"""
GAP = 10
"""times the usual distance between two points of the loss: nothing is drawn across such a hole in a journal"""
KEPT = re.compile(r"kept(\d+)/mean_recall_at_1")
FORMATS = ("png", "svg", "pdf")


def draw(comparison: Comparison) -> Figure:
    """Validation Recall@1 by samples seen, by rank-hours and by hours running, and the training loss by samples.

    One line an arm: the mean over its seeds, with a band of one standard deviation; every unfinished run has its own.
    """
    from matplotlib.ticker import FuncFormatter

    figure = _figure((11, 8.2))
    panels = figure.subplots(2, 2)
    (recall, loss), (paid, ran) = panels
    lines = [line for line in comparison.lines if line.task in (TEST, VAL) and line.kind == "measured" and line.own]
    for i, line in enumerate(lines):
        look = {"color": COLOURS[i % len(COLOURS)], "linestyle": DASHES[i % len(DASHES)], "linewidth": 1.6}
        marked = {**look, "marker": MARKERS[i % len(MARKERS)], "ms": 4}
        label = label_of(line)
        validation = [curve_of(row, RECALL, comparison.cut) for row in line.rows]
        _line(recall, validation, [c.samples.astype(float) for c in validation], label, marked, 100)
        _line(paid, validation, clocks(line, validation, Row.paid), label, marked, 100)
        _line(ran, validation, clocks(line, validation, Row.ran), label, marked, 100)
        losses = [thinned(curve_of(row, LOSS, comparison.cut)) for row in line.rows]
        _line(loss, losses, [c.samples.astype(float) for c in losses], label, look, 1)
    for name, best in _bests(lines).items():
        for panel in (recall, paid, ran):
            panel.axhline(100 * best, color="0.5", linestyle="--", linewidth=1, label=f"best of {name}", zorder=0)
    recall.set(title="Validation: mean of both directions", ylabel="Recall@1 [%]", xlabel="samples seen")
    unit = "GPU-hours" if comparison.on_gpu else "CPU-rank-hours"
    paid.set(title="Validation, by what it cost", ylabel="Recall@1 [%]", xlabel=f"{unit}, lost ones included")
    ran.set(title="Validation, by wall time", ylabel="Recall@1 [%]", xlabel="hours running, without waiting in queues")
    loss.set(title="Training", ylabel="loss (moving average)", xlabel="samples seen")
    for panel in (recall, loss):
        panel.xaxis.set_major_formatter(FuncFormatter(lambda x, _: count(x)))
    for panel in panels.flat:
        _finish(panel)
    return figure


def probe(comparison: Comparison) -> Figure | None:
    """Recall@1 by the number of tokens that captions are cut to, a panel for each task that was probed; None where none
    was. A model that makes use of a caption's end rises to its window, which a line of its colour marks."""
    tasks = [t for t in comparison.tasks if any(kept_tokens(x) for x in comparison.lines if x.task == t)]
    if not tasks:
        return None
    figure = _figure((5.5 * len(tasks), 4.4))
    for panel, task in zip(figure.subplots(1, len(tasks), squeeze=False)[0], tasks, strict=True):
        lines = [x for x in comparison.lines if x.task == task and kept_tokens(x)]
        for i, line in enumerate(lines):
            look = {"color": COLOURS[i % len(COLOURS)], "linestyle": DASHES[i % len(DASHES)]}
            kept = kept_tokens(line)
            tokens = np.array(sorted(kept), dtype=float)
            means = np.array([100 * kept[int(t)].value for t in tokens])
            spreads = np.array([100 * (kept[int(t)].spread or 0.0) for t in tokens])
            panel.plot(tokens, means, marker=MARKERS[i % len(MARKERS)], ms=4, label=line.name, **look)
            panel.fill_between(tokens, means - spreads, means + spreads, color=look["color"], alpha=0.15, linewidth=0)
            if line.window:
                panel.axvline(line.window, color=look["color"], linestyle=":", linewidth=0.8, zorder=0)
        panel.set(title=f"{lines[0].called or task}: captions cut", xlabel="tokens kept", ylabel="Recall@1 [%]")
        _finish(panel)
    return figure


def save(figure: Figure, files: Sequence[Path]) -> None:
    """Writes a figure; the same figure gives the same bytes, so no date is in it."""
    from matplotlib import rc_context

    for file in files:
        form = file.suffix[1:]
        dates = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}.get(form)
        with rc_context({"svg.hashsalt": "longclip"}):
            figure.savefig(file, format=form, metadata=dates)


def smoothed(values: Sequence[float] | Floats) -> list[float]:
    """Means over the last 1/SMOOTH of all points, NaN among them left out."""
    import pandas as pd

    means = pd.Series(values, dtype=float).rolling(max(1, len(values) // SMOOTH), min_periods=1).mean()
    return [float(v) for v in means]


def _figure(size: tuple[float, float]) -> Figure:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained", dpi=150)
    FigureCanvasAgg(figure)  # no display, and no state shared with a pyplot that the caller may use
    return figure


def _finish(panel: Axes) -> None:
    panel.grid(alpha=0.3)
    panel.spines[["top", "right"]].set_visible(False)
    if any(len(np.asarray(line.get_xdata())) for line in panel.get_lines()):
        panel.legend(fontsize="small", frameon=False)
    else:
        panel.text(0.5, 0.5, "nothing measured yet", ha="center", transform=panel.transAxes)


def label_of(line: Line) -> str:
    if not line.counts:
        return f"{line.name} (unfinished)"
    words = [f"{len(line.rows)} seeds"] if len(line.rows) > 1 else []
    words += [] if all(r.finished for r in line.rows) else ["unfinished"]
    return f"{line.name} ({', '.join(words)})" if words else line.name


def _bests(lines: Sequence[Line]) -> dict[str, float]:
    """The best of each arm that others are measured against: the smallest window of its group."""
    groups: dict[str, list[Line]] = {}
    for line in lines:
        groups.setdefault(line.group, []).append(line)
    smallest = [min(group, key=lambda line: line.window or 0) for group in groups.values()]
    return {line.name: line.best.value for line in smallest if line.counts and line.best is not None}


def curve_of(row: Row, metric: str, cut: int | None) -> Curve:
    curve = row.curves.get(metric, EMPTY)
    return curve if cut is None else curve.until(cut)


def thinned(curve: Curve) -> Curve:
    """The loss, smoothed; at most MOST points; a NaN in every hole of the journal, across which nothing is drawn."""
    if not len(curve):
        return curve
    smooth = np.array(smoothed(curve.values))
    places = np.unique(np.linspace(0, len(curve) - 1, MOST).round().astype(int))
    steps = np.diff(curve.samples)
    holes = np.flatnonzero(steps > GAP * np.median(steps)) if len(steps) else np.array([], dtype=int)
    places = np.union1d(places, [*holes, *(holes + 1)]).astype(int)
    samples, times, values = curve.samples[places], curve.times[places], smooth[places]
    after = np.searchsorted(places, holes, side="right")
    middle = (curve.samples[holes] + curve.samples[holes + 1]) // 2
    late = (curve.times[holes] + curve.times[holes + 1]) / 2
    return Curve(np.insert(samples, after, middle), np.insert(values, after, np.nan), np.insert(times, after, late))


def clocks(line: Line, found: Sequence[Curve], of: Callable[[Row, Floats], Floats]) -> list[Floats]:
    return [of(row, curve.times) for row, curve in zip(line.rows, found, strict=True)]


def folded(found: Sequence[Curve], places: Sequence[Floats]) -> tuple[Floats, Floats, Floats | None] | None:
    """One arm's line: x, y, and of several runs the standard deviation of y, [N] each. A run's own points; of several,
    the mean at every position that all have reached. None where there is no point.

    ``places`` are the runs' x values, one for each point; their means are the arm's.
    """
    there = [(c, x) for c, x in zip(found, places, strict=True) if len(c)]
    if not there:
        return None
    if len(there) == 1:
        curve, x = there[0]
        return x, curve.values, None
    # No run is drawn on beyond its end, and none before its first point.
    first, last = max(c.samples[0] for c, _ in there), min(c.samples[-1] for c, _ in there)
    grid = np.unique(np.concatenate([c.samples for c, _ in there]))
    grid = grid[(grid >= first) & (grid <= last)]
    values = np.array([np.interp(grid, c.samples, c.values) for c, _ in there])
    xs = np.mean([np.interp(grid, c.samples, x) for c, x in there], axis=0)
    return xs, values.mean(axis=0), values.std(axis=0, ddof=1)


def _line(
    panel: Axes, found: Sequence[Curve], places: Sequence[Floats], label: str, look: dict[str, Any], scale: float
) -> None:
    """Draws one arm, with a band of one standard deviation where it has several runs."""
    line = folded(found, places)
    if line is None:
        panel.plot([], [], label=f"{label}: nothing yet", **look)
        return
    x, mean, spread = line
    panel.plot(x, scale * mean, label=label, **look)
    if spread is not None:
        low, high = scale * (mean - spread), scale * (mean + spread)
        panel.fill_between(x, low, high, color=look["color"], alpha=0.15, linewidth=0)


def kept_tokens(line: Line) -> dict[int, Any]:
    return {int(m[1]): cell for name, cell in line.scores.items() if (m := KEPT.fullmatch(name))}
