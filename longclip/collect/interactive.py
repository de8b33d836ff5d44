"""The report's figures for plotly.js, as plain data: what plots.py draws for paper, to be zoomed and read by point.

Lines are told apart by colour, marker and dash alike. plotly's own classes of figures are not needed for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from longclip.collect import plots
from longclip.collect.comparison import SIDES, VAL, Comparison, Line
from longclip.collect.row import LOSS, RECALL, TEST, Curve, Row

DASHES = ("solid", "dash", "dot", "dashdot", "longdash")
SYMBOLS = ("circle", "square", "triangle-up", "diamond", "triangle-down", "cross", "x", "star")

Figure = dict[str, Any]
Floats = NDArray[np.float64]


def figures(comparison: Comparison) -> list[tuple[str, Figure]]:
    """(title, figure) in the order to be shown; a figure is ``{"data": [...], "layout": {...}}``. Empty ones are left
    out."""
    unit = "GPU-hours" if comparison.on_gpu else "CPU-rank-hours"
    lines = [x for x in comparison.lines if x.task in (TEST, VAL) and x.kind == "measured" and x.own]
    made = [
        ("Recall@1 by window", _windows(comparison)),
        ("Validation by samples seen", _curves(comparison, lines, "samples seen", None)),
        ("Validation by what it cost", _curves(comparison, lines, f"{unit}, lost ones included", Row.paid)),
        ("Validation by wall time", _curves(comparison, lines, "hours running, without waiting in queues", Row.ran)),
        ("Training loss", _losses(comparison, lines)),
        *((f"{task}: captions cut", _probe(comparison, task)) for task in comparison.tasks),
    ]
    return [(title, figure) for title, figure in made if figure["data"]]


def _windows(comparison: Comparison) -> Figure:
    """The best-known figure: Recall@1 against the window, one line for each direction and group."""
    lines = [x for x in comparison.lines if x.task in (TEST, VAL) and x.kind == "measured" and x.own and x.counts]
    groups: dict[str, list[Line]] = {}
    for x in lines:
        groups.setdefault(", ".join([x.sweep, *(f"{k} {v}" for k, v in sorted(x.axes.items()))]), []).append(x)
    data: list[Figure] = []
    for name, group in groups.items():
        for side in SIDES:
            there = [(x, c) for x in group if x.window and (c := x.scores.get(f"{side}_recall_at_1"))]
            if not there:
                continue
            label = side if len(groups) == 1 else f"{side}: {name}"
            trace = _trace(len(data), label, [x.window for x, _ in there], [100 * c.value for _, c in there])
            bounds = [
                (c.value + c.spread, c.value - c.spread) if c.spread is not None else (c.high, c.low) for _, c in there
            ]
            if all(high is not None for high, _ in bounds):
                trace["error_y"] = {
                    "type": "data",
                    "symmetric": False,
                    "array": [100 * ((high or 0) - c.value) for (high, _), (_, c) in zip(bounds, there, strict=True)],
                    "arrayminus": [
                        100 * (c.value - (low or 0)) for (_, low), (_, c) in zip(bounds, there, strict=True)
                    ],
                }
            data.append(trace)
        ceilings = [(x.window, 50 * sum(x.ceiling.values())) for x in group if len(x.ceiling) == 2]
        if ceilings:
            best = _trace(len(data), "best possible, mean", [w for w, _ in ceilings], [c for _, c in ceilings])
            data.append({**best, "mode": "lines", "line": {"color": "#777777", "dash": "dot"}})
    ticks = sorted({x.window for x in lines if x.window})
    layout = _layout("context window [tokens]", "Recall@1 [%]")
    layout["xaxis"] |= {"type": "log", "tickvals": ticks, "ticktext": [str(t) for t in ticks]}
    return {"data": data, "layout": layout}


def _curves(comparison: Comparison, lines: Sequence[Line], axis: str, clock: Any) -> Figure:
    data: list[Figure] = []
    for i, line in enumerate(lines):
        found = [plots.curve_of(row, RECALL, comparison.cut) for row in line.rows]
        places = [c.samples.astype(float) for c in found] if clock is None else plots.clocks(line, found, clock)
        data += _line(i, plots.label_of(line), found, places, 100, "lines+markers")
    return {"data": data, "layout": _layout(axis, "mean Recall@1 [%]")}


def _losses(comparison: Comparison, lines: Sequence[Line]) -> Figure:
    data: list[Figure] = []
    for i, line in enumerate(lines):
        found = [plots.thinned(plots.curve_of(row, LOSS, comparison.cut)) for row in line.rows]
        data += _line(i, plots.label_of(line), found, [c.samples.astype(float) for c in found], 1, "lines")
    return {"data": data, "layout": _layout("samples seen", "loss (moving average)")}


def _probe(comparison: Comparison, task: str) -> Figure:
    data: list[Figure] = []
    for line in (x for x in comparison.lines if x.task == task):
        if kept := plots.kept_tokens(line):
            tokens = sorted(kept)
            data.append(_trace(len(data), line.name, tokens, [100 * kept[t].value for t in tokens]))
    return {"data": data, "layout": _layout("tokens kept", "mean Recall@1 [%]")}


def _line(
    i: int, label: str, found: Sequence[Curve], places: Sequence[Floats], scale: float, mode: str
) -> list[Figure]:
    """One arm, and where it has several runs a band of one standard deviation."""
    line = plots.folded(found, places)
    if line is None:
        return []
    x, mean, spread = line
    trace = {**_trace(i, label, x, scale * mean), "mode": mode}
    if spread is None:
        return [trace]
    low, high = scale * (mean - spread), scale * (mean + spread)
    band = {
        "x": [*trace["x"], *reversed(trace["x"])],
        "y": [*_numbers(high), *reversed(_numbers(low))],
        "fill": "toself",
        "fillcolor": trace["line"]["color"] + "26",
        "line": {"width": 0},
        "mode": "lines",
        "hoverinfo": "skip",
        "showlegend": False,
        "legendgroup": f"g{i}",
    }
    return [band, {**trace, "legendgroup": f"g{i}"}]


def _trace(i: int, name: str, x: Any, y: Any) -> Figure:
    return {
        "type": "scatter",
        "mode": "lines+markers",
        "name": _plain(name),
        "x": _numbers(x),
        "y": _numbers(y),
        "line": {"color": plots.COLOURS[i % len(plots.COLOURS)], "dash": DASHES[i % len(DASHES)], "width": 2},
        "marker": {"symbol": SYMBOLS[i % len(SYMBOLS)], "size": 7},
    }


def _plain(name: str) -> str:
    """plotly.js reads a few HTML tags and entities in names; here they are letters like others."""
    return name.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def _numbers(values: Any) -> list[float | None]:
    """JSON has no NaN; plotly.js draws nothing across a null."""
    return [float(v) if np.isfinite(v) else None for v in np.asarray(values, dtype=float)]


def _layout(x: str, y: str) -> Figure:
    return {
        "xaxis": {"title": {"text": x}, "showline": True, "gridcolor": "#dddddd", "zeroline": False},
        "yaxis": {"title": {"text": y}, "showline": True, "gridcolor": "#dddddd", "zeroline": False},
    }
