"""Where a run stood on its way: validation at some samples, what had been paid by then, how soon it was good."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from longclip.collect.row import EMPTY, LOSS, RECALL, Row


def last_evaluation(row: Row, cut: int | None = None) -> int | None:
    """Samples seen at the last validation (up to ``cut``); None where there was none."""
    seen = [s for s, _ in row.val if cut is None or s <= cut]
    return seen[-1] if seen else None


def cut_of(rows: Sequence[Row]) -> int | None:
    """Samples at which all can be compared: the last position up to the least advanced run's at which each of them was
    validated. If there is none, the least advanced run's last. None where no run was validated."""
    positions = [{s for s, _ in row.val} for row in rows if row.val]
    if not positions:
        return None
    return max(set.intersection(*positions), default=min(map(max, positions)))


def at(row: Row, metric: str, samples: int) -> float | None:
    """A metric at the last point up to ``samples``."""
    curve = row.curves.get(metric, EMPTY).until(samples)
    return float(curve.values[-1]) if len(curve) else None


def hours_at(row: Row, samples: float) -> float:
    """Rank-hours spent when the run had seen ``samples``, what was lost included; between points on a straight line."""
    curve = row.curves.get(LOSS, EMPTY)
    curve = curve if len(curve) else row.curves.get(RECALL, EMPTY)
    paid = row.paid(curve.times)
    # Before its first point it had paid for its start.
    return float(np.interp(samples, curve.samples, paid)) if len(curve) else 0.0


def area(row: Row, cut: int | None = None) -> float | None:
    """Mean height of validation's curve from 0 at 0 samples to its last evaluation; None where there was none."""
    curve = [(s, v) for s, v in row.val if v == v and (cut is None or s <= cut)]
    if not curve:
        return None
    samples, values = (np.array([0.0, *part]) for part in zip(*curve, strict=True))
    return float(np.trapezoid(values, samples) / samples[-1])
