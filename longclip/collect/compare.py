"""Rows side by side: windows within groups equal in every other axis, seeds folded, differences to the smallest."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from longclip.collect import intervals
from longclip.collect.checks import Undeclared, differences, undeclared
from longclip.collect.comparison import MEAN, RECALLS, VAL, Cell, Comparison, Delta, Line
from longclip.collect.progress import area, at, hours_at, last_evaluation
from longclip.collect.references import Reference
from longclip.collect.row import SEED, TEST, WINDOW, Row, Scores, count, reaches, state
from longclip.collect.scores import External
from longclip.errors import UserError
from longclip.experiment.sweep import short_name


def compare(
    rows: Sequence[Row],
    externals: Sequence[External] = (),
    references: Sequence[Reference] = (),
    best_over: Sequence[str] = (),
    allow_differences: bool = False,
    trim: bool = False,
    goal: float | None = None,
) -> Comparison:
    """Lines of all ``rows``, then models from outside, then what papers report.

    Raises:
        UserError: rows differ in what nobody declared, unless ``allow_differences``; ``best_over`` is no axis.
    """
    odd = undeclared(rows)
    if odd and not allow_differences:
        raise UserError("\n".join(map(str, odd)), "--allow-differences collects them all the same, and marks them")
    arms = _arms(rows)
    cut = min((s for r in rows if (s := last_evaluation(r)) is not None), default=None) if trim else None
    arms, choices = _choose(arms, best_over, cut)
    lines = [line for arm in arms for line in _lines(arm, arms, odd, cut, goal)]
    lines += [line for model in externals for line in _external(model, lines)]
    lines = [_against(line, _baseline(line, lines)) for line in lines]
    lines += [_reported(one) for one in references]
    order = list(dict.fromkeys(line.task for line in lines))
    order.sort(key=lambda task: task not in (TEST, VAL))
    lines.sort(key=lambda line: order.index(line.task))
    said = [*differences(rows), *_missing_seeds(arms), *_cut_off(rows, cut)]
    return Comparison(tuple(rows), tuple(lines), tuple(said), tuple(choices), cut, goal)


# ---- arms --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Arm:
    """Runs of a sweep that differ in their seed only."""

    sweep: str
    axes: Mapping[str, Any]
    window: int
    rows: tuple[Row, ...]

    @property
    def group(self) -> str:
        """Equal in every axis but the window."""
        return repr((self.sweep, sorted(self.axes.items())))

    def done(self, cut: int | None) -> tuple[Row, ...]:
        """The runs that count: finished ones; at equal samples, all that validation has seen by then."""
        return tuple(r for r in self.rows if (r.finished if cut is None else last_evaluation(r, cut) is not None))


def _arms(rows: Sequence[Row]) -> list[_Arm]:
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(repr((row.sweep, sorted(_other(row).items()), row.context_length)), []).append(row)
    arms = [_Arm(r[0].sweep, _other(r[0]), r[0].context_length, tuple(r)) for r in found.values()]
    first = {arm.group: i for i, arm in reversed(list(enumerate(arms)))}
    return sorted(arms, key=lambda arm: (first[arm.group], arm.window))


def _other(row: Row) -> dict[str, Any]:
    return {k: v for k, v in row.axes.items() if k not in (WINDOW, SEED)}


def _choose(arms: list[_Arm], over: Sequence[str], cut: int | None) -> tuple[list[_Arm], list[str]]:
    """Of the arms that differ in the axes ``over`` only, the one that validation prefers; and that in words.

    Runs that are not finished stay, for they must be seen.
    """
    axes = sorted({k for arm in arms for k in arm.axes})
    for key in over:
        if key not in axes:
            raise UserError(f"--best-over {key}: not a declared axis; valid: {', '.join(axes) or 'none here'}")
    if not over:
        return arms, []
    kept: list[_Arm] = []
    said: list[str] = []
    pools: dict[str, list[_Arm]] = {}
    for arm in arms:
        rest = {k: v for k, v in arm.axes.items() if k not in over}
        pools.setdefault(repr((arm.sweep, sorted(rest.items()), arm.window)), []).append(arm)
    for pool in pools.values():
        means = {i: best.value for i, arm in enumerate(pool) if (best := _best(arm.done(cut), cut)) is not None}
        winner = max(means, key=lambda i: means[i], default=None)
        for i, arm in enumerate(pool):
            left = tuple(r for r in arm.rows if r not in arm.done(cut))
            rest = {k: v for k, v in arm.axes.items() if k not in over}
            if i == winner or left:
                rows = arm.rows if i == winner else left
                # The chosen values are no axis any more: windows are compared each at its own best.
                kept.append(replace(arm, axes=rest, rows=rows))
        if winner is not None:
            values = ", ".join(f"{k} {pool[winner].axes.get(k)}" for k in over)
            tried = ", ".join(
                f"{'/'.join(str(pool[i].axes.get(k)) for k in over)} {100 * mean:.1f}" for i, mean in means.items()
            )
            said.append(f"{_called(pool[winner].done(cut), over)}: {values}, chosen on validation (R@1: {tried})")
    merged: dict[str, list[_Arm]] = {}
    for arm in kept:
        merged.setdefault(repr((arm.group, arm.window)), []).append(arm)
    whole = [replace(part[0], rows=tuple(r for arm in part for r in arm.rows)) for part in merged.values()]
    return whole, said


def _called(rows: Sequence[Row], without: Sequence[str] = ()) -> str:
    """The name of runs that differ in their seed only: without it, as without the other axes named."""
    names = []
    for row in rows:
        drop = {short_name(k, row.axes[k]) for k in (SEED, *without) if k in row.axes}
        drop |= {f"s{row.seed}", f"seed{row.seed}"} if len(rows) > 1 else set()
        parts = [part for part in row.name.split("_") if part not in drop]
        names.append("_".join(parts) or row.name)
    return names[0] if len(set(names)) == 1 else f"{names[0]} ..."


def _missing_seeds(arms: Sequence[_Arm]) -> list[str]:
    found = []
    for arm in arms:
        others = {r.seed for a in arms if a.group == arm.group for r in a.rows}
        if lacking := sorted(others - {r.seed for r in arm.rows}):
            seeds = ", ".join(map(str, lacking))
            found.append(f"{_called(arm.rows)}: no run with seed {seeds}, which other windows have")
    return found


def _cut_off(rows: Sequence[Row], cut: int | None) -> list[str]:
    if cut is None:
        return []
    early = [r.name for r in rows if last_evaluation(r, cut) is None]
    said = [f"all compared at {count(cut)} samples, on validation: the least advanced run's last evaluation"]
    return said + ([f"not evaluated by then, and left out: {', '.join(early)}"] if early else [])


# ---- lines -------------------------------------------------------------------------------------------------------


def _lines(
    arm: _Arm, arms: Sequence[_Arm], odd: Sequence[Undeclared], cut: int | None, goal: float | None
) -> Iterable[Line]:
    """One for the runs that count, on each task at each window; one for every other run."""
    done = arm.done(cut)
    marks = {r.name: tuple(f"{u.field} is {u.value}" for u in odd if u.run == r.name) for r in arm.rows}
    if done:
        smallest = min((a for a in arms if a.group == arm.group), key=lambda a: a.window)
        name = _called(done) if len(done) > 1 else done[0].name
        whole = Line(
            "measured",
            name,
            TEST if cut is None else VAL,
            arm.window,
            arm.window,
            arm.sweep,
            arm.axes,
            done,
            True,
            _state(done, cut),
            accuracy=_cell([float(np.mean(list(r.accuracy.values()))) for r in done if r.accuracy], len(done)),
            waste=_mean([r.waste for r in done]),
            padding_avoided=_mean([r.padding_avoided for r in done]),
            best=_best(done, cut),
            area=_cell([a for r in done if (a := area(r, cut)) is not None], len(done)),
            samples=_mean([min(r.samples, cut) if cut else r.samples for r in done]),
            test_samples=_mean([r.test_samples for r in done]) if cut is None else None,
            total=done[0].total,
            hours=sum(r.hours for r in done),
            hours_lost=sum(r.hours_lost for r in done),
            marks=tuple(dict.fromkeys(m for r in done for m in marks[r.name])),
        )
        whole = _with_goals(whole, smallest.done(cut), cut, goal)
        yield from _by_task(whole) if cut is None else [_at_cut(whole, cut)]
    for row in arm.rows:
        if row not in done:
            yield Line(
                "measured",
                row.name,
                TEST if cut is None else VAL,
                arm.window,
                arm.window,
                arm.sweep,
                arm.axes,
                (row,),
                False,
                state(row),
                waste=row.waste,
                padding_avoided=row.padding_avoided,
                best=_best((row,), cut),
                samples=row.samples,
                total=row.total,
                hours=row.hours,
                hours_lost=row.hours_lost,
                marks=marks[row.name],
            )


def _state(rows: Sequence[Row], cut: int | None) -> str:
    words = "finished" if all(r.finished for r in rows) else state(next(r for r in rows if not r.finished))
    return words if len(rows) == 1 else f"{words}, {len(rows)} seeds"


def _by_task(line: Line) -> Iterable[Line]:
    """The line on the test set (also of runs that have none), then on its other windows and on the suites' tasks."""
    places = list(dict.fromkeys((s.task, s.window) for r in line.rows for s in r.scores))
    own = (TEST, line.window)
    if own not in places:
        yield line
    for task, window in sorted(places, key=lambda p: (p[0] != TEST, p != own)):
        found = [next((s for s in r.scores if (s.task, s.window) == (task, window)), None) for r in line.rows]
        there = [s for s in found if s is not None]
        rows = tuple(r for r, s in zip(line.rows, found, strict=True) if s is not None)
        scored = replace(
            line,
            task=task,
            evaluated=window,
            rows=rows,
            scored=tuple(there),
            scores=scores_of(there),
            ceiling=there[0].ceiling,
            data=there[0].data,
            called=there[0].called,
        )
        # What training cost and how it went is said once, in the line of the test set.
        yield scored if (task, window) == own else _without_training(scored, there)


def _without_training(line: Line, there: Sequence[Scores]) -> Line:
    blank = dict.fromkeys(
        ("best", "area", "samples_to", "hours_to", "samples_to_goal", "hours_to_goal", "hours", "hours_lost")
    )
    waste = _mean([s.metrics.get("waste") for s in there])
    blank |= dict.fromkeys(("samples", "test_samples", "total", "padding_avoided", "accuracy"))
    state = "same weights" if not line.own or line.task == TEST else ""
    return replace(line, waste=waste, state=state, **blank)  # type: ignore[arg-type]


def scores_of(there: Sequence[Scores]) -> dict[str, Cell]:
    """The metrics of one task and window, each folded over the seeds; recalls with their intervals over queries."""
    same = len({(s.data, s.convention) for s in there}) == 1
    found = {}
    for name in dict.fromkeys(k for s in there for k in s.metrics):
        values = tuple(float(s.metrics[name]) for s in there if name in s.metrics)
        cell = Cell(float(np.mean(values)), values)
        if name in RECALLS and len(values) == len(there) and same:
            side, k = name[:3], int(name.rpartition("_")[2])
            if len(there) == 1 and there[0].queries.get(side):
                ours = intervals.share(values[0], there[0].queries[side])
                cell = replace(cell, low=ours.low, high=ours.high)
            elif all(side in s.ranks for s in there):
                ours = intervals.mean_share([intervals.hits(s.ranks[side], k) for s in there])
                cell = replace(cell, low=ours.low, high=ours.high)
        found[name] = cell
    return found


def _at_cut(line: Line, cut: int) -> Line:
    """Its scores on validation at the last evaluation up to ``cut``."""
    scores = {}
    for name in (MEAN, "i2t_recall_at_1", "t2i_recall_at_1"):
        values = [v for r in line.rows if (v := at(r, f"val/{name}", cut)) is not None]
        if len(values) != len(line.rows):
            continue
        scores[name] = Cell(float(np.mean(values)), tuple(values))
        pairs = at(line.rows[0], "val/pairs", cut)
        if len(values) == 1 and pairs and name != MEAN:
            ours = intervals.share(values[0], int(pairs))
            scores[name] = Cell(values[0], tuple(values), ours.low, ours.high)
    return replace(line, scores=scores, data=str(line.rows[0].identity.get("data.val", "")), called="validation")


def _with_goals(line: Line, smallest: Sequence[Row], cut: int | None, goal: float | None) -> Line:
    """How soon each run was as good as the smallest window of its seed ever was, and as the ``goal``."""
    goals = {r.seed: b.value for r in smallest if (b := _best((r,), cut)) is not None}
    found: dict[str, list[float]] = {k: [] for k in ("samples_to", "hours_to", "samples_to_goal", "hours_to_goal")}
    for row in line.rows:
        for name, value in (("to", goals.get(row.seed)), ("to_goal", goal)):
            curve = [(s, v) for s, v in row.val if cut is None or s <= cut]
            reached = None if value is None else reaches(curve, value)
            if reached is not None:
                found[f"samples_{name}"].append(reached)
                found[f"hours_{name}"].append(hours_at(row, reached))
    return replace(line, **{k: _cell(v, len(line.rows)) for k, v in found.items()})  # type: ignore[arg-type]


def _best(rows: Sequence[Row], cut: int | None) -> Cell | None:
    values = []
    for row in rows:
        curve = [v for s, v in row.val if v == v and (cut is None or s <= cut)]
        values += [max(curve)] if curve else []
    return _cell(values, len(rows))


def _cell(values: Sequence[float], of: int) -> Cell | None:
    return Cell(float(np.mean(values)), tuple(float(v) for v in values)) if values and of else None


def _mean(values: Sequence[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    return float(np.mean(known)) if known else None


def _external(model: External, lines: Sequence[Line]) -> Iterable[Line]:
    """A model from outside on its tasks; what is on the test set of the runs stands among them."""
    tested = {line.data for line in lines if line.task == TEST and line.data}
    accuracy = _cell([float(np.mean(list(model.accuracy.values())))], 1) if model.accuracy else None
    places = [(TEST if s.data in tested else s.task, s) for s in model.scores]
    if accuracy and not any(task == TEST for task, _ in places):
        places.insert(0, (TEST, Scores(TEST, "", model.context_length or 0, {}, {})))
    for task, s in places:
        yield Line(
            "external",
            model.name,
            task,
            model.context_length,
            s.window or None,
            "",
            {},
            (),
            True,
            "external",
            scored=(s,),
            scores=scores_of([s]) if s.metrics else {},
            accuracy=accuracy if task == TEST else None,
            waste=s.metrics.get("waste"),
            source=model.source,
            data=s.data,
            called=s.called,
        )


def _reported(one: Reference) -> Line:
    scores = {k: Cell(v, (v,)) for k, v in one.metrics.items() if k != "accuracy"}
    value = one.metrics.get("accuracy")
    accuracy = None if value is None else Cell(value, (value,))
    return Line(
        "reported",
        one.name,
        one.task,
        one.window,
        one.window,
        "",
        {},
        (),
        True,
        "reported, not measured",
        scores=scores,
        accuracy=accuracy,
        source=one.source,
    )


# ---- differences -------------------------------------------------------------------------------------------------


def _baseline(line: Line, lines: Sequence[Line]) -> Line | None:
    """The line of the smallest window of its group, at its own window, on the same queries."""
    if line.kind == "external":
        groups = {repr((x.sweep, sorted(x.axes.items()))) for x in lines if x.kind == "measured"}
        if len(groups) != 1:
            return None
        group = [x for x in lines if x.kind == "measured"]
    else:
        group = [x for x in lines if x.kind == "measured" and (x.sweep, x.axes) == (line.sweep, line.axes)]
    smallest = min((x.window for x in group if x.window), default=None)
    found = [x for x in group if x.window == smallest and x.own and x.counts and x.task == line.task]
    return found[0] if found and found[0] is not line else None


def _against(line: Line, base: Line | None) -> Line:
    if base is None or not line.counts or not line.scores or not line.data or line.data != base.data:
        return line
    deltas = {}
    for name in (*RECALLS, MEAN):
        if name in line.scores and name in base.scores:
            deltas[name] = _delta(name, line, base)
    return replace(line, deltas=deltas, baseline=base.name)


def _delta(name: str, line: Line, base: Line) -> Delta:
    ours, theirs = _by_seed(line, name), _by_seed(base, name)
    if common := [s for s in ours if s in theirs]:
        ours, theirs = [{s: part[s] for s in common} for part in (ours, theirs)]
    value = float(np.mean([v for v, _ in ours.values()]) - np.mean([v for v, _ in theirs.values()]))
    side, k = name[:3], name.rpartition("_")[2]
    scored = [*(s for _, s in ours.values()), *(s for _, s in theirs.values())]
    known = [s for s in scored if s is not None and side in s.ranks]
    if name == MEAN or len(known) < len(scored) or len({s.convention for s in known}) > 1:
        return Delta(value, None, None, len(ours))
    after, before = ([intervals.hits(s.ranks[side], int(k)) for _, s in part.values() if s] for part in (ours, theirs))
    found = intervals.difference(before, after)
    return Delta(value, found.low, found.high, len(ours))


def _by_seed(line: Line, name: str) -> dict[int | None, tuple[float, Scores | None]]:
    """The value, and the scores that it is from (validation keeps none); a model from outside has no seed."""
    seeds: Sequence[int | None] = [row.seed for row in line.rows] or [None]
    scored: Sequence[Scores | None] = line.scored or [None] * len(seeds)
    return dict(zip(seeds, zip(line.scores[name].by_seed, scored, strict=True), strict=True))
