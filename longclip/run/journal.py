"""The journal: what a run measured, one JSON line a point, append-only, one file an attempt.

A line is ``{"t": seconds since 1970, "step": int, "samples": int, "metrics": {name: float}}``; its position on every
curve is ``samples``, the number of pairs seen. The effective journal of a run is that of its attempts laid end to
end, each cut where the next one resumed: what was computed twice shows once, and nothing has to be marked.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import TextIO

from longclip.errors import told_as_no_space
from longclip.run.attempts import Attempt, attempts_of
from longclip.run.folder import RunFolder

SAVE_SECONDS = "checkpoint/seconds"
"""The metric that tells how long a save took"""


@dataclass(frozen=True)
class Point:
    """Metrics measured after ``samples`` pairs."""

    time: float
    step: int
    samples: int
    metrics: Mapping[str, float]


class Journal:
    """Appends points to an attempt's journal. ``flush`` before anything that must not be ahead of it.

    All of it raises NoSpace where the disk is full. A line that was cut by it is dropped by readers.
    """

    def __init__(self, file: Path) -> None:
        self._path = file
        with told_as_no_space(file):
            self._file: TextIO = file.open("a", encoding="utf-8")

    def write(self, step: int, samples: int, metrics: Mapping[str, float], when: float | None = None) -> None:
        line = {"t": round(when or time.time(), 3), "step": step, "samples": samples, "metrics": dict(metrics)}
        with told_as_no_space(self._path):
            self._file.write(json.dumps(line, separators=(",", ":")) + "\n")

    def flush(self) -> None:
        with told_as_no_space(self._path):
            self._file.flush()
            # On NFS a checkpoint could otherwise be seen before the points that it covers.
            os.fsync(self._file.fileno())

    def close(self) -> None:
        with told_as_no_space(self._path):
            self._file.close()


def read_points(file: Path) -> list[Point]:
    """All points of one journal file; a torn last line (the writer was killed) is dropped."""
    if not file.exists():
        return []
    lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
    try:  # all at once takes half the time of line by line
        entries = json.loads(f"[{','.join(lines)}]")
        if len(entries) == len(lines):
            return [Point(e["t"], e["step"], e["samples"], e["metrics"]) for e in entries]
    except (ValueError, KeyError, TypeError):
        pass
    points = []
    for line in lines:
        try:
            entry = json.loads(line)
            points.append(Point(entry["t"], entry["step"], entry["samples"], entry["metrics"]))
        except (ValueError, KeyError, TypeError):
            continue
    return points


def effective(run: RunFolder) -> list[Point]:
    """The run's points in order of samples seen, each position once."""
    attempts = attempts_of(run)
    return laid(attempts, {a: read_points(a.journal) for a in attempts if a.resumed_at is not None})


def laid(attempts: Sequence[Attempt], journals: Mapping[Attempt, Sequence[Point]]) -> list[Point]:
    """The journals of all attempts laid end to end, each cut where the next one resumed."""
    parts: list[Sequence[Point]] = []
    end = float("inf")
    again: set[str] = set()
    """metrics of later attempts at ``end`` itself: one may begin with a validation of what it resumed from"""
    for attempt in reversed(attempts):
        if attempt.resumed_at is None:
            continue
        points = journals[attempt]
        if end < float("inf"):
            points = [p for p in points if p.samples < end or (p.samples == end and not again & p.metrics.keys())]
        parts.append(points)
        end = min(end, float(attempt.resumed_at))
        again = {name for part in parts for name in _named_up_to(part, end)}
    return [point for part in reversed(parts) for point in part]


def _named_up_to(points: Sequence[Point], samples: float) -> set[str]:
    return {name for p in takewhile(lambda p: p.samples <= samples, points) for name in p.metrics}


def series(points: Iterable[Point], metric: str) -> list[tuple[int, float]]:
    """``(samples, value)`` of one metric."""
    return [(p.samples, p.metrics[metric]) for p in points if metric in p.metrics]


def text_shares(points: Sequence[Point], window: int) -> tuple[float, float] | None:
    """Waste (share of caption tokens that the window cut off, arXiv 2510.03978) and the share of window positions that
    hold no token, which packing did not compute; over all training captions so far. None before the first step."""
    counted = [p for p in points if "text/tokens" in p.metrics]
    kept = sum(p.metrics["text/tokens"] for p in counted)
    if not kept:
        return None
    lost = sum(p.metrics["text/tokens_cut"] for p in counted)
    return lost / (kept + lost), 1.0 - kept / (counted[-1].samples * window)


def longest_save(run: RunFolder) -> float | None:
    """The longest that a save of this run has taken, in seconds; None before the first."""
    if not run.exists():
        return None
    return max((seconds for _, seconds in series(effective(run), SAVE_SECONDS)), default=None)
