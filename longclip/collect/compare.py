"""Rows side by side: windows within groups equal in every other axis, seeds folded, differences to the smallest."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np

from longclip.collect import intervals
from longclip.collect.arms import Arm, arms_of, best_of, called, choose, fold, mean_of, missing_seeds
from longclip.collect.checks import differences, undeclared
from longclip.collect.comparison import MEAN, RECALLS, VAL, Cell, Comparison, Delta, Line
from longclip.collect.progress import area, at, cut_of, hours_at, last_evaluation
from longclip.collect.references import Reference
from longclip.collect.row import TEST, Row, Scores, count, reaches, state
from longclip.collect.scores import External, together
from longclip.collect.zeroshot import mean_accuracy, shared_tasks
from longclip.errors import UserError


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
    arms = arms_of(rows, odd)
    cut = cut_of(rows) if trim else None
    arms, choices = choose(arms, best_over, cut)
    counting: list[Row | External] = [*(row for arm in arms for row in arm.done(cut)), *externals]
    # Zero-shot is of the chosen checkpoints: at equal samples there is none of the runs.
    tasks, unlike = shared_tasks(counting if cut is None else externals)
    lines = [line for arm in arms for line in _lines(arm, arms, cut, goal, tasks)]
    tests = [s for line in lines if line.task == TEST for s in line.scored]
    lines += [line for model in externals for line in _external(model, tests, tasks)]
    lines = _apart(lines)
    lines = [_against(line, _baseline(line, lines)) for line in lines]
    lines += [_reported(one) for one in references]
    order = list(dict.fromkeys(line.task for line in lines))
    order.sort(key=lambda task: task not in (TEST, VAL))
    lines.sort(key=lambda line: order.index(line.task))
    said = [*differences(rows), *missing_seeds(arms), *_cut_off(rows, cut), *unlike, *_other_queries(externals, tests)]
    return Comparison(tuple(rows), tuple(lines), tuple(said), tuple(choices), cut, goal)


def _cut_off(rows: Sequence[Row], cut: int | None) -> list[str]:
    if cut is None:
        return []
    early = [r.name for r in rows if last_evaluation(r, cut) is None]
    seen = {r.name: s for r in rows if (s := last_evaluation(r, cut)) is not None}
    if len(set(seen.values())) == 1:
        said = [f"all compared at {count(cut)} samples, on validation: the last evaluation that all have"]
    else:
        each = ", ".join(f"{name} at {s:,}" for name, s in seen.items())
        said = [f"UNEQUAL samples: no position at which all were evaluated up to {cut:,}: {each}"]
    return said + ([f"not evaluated by then, and left out: {', '.join(early)}"] if early else [])


# ---- lines -------------------------------------------------------------------------------------------------------


def _lines(arm: Arm, arms: Sequence[Arm], cut: int | None, goal: float | None, tasks: Sequence[str]) -> Iterable[Line]:
    """One for the runs that count, on each task at each window; one for every other run.

    ``tasks``: of zero-shot classification, over which the mean is taken."""
    done = arm.done(cut)
    if done:
        smallest = min((a for a in arms if a.group == arm.group), key=lambda a: (a.window, bool(a.marks)))
        name = called(done) if len(done) > 1 else done[0].name
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
            accuracy=fold([a for r in done if (a := mean_accuracy(r, tasks)) is not None], len(done))
            if cut is None
            else None,
            waste=mean_of([r.waste for r in done]),
            padding_avoided=mean_of([r.padding_avoided for r in done]),
            best=best_of(done, cut),
            area=fold([a for r in done if (a := area(r, cut)) is not None], len(done)),
            samples=mean_of([min(r.samples, cut) if cut else r.samples for r in done]),
            test_samples=mean_of([r.test_samples for r in done]) if cut is None else None,
            total=done[0].total,
            hours=sum(r.hours for r in done),
            hours_lost=sum(r.hours_lost for r in done),
            marks=arm.marks,
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
                best=best_of((row,), cut),
                samples=row.samples,
                total=row.total,
                hours=row.hours,
                hours_lost=row.hours_lost,
                marks=arm.marks,
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
    waste = mean_of([s.metrics.get("waste") for s in there])
    blank |= dict.fromkeys(("samples", "test_samples", "total", "padding_avoided", "accuracy"))
    state = "same weights" if not line.own or line.task == TEST else ""
    return replace(line, waste=waste, state=state, **blank)  # type: ignore[arg-type]


def scores_of(there: Sequence[Scores]) -> dict[str, Cell]:
    """The metrics of one task and window, each folded over the seeds; recalls with their intervals over queries."""
    same = all(s.alike(there[0]) for s in there)
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
    goals = {r.seed: b.value for r in smallest if (b := best_of((r,), cut)) is not None}
    found: dict[str, list[float]] = {k: [] for k in ("samples_to", "hours_to", "samples_to_goal", "hours_to_goal")}
    for row in line.rows:
        for name, value in (("to", goals.get(row.seed)), ("to_goal", goal)):
            curve = [(s, v) for s, v in row.val if cut is None or s <= cut]
            reached = None if value is None else reaches(curve, value)
            if reached is not None:
                found[f"samples_{name}"].append(reached)
                found[f"hours_{name}"].append(hours_at(row, reached))
    return replace(line, **{k: fold(v, len(line.rows)) for k, v in found.items()})  # type: ignore[arg-type]


def _external(model: External, tests: Sequence[Scores], tasks: Sequence[str]) -> Iterable[Line]:
    """A model from outside on its tasks; what is on the test set of the runs stands among them."""
    mean = mean_accuracy(model, tasks)
    accuracy = None if mean is None else Cell(mean, (mean,))
    places = [(s.task, s) for s in together((), model.scores, tests)]
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


def _apart(lines: Sequence[Line]) -> list[Line]:
    """A suite's task takes each model's own text where it names none: one table for each text that was taken."""
    texts: dict[str, set[str]] = {}
    for line in lines:
        texts.setdefault(line.task, set()).update(s.text for s in line.scored if s.text is not None)
    found = []
    for line in lines:
        text = line.scored[0].text if line.scored else None
        if line.task not in (TEST, VAL) and text is not None and len(texts[line.task]) > 1:
            name = f"{line.task} ({text})"
            line = replace(line, task=name, called=name)
        found.append(line)
    return found


def _other_queries(externals: Sequence[External], tests: Sequence[Scores]) -> list[str]:
    """Models from outside that were scored on the test set's shards, and are in a table of their own all the same."""
    found = []
    for model in externals:
        for s in model.scores:
            theirs = next((test for test in tests if test.data == s.data), None)
            if theirs is None or any(s.alike(test) for test in tests):
                continue
            key = "convention" if s.convention != theirs.convention else "text"
            ours, others = getattr(s, key), getattr(theirs, key)
            found.append(
                f"{model.name}: {s.task} at window {s.window} is of the test set's shards with {key} {ours}, the runs' "
                f"test with {others}: not compared with it ({key}: {others} in the suite's task, and longclip "
                "evaluate, does that)"
            )
    return found


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
        group = [x for x in lines if x.kind == "measured"]
        if len({x.group for x in group}) != 1:
            return None
    else:
        group = [x for x in lines if x.kind == "measured" and x.group == line.group]
    smallest = min((x.window for x in group if x.window), default=None)
    found = [x for x in group if x.window == smallest and x.own and x.counts and x.task == line.task]
    found.sort(key=lambda x: bool(x.marks))
    return found[0] if found and found[0] is not line else None


def _against(line: Line, base: Line | None) -> Line:
    if base is None or not line.counts or not line.scores or not line.data or line.data != base.data:
        return line
    if len({s.text for x in (line, base) for s in x.scored} - {None}) > 1:
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
