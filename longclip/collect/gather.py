"""One row a run, from its folder: what was read, what was scored, what it cost; and what makes rows not comparable."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from longclip.run.attempts import FINISHED, Attempt, attempts_of
from longclip.run.folder import RunFolder, read_json
from longclip.run.hours import rank_hours
from longclip.run.journal import effective, series, text_shares
from longclip.run.verdicts import verdict_of

WINDOW = "model.context_length"
RECALL = "val/mean_recall_at_1"
"""chooses the checkpoint, and draws the curve of convergence"""


@dataclass(frozen=True)
class Row:
    """One run. Shares and recalls are in [0, 1]; what is not known (yet) is None or empty."""

    run: RunFolder
    name: str
    """without its uid, where that is unique among the rows"""
    context_length: int
    axes: Mapping[str, Any]
    """what ``sweep:`` varies, by dotted key"""
    identity: Mapping[str, Any]
    finished: bool
    verdict: str | None
    """of the last attempt; None while it runs, or if it was killed"""
    message: str
    samples: int
    """pairs seen, each counted once"""
    total: int | None
    waste: float | None
    padding_avoided: float | None
    """share of window positions that hold no token: 1 - tokens / (captions * window)"""
    test: Mapping[str, float]
    test_set: str
    test_hash: str | None
    test_samples: int | None
    """samples seen at the checkpoint that was tested, which validation chose"""
    ceiling: Mapping[str, float]
    """the best possible Recall@1 of any model at this window, ``i2t`` and ``t2i``, where the test set says so"""
    val: Sequence[tuple[int, float]]
    """(samples, mean Recall@1)"""
    loss: Sequence[tuple[int, float]]
    hours: float
    """rank-hours, of GPUs where there are any"""
    hours_lost: float
    """of these, spent on samples that a later attempt computed once more, or on starts that came to nothing"""
    on_gpu: bool
    codes: tuple[str, ...]
    """hashes of the code that computed what counts, oldest first; more than one if it changed between attempts"""
    samples_to: int | None = None
    """samples at which validation first crossed the best of the ``baseline``, between evaluations on a straight line"""
    baseline: str | None = None
    """the finished run of this sweep with the smallest window, and all other axes equal"""

    @property
    def best(self) -> float | None:
        return max((v for _, v in self.val if v == v), default=None)

    @property
    def of_ceiling(self) -> float | None:
        """Mean Recall@1 on the test set as a share of the best possible."""
        if not self.ceiling or not self.test:
            return None
        possible = (self.ceiling["i2t"] + self.ceiling["t2i"]) / 2
        return self.test["mean_recall_at_1"] / possible if possible else None

    @property
    def group(self) -> str:
        """Rows of one group differ in the window only, as far as was declared."""
        return repr((self.run.sweep, sorted((k, v) for k, v in self.axes.items() if k != WINDOW)))


def gather(runs: Sequence[RunFolder]) -> list[Row]:
    """A row for every run, in order of the other axes, then the window. Unfinished runs are rows too."""
    labels = Counter(r.label for r in runs)
    rows = [_row(r, r.label if labels[r.label] == 1 else r.name) for r in runs]
    rows.sort(key=lambda r: (r.group, r.context_length, r.name))
    return [_against(row, _baseline(row, rows)) for row in rows]


def differences(rows: Sequence[Row]) -> list[str]:
    """Warnings: what differs between rows of a sweep and was not declared, what is unfinished or unequal."""
    return [*_undeclared(rows), *_mixed_code(rows), *_unfinished(rows), *_unequal(rows)]


# ---- one row -----------------------------------------------------------------------------------------------------


def _row(run: RunFolder, name: str) -> Row:
    experiment = run.experiment()
    attempts = attempts_of(run)
    points = effective(run)
    verdict = verdict_of(attempts[-1]) if attempts else None
    file = run.evaluations / "test.json"
    test = read_json(file) if file.exists() else {}
    window = experiment.model.context_length
    waste, padding = text_shares(points, window) or (None, None)
    totals = [s["samples"] for a in attempts if (s := a.submitted) and s.get("samples")]
    hours, lost = rank_hours(attempts)
    return Row(
        run=run,
        name=name,
        context_length=window,
        axes=run.axes(),
        identity=run.identity(),
        finished=verdict is not None and verdict.kind == FINISHED,
        verdict=verdict.kind if verdict else None,
        message=verdict.message if verdict else "",
        samples=points[-1].samples if points else 0,
        total=totals[-1] if totals else experiment.train.samples,
        waste=waste,
        padding_avoided=padding,
        test=test.get("metrics", {}),
        test_set=_named(experiment.data.test),
        test_hash=test.get("dataset"),
        test_samples=test.get("samples"),
        ceiling=test.get("ceiling") or {},
        val=series(points, RECALL),
        loss=series(points, "train/loss"),
        hours=hours,
        hours_lost=lost,
        on_gpu=any("cuda" in str((a.started or {}).get("device")) for a in attempts),
        codes=_codes(attempts),
    )


def _named(dataset: str | None) -> str:
    """A dataset's name; of a path the last two parts, which mean something to people on other machines too."""
    return "/".join(Path(dataset).parts[-2:]) if dataset else ""


def _codes(attempts: Sequence[Attempt]) -> tuple[str, ...]:
    """Without the attempts of which nothing was left: before training began, or computed once more from its start."""
    codes: list[str] = []
    cut = float("inf")
    for attempt in reversed(attempts):
        if attempt.resumed_at is not None and attempt.resumed_at < cut:
            cut = attempt.resumed_at
            codes.append(str((attempt.started or {}).get("code")))
    return tuple(dict.fromkeys(reversed(codes)))


def _baseline(row: Row, rows: Iterable[Row]) -> Row | None:
    """What ``row`` is measured against. Only a finished run: the best of another may still move."""
    group = [r for r in rows if r.group == row.group]
    smallest = min(group, key=lambda r: r.context_length)
    return smallest if smallest.finished and smallest.best is not None else None


def _against(row: Row, baseline: Row | None) -> Row:
    if baseline is None or baseline.best is None:
        return row
    goal = baseline.best
    return Row(**{**vars(row), "samples_to": _reaches(row.val, goal), "baseline": baseline.name})


def _reaches(curve: Sequence[tuple[int, float]], goal: float) -> int | None:
    """Samples at which ``curve`` first crosses ``goal``, on the straight line between two evaluations."""
    before: tuple[int, float] | None = None
    for samples, value in curve:
        if value >= goal:
            if before is None:
                return samples
            return round(before[0] + (samples - before[0]) * (goal - before[1]) / (value - before[1]))
        before = samples, value
    return None


# ---- what makes rows not comparable ------------------------------------------------------------------------------


def _undeclared(rows: Sequence[Row]) -> list[str]:
    found = []
    for sweep in dict.fromkeys(r.run.sweep for r in rows):
        ours = [r for r in rows if r.run.sweep == sweep]
        declared = {WINDOW, *(axis for r in ours for axis in r.axes)}
        facts = [{**r.identity, **({"data.test": r.test_hash} if r.test_hash else {})} for r in ours]
        for key in sorted({k for f in facts for k in f}):
            if any(key == axis or key.startswith(f"{axis}.") for axis in declared):
                continue
            # A run that was not tested yet does not differ in its test set.
            values = {r.name: f.get(key) for r, f in zip(ours, facts, strict=True) if key != "data.test" or key in f}
            usual = Counter(map(repr, values.values())).most_common(1)[0][0]
            found += [
                f"{name}: undeclared difference: {key} is {_short(value)}, elsewhere {_short_repr(usual)}; "
                "the window is not the only cause of what differs (declare it under sweep:, or leave the run out)"
                for name, value in values.items()
                if repr(value) != usual
            ]
    return found


def _mixed_code(rows: Sequence[Row]) -> list[str]:
    found = []
    for sweep in dict.fromkeys(r.run.sweep for r in rows):
        codes = {r.name: " then ".join(r.codes) for r in rows if r.run.sweep == sweep and r.codes}
        if len({code for r in rows if r.run.sweep == sweep for code in r.codes}) <= 1:
            continue
        usual = Counter(codes.values()).most_common(1)[0][0]
        others = [f"{name} {code}" for name, code in codes.items() if code != usual]
        rest = f"elsewhere {usual}" if others else f"{', '.join(codes)} {usual}"
        found.append(
            f"{sweep}: trained by more than one state of the code: {', '.join([*others, rest])}; "
            f"what changed is not declared (diff -r shows it, in {sweep}/code)"
        )
    return found


def _unfinished(rows: Sequence[Row]) -> list[str]:
    return [
        f"{r.name}: {state(r)}" + (f", {r.verdict}: {r.message}".rstrip(": ") if r.verdict else "")
        for r in rows
        if not r.finished
    ]


def _unequal(rows: Sequence[Row]) -> list[str]:
    seen = {r.name: r.samples for r in rows if r.finished}
    if len(set(seen.values())) <= 1:
        return []
    return ["runs saw unequal numbers of samples: " + ", ".join(f"{k} {count(v)}" for k, v in seen.items())]


def state(row: Row) -> str:
    """``finished``, or ``unfinished (4.2 k/20.0 k)``."""
    if row.finished:
        return "finished"
    return f"unfinished ({count(row.samples)}/{count(row.total) if row.total else '?'})"


def count(number: float) -> str:
    """``6.3 M``, ``12.8 k``, ``640``."""
    for limit, unit in ((999_950, " M"), (1000, " k")):
        if number >= limit:
            return f"{number / {' M': 1e6, ' k': 1e3}[unit]:.1f}{unit}"
    return f"{number:.0f}"


def _short(value: Any) -> str:
    return "the default" if value is None else _short_repr(repr(value))


def _short_repr(text: str) -> str:
    return "the default" if text == "None" else text.strip("'")[:40]
