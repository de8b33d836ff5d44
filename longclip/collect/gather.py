"""One row a run, from its folder: what was read, what was scored, what it cost."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from longclip.collect.row import Curve, Row, curves_of, reaches
from longclip.collect.scores import of_suites, of_test, together
from longclip.run.attempts import attempts_of
from longclip.run.folder import RunFolder
from longclip.run.journal import laid, read_points
from longclip.run.summary import summary


def gather(runs: Sequence[RunFolder]) -> list[Row]:
    """A row for every run, in order of the other axes, then the window. Unfinished runs are rows too."""
    return arranged([_row(run) for run in runs])


def arranged(rows: Sequence[Row]) -> list[Row]:
    """Rows in order, by short names where these are unique, each measured against its baseline."""
    labels = Counter(r.name for r in rows)
    named = [r if labels[r.name] == 1 else replace(r, name=r.folder) for r in rows]
    named.sort(key=lambda r: (r.group, r.context_length, r.name))
    return [_against(row, _baseline(row, named)) for row in named]


def row_of(facts: Mapping[str, Any], curves: Mapping[str, Curve], run: RunFolder | None) -> Row:
    """A row from a run's summary (run/summary.py) and its curves."""
    test = facts["test"] or {}
    row = Row(
        run=run,
        sweep=facts["sweep"],
        folder=facts["name"],
        name=facts["label"],
        context_length=facts["context_length"],
        axes=facts["axes"],
        identity=facts["identity"],
        finished=facts["finished"],
        verdict=facts["verdict"],
        message=facts["message"],
        samples=facts["samples"],
        total=facts["total"],
        waste=facts["waste"],
        padding_avoided=facts["padding_avoided"],
        test=test.get("metrics", {}),
        test_set=facts["test_set"],
        test_hash=test.get("dataset"),
        test_samples=test.get("samples"),
        ceiling=test.get("ceiling") or {},
        curves=curves,
        spans=[(begin, end, ranks) for begin, end, ranks in facts["spans"]],
        hours=facts["hours"],
        hours_lost=facts["hours_lost"],
        on_gpu=facts["on_gpu"],
        codes=tuple(facts["codes"]),
    )
    file = run.evaluations / "test.json" if run else None
    return replace(row, scores=tuple(of_test(test, file, row.test_set, row.text)))


def _row(run: RunFolder) -> Row:
    attempts = attempts_of(run)
    journals = {a: read_points(a.journal) for a in attempts}
    facts = summary(run, attempts, journals)
    row = row_of(facts, curves_of(laid(attempts, journals)), run)
    chosen = (facts["test"] or {}).get("checkpoint")
    suites, accuracy, records, missing = of_suites(run.evaluations, chosen)
    scores = together(row.scores, suites, row.scores)
    return replace(row, scores=scores, accuracy=accuracy, records=records, notes=tuple(missing))


def _baseline(row: Row, rows: Iterable[Row]) -> Row | None:
    """What ``row`` is measured against. Only a finished run: the best of another may still move."""
    group = [r for r in rows if r.group == row.group]
    smallest = min(group, key=lambda r: r.context_length)
    return smallest if smallest.finished and smallest.best is not None else None


def _against(row: Row, baseline: Row | None) -> Row:
    if baseline is None or baseline.best is None:
        return row
    return replace(row, samples_to=reaches(row.val, baseline.best), baseline=baseline.name)
