"""A comparison as tables of text: in the terminal and as Markdown. (As data: frame.py; for a paper: latex.py.)"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from longclip.collect.comparison import KS, SIDES, VAL, Cell, Comparison, Delta, Line
from longclip.collect.progress import last_evaluation
from longclip.collect.row import TEST, Scores, count

if TYPE_CHECKING:
    from rich.console import Group

MAIN = ("run", "window", "train / eval", "seeds", "waste", "i2t R@1", "i2t ceiling", "t2i R@1", "t2i ceiling")
"""columns that the terminal shows first; then the other axes, differences, goals and hours, and the state"""
LEFT = ("run", "state", "differs in", "source")
INTERVALS = "[low, high]: 95 % over the queries of the test set"
PAIRED = "differences are paired, query by query"
SPREAD = "±: standard deviation over seeds"

Text = dict[str, str]
"""one line by column"""


def caption(comparison: Comparison) -> str:
    """The convention behind the numbers, in one line."""
    if not comparison.rows:
        return f"{', '.join(dict.fromkeys(line.name for line in comparison.lines))}: trained by no run here"
    words = [
        " / ".join(_tests(comparison)) or ("validation" if comparison.cut is not None else "not tested yet"),
        *_conventions(comparison),
        "one figure a checkpoint" if comparison.cut is not None else "checkpoint chosen on val",
        _seen(comparison),
    ]
    return ", ".join(words)


def _tests(comparison: Comparison) -> list[str]:
    if comparison.cut is not None:
        return []
    sets = dict.fromkeys((r.test_set, r.test.get("captions", r.test.get("pairs"))) for r in comparison.rows if r.test)
    return [name if pairs is None else f"{name}, n = {pairs:,.0f}" for name, pairs in sets]


def _conventions(comparison: Comparison) -> list[str]:
    there = [s for s in _scores(comparison) if s.task == TEST]
    several = any(s.queries.get("i2t") != s.queries.get("t2i") for s in there)
    conventions = dict.fromkeys(s.convention for s in there) or {"strict": None}
    said = {"strict": "ties = misses", "open_clip": "open_clip's convention", "clip_benchmark": "CLIP_benchmark's"}
    ties = " / ".join(said.get(c, c) for c in conventions)
    return ["several captions an image" if several else "one caption an image", ties]


def _seen(comparison: Comparison) -> str:
    if (cut := comparison.cut) is not None:
        places = {last_evaluation(r, cut) for x in comparison.lines if x.counts for r in x.rows}
        each = "all at" if len(places) == 1 else "UNEQUAL samples, each at its last evaluation up to"
        return f"{each} {count(cut)} samples"
    seen = {r.samples for r in comparison.rows if r.finished}
    if not seen:
        return "no run has finished"
    return "UNEQUAL samples" if len(seen) > 1 else f"equal {count(seen.pop())} samples"


def _scores(comparison: Comparison) -> Iterable[Scores]:
    return (s for r in comparison.rows for s in r.scores)


def words(comparison: Comparison) -> str:
    """What stands in brackets and behind ±, in one line; empty where nothing does."""
    cells = [c for line in comparison.lines for c in line.scores.values()]
    deltas = [d for line in comparison.lines for d in line.deltas.values() if d.low is not None]
    said = [INTERVALS] if deltas or any(c.low is not None for c in cells) else []
    said += [PAIRED] if deltas else []
    said += [SPREAD] if any(c.spread is not None for c in cells) else []
    return "; ".join(said)


def heading(comparison: Comparison, task: str) -> str:
    """Of the table of a task other than the test set."""
    lines = [line for line in comparison.lines if line.task == task]
    there = next((s for line in lines for s in line.scored), None)
    counts = dict.fromkeys(there.queries.values()) if there else {}
    return f"{task}, n = {' / '.join(f'{n:,}' for n in counts)}" if counts else lines[0].called or task


def shown(comparison: Comparison, task: str | None = None) -> list[Text]:
    """Lines of a task (by default the first) as text: percent and samples with one decimal, nothing where nothing is
    known; no empty columns."""
    lines = of_task(comparison, task)
    table = [_text(line, comparison) for line in lines]
    filled = [c for c in table[0] if any(text[c] for text in table)] if table else []
    return [{c: text[c] for c in filled} for text in table]


def of_task(comparison: Comparison, task: str | None = None) -> list[Line]:
    task = task or next(iter(comparison.tasks), None)
    return [line for line in comparison.lines if line.task == task]


def _text(line: Line, comparison: Comparison) -> Text:
    crossed = any(not x.own for x in comparison.lines)
    window = "" if line.window is None else str(line.window)
    where = "train / eval" if crossed else "window"
    unit = "GPU-h" if comparison.on_gpu else "CPU-h"
    base = _base(comparison)
    scores = {}
    for side in SIDES:
        for k in KS:
            cell = line.scores.get(f"{side}_recall_at_{k}")
            scores[f"{side} R@{k}"] = interval(cell) if k == 1 else plain(cell)
    goal = "" if comparison.goal is None else f"{100 * comparison.goal:g}"
    return {
        "run": line.name,
        where: f"{window} / {line.evaluated or ''}".strip(" /") if crossed else window,
        "seeds": str(len(line.rows)) if comparison.folded and line.rows else "",
        **{key: str(line.axes.get(key, "")) for key in comparison.varied},
        "waste": _percent(line.waste, "%"),
        "padding avoided": _percent(line.padding_avoided, "%"),
        **scores,
        "i2t ceiling": _percent(line.ceiling.get("i2t")),
        "t2i ceiling": _percent(line.ceiling.get("t2i")),
        "of ceiling": _percent(line.of_ceiling, "%"),
        **{f"Δ {side} vs {base}": delta(line.deltas.get(f"{side}_recall_at_1")) for side in SIDES},
        "zero-shot": _some(plain(line.accuracy), line.accuracy, line),
        "best val R@1": plain(line.best),
        "area": plain(line.area),
        "tested at": _count(line.test_samples),
        f"samples to {_owner(base)} best": _reached(line.samples_to, line, count),
        f"{unit} to {_owner(base)} best": _reached(line.hours_to, line, _hours),
        f"samples to {goal}": _reached(line.samples_to_goal, line, count),
        f"{unit} to {goal}": _reached(line.hours_to_goal, line, _hours),
        "samples": _count(line.samples),
        f"{unit} (lost)": "" if line.hours is None else f"{_hours(line.hours)} ({_hours(line.hours_lost or 0.0)})",
        "state": line.state,
        "differs in": "; ".join(line.marks),
        "source": line.source,
    }


def markdown(comparison: Comparison) -> str:
    """The caption, a table for each task (the best in bold), and the warnings."""
    parts = [caption(comparison), *([f"\n{said}"] if (said := words(comparison)) else []), ""]
    for task in comparison.tasks:
        if task not in (TEST, VAL):
            parts += [f"### {_cell(heading(comparison, task))}", ""]
        table, bold = shown(comparison, task), best(comparison, task)
        columns = list(table[0])
        lines = [
            " | ".join(f"**{text}**" if (i, column) in bold else _cell(text) for column, text in line.items())
            for i, line in enumerate(table)
        ]
        aligned = ["---" if c in LEFT else "---:" for c in columns]
        parts += [f"| {x} |" for x in (" | ".join(map(_cell, columns)), " | ".join(aligned), *lines)] + [""]
    parts += [line for said in comparison.choices for line in (said, "")]
    parts += [line for said in comparison.warnings for line in (f"> **!** {said}", "")]
    return "\n".join(parts)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def terminal(comparison: Comparison) -> Group:
    """The caption and the columns that matter most, to be printed by Rich."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text as Printed

    parts: list[Printed | Table] = [Printed(caption(comparison))]
    for task in comparison.tasks:
        if task not in (TEST, VAL):
            parts.append(Printed(f"\n{heading(comparison, task)}"))
        lines, texts = of_task(comparison, task), shown(comparison, task)
        table = Table(box=None, header_style="bold", pad_edge=False, collapse_padding=True)
        columns = main_columns(list(texts[0]), comparison)
        for column in columns:
            longest = max(len(word) for text in (column, *(t[column] for t in texts)) for word in text.split() or [""])
            justify = "left" if column in LEFT else "right"
            table.add_column(Printed(column), justify=justify, overflow="fold", min_width=longest)  # type: ignore[arg-type]
        for line, text in zip(lines, texts, strict=True):
            style = "yellow" if not line.counts or line.marks else "dim" if line.kind != "measured" else None
            table.add_row(*(Printed(text[c]) for c in columns), style=style)
        parts.append(table)
    if said := words(comparison):
        parts.append(Printed(said, style="dim"))
    parts += [Printed(line) for line in comparison.choices]
    return Group(*parts)


def main_columns(there: Sequence[str], comparison: Comparison) -> list[str]:
    """Those that the terminal shows, in its order; all are in the files."""
    first = [c for c in MAIN if c in there] + [c for c in there if c.startswith("Δ i2t")]
    at = sum(c in there for c in MAIN[: MAIN.index("waste")])
    first[at:at] = [c for c in comparison.varied if c in there]
    later = [c for c in there if c.startswith("samples to ") or c == "zero-shot" or c.endswith("(lost)")]
    return [*first, *later, *(c for c in ("state", "differs in", "source") if c in there)]


def best(comparison: Comparison, task: str | None = None) -> set[tuple[int, str]]:
    """Cells (line of the task, column as shown) with the best measured value, where there is a choice."""
    lines = of_task(comparison, task)
    base = _base(comparison)
    values: dict[str, Mapping[int, float]] = {}
    ours = {i: line for i, line in enumerate(lines) if line.counts and line.kind != "reported"}
    for side in SIDES:
        for k in KS:
            values[f"{side} R@{k}"] = {
                i: c.value for i, x in ours.items() if (c := x.scores.get(f"{side}_recall_at_{k}"))
            }
    values["of ceiling"] = {i: v for i, x in ours.items() if (v := x.of_ceiling) is not None}
    values["zero-shot"] = {i: c.value for i, x in ours.items() if (c := x.accuracy) and _whole(c, x)}
    soon = f"samples to {_owner(base)} best"
    values[soon] = {i: c.value for i, x in ours.items() if (c := x.samples_to) and _whole(c, x)}
    found = set()
    for column, numbers in values.items():
        if len(set(numbers.values())) > 1:
            top = (min if column == soon else max)(numbers.values())
            found |= {(i, column) for i, v in numbers.items() if v == top}
    return found


def _base(comparison: Comparison) -> str:
    """What differences are to and goals are of, in words: the arm with the smallest window."""
    names = set(comparison.baselines) or {r.baseline for r in comparison.rows if r.baseline}
    if len(names) == 1:
        return str(names.pop())
    windows = {x.window for x in comparison.lines if x.name in names} | {
        r.context_length for r in comparison.rows if r.name in names
    }
    return str(windows.pop()) if len(windows) == 1 else "smallest window"


def _owner(base: str) -> str:
    return f"{base}'s"


def interval(cell: Cell | None) -> str:
    """``47.2 [44.1, 50.3]``; of several seeds ``47.2 ± 0.7``."""
    if cell is None or cell.spread is not None or cell.low is None or cell.high is None:
        return plain(cell)
    return f"{_percent(cell.value)} [{_percent(cell.low)}, {_percent(cell.high)}]"


def plain(cell: Cell | None) -> str:
    """``47.2``; of several seeds ``47.2 ± 0.7``."""
    if cell is None:
        return ""
    return _percent(cell.value) + ("" if cell.spread is None else f" ± {_percent(cell.spread)}")


def delta(difference: Delta | None) -> str:
    """``+1.8 [+1.1, +2.5]``"""
    if difference is None:
        return ""
    signed = f"{100 * difference.value:+.1f}"
    if difference.low is None or difference.high is None:
        return signed
    return f"{signed} [{100 * difference.low:+.1f}, {100 * difference.high:+.1f}]"


def _reached(cell: Cell | None, line: Line, form: object) -> str:
    """``12.7 k``; ``12.7 k (2 of 3)`` where not every seed got there."""
    if cell is None:
        return ""
    return _some(str(form(cell.value)), cell, line)  # type: ignore[operator]


def _some(told: str, cell: Cell | None, line: Line) -> str:
    """``told``, with how many of the seeds it is of, where these are not all."""
    return told if cell is None or _whole(cell, line) else f"{told} ({len(cell.by_seed)} of {len(line.rows)})"


def _whole(cell: Cell, line: Line) -> bool:
    """Whether every seed has its part in it."""
    return len(cell.by_seed) == max(1, len(line.rows))


def _percent(value: float | None, sign: str = "") -> str:
    return "" if value is None or value != value else f"{100 * value:.1f}{sign}"


def _count(value: float | None) -> str:
    return "" if value is None else count(value)


def _hours(value: float) -> str:
    return f"{value:.1f}" if value >= 0.095 or value == 0 else f"{value:.3f}"
