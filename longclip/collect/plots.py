"""Curves of convergence, told apart by colour, marker and dash alike: also in grey, also by the colour-blind."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from longclip.collect.gather import Row, count

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Okabe and Ito's, without the yellow, which is too pale for a line"""
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
DASHES: tuple[Any, ...] = ("-", (0, (6, 2)), (0, (1, 1)), (0, (6, 2, 1, 2)), (0, (3, 1, 1, 1, 1, 1)))
"""7, 8 and 5 have no common factor: 280 runs before two look alike"""
SMOOTH = 50
"""The loss is averaged over the last 1/SMOOTH of the curve's points"""


def curves(rows: Sequence[Row], file: Path) -> None:
    """Writes a PNG: validation Recall@1 and training loss against samples seen, one line a run."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter

    figure = Figure(figsize=(11, 4.4), layout="constrained", dpi=150)
    FigureCanvasAgg(figure)  # no display, and no state shared with a pyplot that the caller may use
    recall, loss = figure.subplots(1, 2)
    for i, row in enumerate(rows):
        look: dict[str, Any] = {
            "color": COLOURS[i % len(COLOURS)],
            "linestyle": DASHES[i % len(DASHES)],
            "linewidth": 1.6,
        }
        label = row.name if row.finished else f"{row.name} (unfinished)"
        if row.val:
            places, values = zip(*row.val, strict=True)
            recall.plot(places, [100 * v for v in values], marker=MARKERS[i % len(MARKERS)], ms=4, label=label, **look)
        if row.loss:
            loss.plot([s for s, _ in row.loss], smoothed([v for _, v in row.loss]), label=label, **look)
    for name in dict.fromkeys(r.baseline for r in rows if r.baseline):
        best = next(r.best for r in rows if r.name == name)
        recall.axhline(100 * (best or 0.0), color="0.5", linestyle="--", linewidth=1, label=f"best of {name}", zorder=0)
    recall.set(title="Validation: mean of both directions", ylabel="Recall@1 [%]")
    loss.set(title="Training", ylabel="loss (moving average)")
    for panel in (recall, loss):
        panel.set_xlabel("samples seen")
        panel.xaxis.set_major_formatter(FuncFormatter(lambda x, _: count(x)))
        panel.grid(alpha=0.3)
        panel.spines[["top", "right"]].set_visible(False)
        if panel.has_data():
            panel.legend(fontsize="small", frameon=False)
        else:
            panel.text(0.5, 0.5, "nothing measured yet", ha="center", transform=panel.transAxes)
    figure.savefig(file, format="png")


def smoothed(values: Sequence[float]) -> list[float]:
    """Means over the last 1/SMOOTH of all points, NaN among them left out."""
    import pandas as pd

    means = pd.Series(values, dtype=float).rolling(max(1, len(values) // SMOOTH), min_periods=1).mean()
    return [float(v) for v in means]
