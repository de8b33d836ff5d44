"""A comparison as data: a table for pandas and CSV, and everything as JSON. Full precision, shares in [0, 1]."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, is_dataclass
from typing import TYPE_CHECKING, Any

from longclip.collect.comparison import RECALLS, SIDES, Cell, Comparison, Line
from longclip.collect.row import Row, state

if TYPE_CHECKING:
    from pandas import DataFrame

COUNTS = (
    "context_length",
    "evaluated_at",
    "seeds",
    "test_samples",
    "samples_to",
    "samples_to_goal",
    "samples",
    "total",
)


def frame(comparison: Comparison) -> DataFrame:
    """One row a line, values as they are: shares in [0, 1], samples, hours; what is not known is missing."""
    import pandas as pd

    table = pd.DataFrame([_values(line, comparison) for line in comparison.lines])
    return table.astype(dict.fromkeys(COUNTS, "Int64"))


def _values(line: Line, comparison: Comparison) -> dict[str, Any]:
    scores: dict[str, Any] = {}
    for name in RECALLS:
        cell = line.scores.get(name)
        scores[name] = _value(cell)
        scores[f"{name}_low"], scores[f"{name}_high"] = (cell.low, cell.high) if cell else (None, None)
        scores[f"{name}_spread"] = cell.spread if cell else None
    for side in SIDES:
        difference = line.deltas.get(f"{side}_recall_at_1")
        found = (difference.value, difference.low, difference.high) if difference else (None, None, None)
        scores |= dict(zip((f"delta_{side}_recall_at_1{end}" for end in ("", "_low", "_high")), found, strict=True))
    return {
        "run": line.name,
        "kind": line.kind,
        "task": line.task,
        "context_length": line.window,
        "evaluated_at": line.evaluated,
        "seeds": len(line.rows),
        **{key: line.axes.get(key) for key in comparison.varied},
        "waste": line.waste,
        "padding_avoided": line.padding_avoided,
        **scores,
        "i2t_ceiling": line.ceiling.get("i2t"),
        "t2i_ceiling": line.ceiling.get("t2i"),
        "of_ceiling": line.of_ceiling,
        "accuracy": _value(line.accuracy),
        "best_val_mean_recall_at_1": _value(line.best),
        "area": _value(line.area),
        "test_samples": _whole(line.test_samples),
        "samples_to": _whole(_value(line.samples_to)),
        "hours_to": _value(line.hours_to),
        "samples_to_goal": _whole(_value(line.samples_to_goal)),
        "hours_to_goal": _value(line.hours_to_goal),
        "samples": _whole(line.samples),
        "total": line.total,
        "hours": line.hours,
        "hours_lost": line.hours_lost,
        "state": line.state,
        "compared_to": line.baseline,
        "differs_in": "; ".join(line.marks) or None,
        "source": line.source or None,
        "path": " ".join(f"{r.sweep}/{r.folder}" for r in line.rows) or None,
    }


def as_json(comparison: Comparison) -> dict[str, Any]:
    """Everything, for programs: all lines with all cells, and every run by itself. No NaN: what is none is null."""
    from longclip.collect.tables import caption, words

    whole = {
        "caption": caption(comparison),
        "words": words(comparison),
        "cut": comparison.cut,
        "goal": comparison.goal,
        "choices": comparison.choices,
        "warnings": comparison.warnings,
        "lines": [{**_fields(line), "rows": [r.folder for r in line.rows]} for line in comparison.lines],
        "runs": [_run(row) for row in comparison.rows],
    }
    cleaned: dict[str, Any] = _clean(whole)
    return cleaned


def _fields(line: Line) -> dict[str, Any]:
    return {**{k: v for k, v in vars(line).items() if k not in ("rows", "scored")}, "of_ceiling": line.of_ceiling}


def _run(row: Row) -> dict[str, Any]:
    hidden = ("run", "curves", "scores", "records")
    facts = {k: v for k, v in vars(row).items() if k not in hidden}
    return {**facts, "seed": row.seed, "state": state(row), "best": row.best, "val": row.val}


def _clean(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        return _clean({**asdict(value), **({"spread": value.spread} if isinstance(value, Cell) else {})})
    if isinstance(value, Mapping):
        return {str(k): _clean(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_clean(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _value(cell: Cell | None) -> float | None:
    return None if cell is None else cell.value


def _whole(value: float | None) -> int | None:
    return None if value is None else round(value)
