"""Rows as a table: in the terminal, as CSV (full precision, shares in [0, 1]) and as Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from longclip.collect.gather import WINDOW, Row, count, differences, gather, state
from longclip.errors import SiteError, UserError
from longclip.run.folder import RunFolder

if TYPE_CHECKING:
    from pandas import DataFrame
    from rich.console import Group

KS = (1, 5, 10)
MAIN = ("run", "window", "waste", "i2t R@1", "i2t ceiling", "t2i R@1", "t2i ceiling", "state")
"""columns that the terminal shows, with the goal's, the hours' and the other axes'"""


@dataclass(frozen=True)
class Collected:
    """What ``collect`` found and wrote."""

    rows: list[Row]
    warnings: list[str]
    files: list[Path]


def collect(runs: Sequence[RunFolder], out: Path) -> Collected:
    """Writes ``table.csv``, ``table.md`` and ``curves.png`` about ``runs`` to the folder ``out``.

    Raises:
        UserError: there are no runs.
        SiteError: ``out`` cannot be written.
    """
    from longclip.collect.plots import curves

    if not runs:
        raise UserError("nothing to collect: no runs", "longclip status")
    rows = gather(runs)
    warnings = differences(rows)
    files = [out / "table.csv", out / "table.md", out / "curves.png"]
    try:
        out.mkdir(parents=True, exist_ok=True)
        frame(rows).to_csv(files[0], index=False)
        files[1].write_text(markdown(rows, warnings), encoding="utf-8")
        curves(rows, files[2])
    except OSError as error:
        raise SiteError(
            f"{out}: cannot be written: {error.strerror or error}", "choose another folder with --out"
        ) from None
    return Collected(rows, warnings, files)


def frame(rows: Sequence[Row]) -> DataFrame:
    """One row a run, values as they are: shares in [0, 1], samples, hours; what is not known is missing."""
    import pandas as pd

    counts = ("test_samples", "samples_to", "total")
    return pd.DataFrame([_values(r) for r in rows]).astype(dict.fromkeys(counts, "Int64"))


def _values(row: Row) -> dict[str, Any]:
    recalls = {f"{s}_recall_at_{k}": row.test.get(f"{s}_recall_at_{k}") for s in ("i2t", "t2i") for k in KS}
    return {
        "run": row.name,
        "context_length": row.context_length,
        **{k: v for k, v in row.axes.items() if k != WINDOW},
        "waste": row.waste,
        "padding_avoided": row.padding_avoided,
        **recalls,
        "i2t_ceiling": row.ceiling.get("i2t"),
        "t2i_ceiling": row.ceiling.get("t2i"),
        "of_ceiling": row.of_ceiling,
        "best_val_mean_recall_at_1": row.best,
        "test_samples": row.test_samples,
        "samples_to": row.samples_to,
        "samples": row.samples,
        "total": row.total,
        "hours": row.hours,
        "hours_lost": row.hours_lost,
        "state": state(row),
        "path": f"{row.run.sweep}/{row.run.name}",
    }


def shown(rows: Sequence[Row]) -> DataFrame:
    """The same as text: percent and samples with one decimal, nothing where nothing is known; no empty columns."""
    import pandas as pd

    unit = "GPU-h (lost)" if any(r.on_gpu for r in rows) else "CPU-h (lost)"
    varied = sorted({k for r in rows for k in r.axes if k != WINDOW})
    table = []
    for row, values in zip(rows, frame(rows).to_dict("records"), strict=True):
        axes = {k: str(row.axes.get(k, "")) for k in varied}
        scores = {f"{s} R@{k}": _percent(values[f"{s}_recall_at_{k}"]) for s in ("i2t", "t2i") for k in KS}
        table.append(
            {
                "run": values["run"],
                "window": str(values["context_length"]),
                **axes,
                "waste": _percent(values["waste"], "%"),
                "padding avoided": _percent(values["padding_avoided"], "%"),
                **scores,
                "i2t ceiling": _percent(values["i2t_ceiling"]),
                "t2i ceiling": _percent(values["t2i_ceiling"]),
                "of ceiling": _percent(values["of_ceiling"], "%"),
                "best val R@1": _percent(values["best_val_mean_recall_at_1"]),
                "tested at": _count(values["test_samples"]),
                _goal(rows): _count(values["samples_to"]),
                "samples": _count(values["samples"]),
                unit: f"{_hours(values['hours'])} ({_hours(values['hours_lost'])})",
                "state": values["state"],
            }
        )
    whole = pd.DataFrame(table)
    return whole[[c for c in whole.columns if (whole[c] != "").any()]]


def caption(rows: Sequence[Row]) -> str:
    """The convention behind the numbers, in one line."""
    sets = dict.fromkeys((r.test_set, r.test.get("pairs")) for r in rows if r.test)
    tests = [name if pairs is None else f"{name}, n = {pairs:,.0f}" for name, pairs in sets]
    seen = {r.samples for r in rows if r.finished}
    equal = (
        "no run has finished"
        if not seen
        else "UNEQUAL samples"
        if len(seen) > 1
        else f"equal {count(seen.pop())} samples"
    )
    words = [
        " / ".join(tests) or "not tested yet",
        "one caption an image",
        "ties = misses",
        "checkpoint chosen on val",
        equal,
    ]
    return ", ".join(words)


def markdown(rows: Sequence[Row], warnings: Sequence[str] = ()) -> str:
    """The caption, a table with one line a run (the best of the finished ones in bold), and the warnings."""
    table = shown(rows)
    bold = _best(rows)
    lines = [
        " | ".join(f"**{text}**" if (i, column) in bold else text.replace("|", "\\|") for column, text in line.items())
        for i, line in enumerate(table.to_dict("records"))
    ]
    aligned = ["---" if c in ("run", "state") else "---:" for c in table.columns]
    parts = [caption(rows), "", *(f"| {x} |" for x in (" | ".join(table.columns), " | ".join(aligned), *lines)), ""]
    parts += [line for w in warnings for line in (f"> **!** {w}", "")]
    return "\n".join(parts)


def terminal(result: Collected) -> Group:
    """The caption and the columns that matter most, to be printed by Rich."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    texts = shown(result.rows)
    table = Table(box=None, header_style="bold", pad_edge=False, collapse_padding=True)
    extra = [c for c in texts.columns if c == _goal(result.rows) or "." in c or c.endswith("(lost)")]
    columns = [c for c in (*MAIN[:-1], *extra, MAIN[-1]) if c in texts.columns]
    for column in columns:
        left = column in ("run", "state")
        whole_words = max(len(word) for text in (column, *texts[column]) for word in text.split())
        table.add_column(column, justify="left" if left else "right", overflow="fold", min_width=whole_words)
    for row, line in zip(result.rows, texts.to_dict("records"), strict=True):
        table.add_row(*(Text(line[c]) for c in columns), style=None if row.finished else "yellow")
    return Group(Text(caption(result.rows)), table)


def _goal(rows: Sequence[Row]) -> str:
    """Heading of the samples that a run needed to be as good as the smallest window ever was."""
    names = {r.baseline for r in rows if r.baseline}
    return f"samples to {names.pop() if len(names) == 1 else 'smallest window'}'s best"


def _best(rows: Sequence[Row]) -> set[tuple[int, str]]:
    """Cells (row, column as shown) with the best value among finished rows, where there is a choice."""
    values = frame(rows)
    highest = {f"{s} R@{k}": f"{s}_recall_at_{k}" for s in ("i2t", "t2i") for k in KS} | {"of ceiling": "of_ceiling"}
    best: set[tuple[int, str]] = set()
    for column, key, choose in (*((c, k, max) for c, k in highest.items()), (_goal(rows), "samples_to", min)):
        numbers = {i: float(v) for i, v in enumerate(values[key]) if rows[i].finished and not _missing(v)}
        if len(set(numbers.values())) > 1:
            top = choose(numbers.values())
            best |= {(i, column) for i, v in numbers.items() if v == top}
    return best


def _percent(value: Any, sign: str = "") -> str:
    return "" if _missing(value) else f"{100 * value:.1f}{sign}"


def _count(value: Any) -> str:
    return "" if _missing(value) else count(value)


def _missing(value: Any) -> bool:
    import pandas as pd

    return bool(pd.isna(value))


def _hours(value: float) -> str:
    return f"{value:.1f}" if value >= 0.095 or value == 0 else f"{value:.3f}"
