"""Arms: the runs of a sweep that differ in their seed only, and which of them stand in a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from longclip.collect.checks import Undeclared
from longclip.collect.comparison import Cell, group_of
from longclip.collect.progress import last_evaluation
from longclip.collect.row import SEED, WINDOW, Row
from longclip.errors import UserError
from longclip.experiment.sweep import short_name


@dataclass(frozen=True, eq=False)
class Arm:
    """Runs of a sweep that differ in their seed only."""

    sweep: str
    axes: Mapping[str, Any]
    window: int
    rows: tuple[Row, ...]
    marks: tuple[str, ...] = ()
    """undeclared differences, in words: such runs are an arm of their own"""

    @property
    def group(self) -> str:
        """Equal in every axis but the window."""
        return group_of(self.sweep, self.axes)

    def done(self, cut: int | None) -> tuple[Row, ...]:
        """The runs that count: finished ones; at equal samples, all that validation has seen by then."""
        return tuple(r for r in self.rows if (r.finished if cut is None else last_evaluation(r, cut) is not None))


def arms_of(rows: Sequence[Row], odd: Sequence[Undeclared] = ()) -> list[Arm]:
    """Arms by group, then window. Two runs with one seed are two arms: they differ in what decides no weights."""
    found: dict[str, Arm] = {}
    for row in rows:
        axes = {k: v for k, v in row.axes.items() if k not in (WINDOW, SEED)}
        marks = tuple(f"{u.field} is {u.value}" for u in odd if u.run == row.name)
        arm = Arm(row.sweep, axes, row.context_length, (row,), marks)
        for again in range(len(rows)):
            key = repr((arm.group, arm.window, marks, again))
            before = found.get(key)
            if before is None or row.seed not in [r.seed for r in before.rows]:
                found[key] = arm if before is None else replace(before, rows=(*before.rows, row))
                break
    return _in_order(list(found.values()))


def _in_order(arms: Sequence[Arm]) -> list[Arm]:
    """Groups as they come, each from its smallest window on; what nobody declared comes last."""
    first = {arm.group: i for i, arm in reversed(list(enumerate(arms)))}
    return sorted(arms, key=lambda arm: (first[arm.group], arm.window, bool(arm.marks)))


def choose(arms: list[Arm], over: Sequence[str], cut: int | None) -> tuple[list[Arm], list[str]]:
    """Of the arms that differ in the axes ``over`` only, the one that validation prefers; and that in words.

    Runs that are not finished stay, for they must be seen.
    """
    axes = sorted({k for arm in arms for k in arm.axes})
    for key in over:
        if key not in axes:
            raise UserError(f"--best-over {key}: not a declared axis; valid: {', '.join(axes) or 'none here'}")
    if not over:
        return arms, []
    kept: list[Arm] = []
    said: list[str] = []
    pools: dict[str, list[Arm]] = {}
    for arm in arms:
        rest = {k: v for k, v in arm.axes.items() if k not in over}
        pools.setdefault(repr((group_of(arm.sweep, rest), arm.window)), []).append(arm)
    for pool in pools.values():
        means = {i: best.value for i, arm in enumerate(pool) if (best := best_of(arm.done(cut), cut)) is not None}
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
            said.append(f"{called(pool[winner].done(cut), over)}: {values}, chosen on validation (R@1: {tried})")
    merged: dict[str, list[Arm]] = {}
    for arm in kept:
        merged.setdefault(repr((arm.group, arm.window, arm.marks)), []).append(arm)
    whole = [replace(part[0], rows=tuple(r for arm in part for r in arm.rows)) for part in merged.values()]
    return _in_order(whole), said  # a window that not every value was tried for would stand where it was met


def called(rows: Sequence[Row], without: Sequence[str] = ()) -> str:
    """The name of runs that differ in their seed only: without it, as without the other axes named."""
    names = []
    for row in rows:
        drop = {short_name(k, row.axes[k]) for k in (SEED, *without) if k in row.axes}
        drop |= {f"s{row.seed}", f"seed{row.seed}"} if len(rows) > 1 else set()
        name = row.folder.rpartition("-")[0] if len(rows) > 1 else row.name  # seeds have ids of their own
        parts = [part for part in name.split("_") if part not in drop]
        names.append("_".join(parts) or name)
    return names[0] if len(set(names)) == 1 else f"{names[0]} ..."


def missing_seeds(arms: Sequence[Arm]) -> list[str]:
    """Windows that lack a seed which others of their group have."""
    seeds: dict[str, dict[int, list[Row]]] = {}
    for arm in arms:
        seeds.setdefault(arm.group, {}).setdefault(arm.window, []).extend(arm.rows)
    found = []
    for windows in seeds.values():
        every = {r.seed for rows in windows.values() for r in rows}
        for rows in windows.values():
            if lacking := sorted(every - {r.seed for r in rows}):
                which = ", ".join(map(str, lacking))
                found.append(f"{called(rows)}: no run with seed {which}, which other windows have")
    return found


def best_of(rows: Sequence[Row], cut: int | None) -> Cell | None:
    values = []
    for row in rows:
        curve = [v for s, v in row.val if v == v and (cut is None or s <= cut)]
        values += [max(curve)] if curve else []
    return fold(values, len(rows))


def fold(values: Sequence[float], of: int) -> Cell | None:
    return Cell(float(np.mean(values)), tuple(float(v) for v in values)) if values and of else None


def mean_of(values: Sequence[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    return float(np.mean(known)) if known else None
