"""What a run has cost, and how much of it came to nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from longclip.run.attempts import FINISHED, Attempt
from longclip.run.journal import Point, read_points
from longclip.run.verdicts import Verdict, verdict_of


def rank_hours(
    attempts: Sequence[Attempt], journals: Mapping[Attempt, Sequence[Point]] | None = None
) -> tuple[float, float]:
    """Hours times ranks of all attempts, and how much of it was lost. ``journals`` spares reading them again.

    An attempt lasts from its start to its verdict, or to its last journal point if it was killed. What came after the
    last point that a later attempt did not compute once more is lost.
    """
    total = lost = 0.0
    cut = float("inf")
    for attempt in reversed(attempts):
        points = read_points(attempt.journal) if journals is None else journals[attempt]
        if found := span(attempt, points):
            begin, finish, ranks = found
            total += (finish - begin) * ranks
            lost += (finish - _useful_until(points, cut, begin, finish, verdict_of(attempt))) * ranks
        if attempt.resumed_at is not None:
            cut = min(cut, attempt.resumed_at)
    return total / 3600, lost / 3600


def span(attempt: Attempt, points: Sequence[Point]) -> tuple[float, float, int] | None:
    """When an attempt began and ended, in seconds since 1970, and its ranks; None where it left no trace of either."""
    started, verdict = attempt.started or {}, verdict_of(attempt)
    begin = started.get("time")
    finish = (verdict.time if verdict else None) or (points[-1].time if points else None)
    return None if begin is None or finish is None else (begin, finish, int(started.get("ranks", 1)))


def _useful_until(points: Sequence[Point], cut: float, begin: float, finish: float, verdict: Verdict | None) -> float:
    if not points:  # a start that failed, unless only the test was left to do
        return finish if verdict is not None and verdict.kind == FINISHED else begin
    if points[-1].samples <= cut:
        return finish
    return max((p.time for p in points if p.samples <= cut), default=begin)
