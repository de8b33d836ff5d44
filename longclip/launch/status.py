"""Where runs stand, from their records and the scheduler's word. Reading changes nothing."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from longclip.launch.scheduler import Word, Words, ask
from longclip.run.attempts import FINISHED, INTERRUPTED, Attempt, attempts_of
from longclip.run.folder import RunFolder
from longclip.run.journal import Point, effective, series

CONTINUES = ("interrupted", "lost", "new", "rejected")
"""States from which submit continues a run without being told twice"""


BEING_SUBMITTED = 300
"""Seconds for which an attempt without a job id counts as being in sbatch's hands"""


@dataclass(frozen=True)
class Status:
    """One run as it stands."""

    run: RunFolder
    state: str
    """new, queued, running, finished, interrupted, lost, crashed, diverged, cancelled, unknown"""
    note: str
    attempts: int
    samples: int
    total: int | None
    loss: float | None
    recall: float | None
    """mean of the two directions' Recall@1 on validation, in [0, 1]"""
    speed: float | None
    """samples per second, at the last point of the meters"""
    age: float | None
    """seconds since the journal's last point"""

    def as_dict(self) -> dict[str, Any]:
        values = {k: v for k, v in vars(self).items() if k != "run"}
        return {"run": self.run.name, "sweep": self.run.sweep, "path": str(self.run.path), **values}


def statuses(runs: Sequence[RunFolder]) -> tuple[list[Status], Words]:
    """Status of every run, with one question to the scheduler for all of them."""
    last = {run.path: attempts[-1] for run in runs if (attempts := attempts_of(run))}
    open_ = [a for a in last.values() if a.ended is None and a.job]
    words = ask(
        [str(a.job) for a in open_ if (a.submitted or {}).get("executor", "slurm") == "slurm"],
        [(host_of(a), str(a.job)) for a in open_ if (a.submitted or {}).get("executor") in ("local", "debug")],
    )
    return [_status(run, words) for run in runs], words


def host_of(attempt: Attempt) -> str:
    return str((attempt.submitted or {}).get("host", ""))


def _status(run: RunFolder, words: Words) -> Status:
    attempts = attempts_of(run)
    points = effective(run)
    state, note = state_of(run, words)
    losses, recalls = series(points, "train/loss"), series(points, "val/mean_recall_at_1")
    speeds = series(points, "speed/samples_per_second")
    totals = [s["samples"] for a in reversed(attempts) if (s := a.submitted) and s.get("samples")]
    total = totals[0] if totals else run.experiment().train.samples
    return Status(
        run,
        state,
        note,
        len(attempts),
        _samples(points),
        total,
        losses[-1][1] if losses else None,
        recalls[-1][1] if recalls else None,
        speeds[-1][1] if speeds and state == "running" else None,
        time.time() - points[-1].time if points else None,
    )


def _samples(points: Sequence[Point]) -> int:
    return points[-1].samples if points else 0


def state_of(run: RunFolder, words: Words) -> tuple[str, str]:
    """State and one line of explanation.

    The worker's verdict counts first; without one the scheduler is asked; a job that nobody knows any more and that
    left no verdict was lost (killed), and its run continues with the next submit.
    """
    attempts = attempts_of(run)
    if not attempts:
        return "new", ""
    last = attempts[-1]
    cancelled = (last.path / "cancelled.json").exists()
    if last.ended:
        verdict = str(last.ended.get("verdict"))
        if verdict == FINISHED:
            return "finished", f"{len(attempts)} attempt{'s' if len(attempts) > 1 else ''}"
        if verdict == INTERRUPTED:
            return ("cancelled", "by longclip cancel") if cancelled else ("interrupted", "stopped by a signal, saved")
        return verdict, str(last.ended.get("message", ""))
    if not last.job:
        age = time.time() - float((last.submitted or {}).get("time", 0))
        return ("queued", "being submitted") if age < BEING_SUBMITTED else ("lost", "was never queued")
    local = (last.submitted or {}).get("executor") in ("local", "debug")
    word = words.jobs.get(f"{host_of(last)}:{last.job}" if local else str(last.job), Word("UNKNOWN"))
    return _from_word(word, last, cancelled)


def _from_word(word: Word, last: Attempt, cancelled: bool) -> tuple[str, str]:
    job = f"job {last.job}"
    if word.state == "PENDING":
        return "queued", f"{job}: {word.detail}"
    if word.alive:
        return "running", f"{job}{' on ' + ','.join(n) if (n := (last.started or {}).get('nodes')) else ', starting'}"
    if word.state == "UNKNOWN":
        return "unknown", word.detail or f"{job}: the scheduler does not answer"
    if word.state == "CANCELLED" or cancelled:
        return "cancelled", f"{job} {word.detail}".strip()
    if word.state == "GONE":
        return "lost", f"{job} is gone and left no verdict"
    return "lost", f"{job}: {word.state}, no verdict left"
