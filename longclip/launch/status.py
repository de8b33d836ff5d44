"""Where runs stand, from their records and the scheduler's word. Reading changes nothing."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from longclip.launch.scheduler import Word, Words, ask
from longclip.run.attempts import CANCELLED, FINISHED, Attempt, attempts_of
from longclip.run.folder import RunFolder
from longclip.run.hours import rank_hours
from longclip.run.journal import Point, laid, read_points, series
from longclip.run.verdicts import INFRASTRUCTURE, OWN, Verdict, from_log, log_text, stays, trail, verdict_of

CONTINUES = (*INFRASTRUCTURE, "killed", "waiting", "lost", "rejected")
"""States from which submit continues a run without being told twice"""
UNDER_WAY = ("queued", "running", "unknown")
"""States in which a job of the run may be alive"""
BEING_SUBMITTED = 300
"""Seconds for which an attempt without a job id counts as being in sbatch's hands"""
_OF_SLURM = {
    "TIMEOUT": "timed out",
    "DEADLINE": "timed out",
    "PREEMPTED": "preempted",
    "NODE_FAIL": "node failed",
    "BOOT_FAIL": "node failed",
    "OUT_OF_MEMORY": "out of memory",
}


@dataclass(frozen=True)
class Status:
    """One run as it stands."""

    run: RunFolder
    state: str
    """waiting (not queued yet), queued, running, finished, unknown, lost (never started), no progress, or the kind of
    the last attempt's verdict (run/verdicts.py)"""
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
    jobs: tuple[str, ...] = ()
    """ids of what is queued or running for it"""
    hours: float = 0.0
    """hours times ranks that its attempts have taken so far"""
    hours_lost: float = 0.0
    """of these, what was computed again or came to nothing"""
    unit: str = "CPU"
    """what the hours are of: GPU or CPU"""

    @property
    def ends(self) -> float | None:
        """When a running run will have seen all its samples at its last speed, in seconds since 1970."""
        if not self.speed or not self.total or self.age is None:
            return None
        return time.time() - self.age + (self.total - self.samples) / self.speed

    def as_dict(self) -> dict[str, Any]:
        values = {k: v for k, v in vars(self).items() if k != "run"}
        return {"run": self.run.name, "sweep": self.run.sweep, "path": str(self.run.path), **values}


def statuses(runs: Sequence[RunFolder]) -> tuple[list[Status], Words]:
    """Status of every run, with one question to the scheduler for all of them."""
    open_ = [a for run in runs for a in _asked_about(run)]
    records = [a.submitted or {} for a in open_]
    words = ask(
        [job for a in open_ if not _is_local(a) for job in _job_ids(a)],
        [(host_of(a), str(a.job)) for a in open_ if _is_local(a) and a.job],
        [int(r["uid"]) for r in records if "uid" in r],
    )
    return [_status(run, words) for run in runs], words


def _asked_about(run: RunFolder) -> list[Attempt]:
    """The attempts whose jobs may be alive: those since the last submit, unless the run has finished."""
    recent = trail(run)
    last = verdict_of(recent[-1]) if recent else None
    return [] if last is not None and last.kind == FINISHED else recent


def _job_ids(attempt: Attempt) -> list[str]:
    """The attempt's job, and those queued ahead behind it; ``?`` where it is not known (yet), so that it is asked."""
    links = [str(job) for job in (attempt.submitted or {}).get("links", ())]
    return [attempt.job or "?", *links] if attempt.submitted is not None or attempt.job else []


def host_of(attempt: Attempt) -> str:
    return str((attempt.submitted or {}).get("host", ""))


def _is_local(attempt: Attempt) -> bool:
    return (attempt.submitted or {}).get("executor", "slurm") in ("local", "debug")


def _status(run: RunFolder, words: Words) -> Status:
    attempts = attempts_of(run)
    journals = {a: read_points(a.journal) for a in attempts}
    points = laid(attempts, journals)
    state, note = state_of(run, words)
    losses, recalls = series(points, "train/loss"), series(points, "val/mean_recall_at_1")
    speeds = series(points, "speed/samples_per_second")
    totals = [s["samples"] for a in reversed(attempts) if (s := a.submitted) and s.get("samples")]
    total = totals[0] if totals else run.experiment().train.samples
    hours, lost = rank_hours(attempts, journals)
    on_gpu = any("cuda" in str((a.started or {}).get("device")) for a in attempts)
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
        tuple(_alive(run, words)) if state != "finished" else (),
        hours,
        lost,
        "GPU" if on_gpu else "CPU",
    )


def _samples(points: Sequence[Point]) -> int:
    return points[-1].samples if points else 0


def _alive(run: RunFolder, words: Words) -> list[str]:
    """Jobs of the run that wait or run, by its record and by the folder that they work in, oldest first."""
    recorded = [j for a in trail(run) for j in ([f"{host_of(a)}:{a.job}"] if _is_local(a) else _job_ids(a))]
    found = [*recorded, *words.folders.get(str(run.path.resolve()), ())]
    return [j for j in dict.fromkeys(found) if words.jobs.get(j, Word("GONE")).alive]


def state_of(run: RunFolder, words: Words) -> tuple[str, str]:
    """State and one line of explanation.

    The scheduler is believed on what waits or runs. On what has ended the worker's own verdict comes first, then the
    scheduler's, then what Slurm left in the job's log; a run that nobody says anything about was killed.
    """
    attempts = attempts_of(run)
    if not attempts:
        return "waiting", "not queued yet: longclip submit"
    last = attempts[-1]
    verdict = verdict_of(last)
    if verdict is not None and verdict.kind == FINISHED:
        return FINISHED, f"{len(attempts)} attempt{'s' if len(attempts) > 1 else ''}"
    alive = _alive(run, words)
    final = stays(run) if verdict is not None and verdict.source == "worker" else None
    if alive and not (final and all(words.jobs[j].state == "PENDING" for j in alive)):
        return _in_queue(words, alive, last, verdict)
    job = next((j for a in reversed(trail(run)) if (j := a.job)), None)
    word = words.jobs.get(f"{host_of(last)}:{job}" if _is_local(last) else str(job), Word("UNKNOWN"))
    if job is None:
        return _without_job(last, words)
    if any((a.path / "cancelled.json").exists() for a in trail(run)):
        return CANCELLED, "by longclip cancel"
    if last.started is None and (why := _canary_failed(run, last, words)):
        return "rejected", why
    if word.state == "CANCELLED" and word.by_owner and (verdict is None or verdict.kind in INFRASTRUCTURE):
        return CANCELLED, f"job {job}: scancel {word.detail}".strip()
    over = _is_local(last) and verdict is not None and verdict.source == "worker"  # no scheduler starts it again
    if word.state == "UNKNOWN" and not over and (verdict is None or verdict.kind in CONTINUES):
        before = f"; last: {verdict.kind} at {verdict.samples:,} samples" if verdict else ""
        return "unknown", (word.detail or f"job {job}: the scheduler does not answer") + before
    verdict = _of_word(word, job, last, verdict)
    waiting = f"; {', '.join(alive)} will leave by themselves" if alive else ""
    stuck = stays(run) if verdict.kind in (*OWN, "node failed") else None
    if stuck and stuck != CANCELLED:
        return "no progress", stuck + waiting
    return verdict.kind, verdict.message + waiting


def _canary_failed(run: RunFolder, attempt: Attempt, words: Words) -> str | None:
    """Why the canary that held the attempt back let it not begin; None where none did, or where it has not failed."""
    held = (attempt.submitted or {}).get("held_by")
    if not held or not words.complete or words.jobs.get(held["job"], Word("GONE")).alive:
        return None
    canary = RunFolder((run.path / held["canary"]).resolve())
    tries = [a for a in attempts_of(canary) if a.job == held["job"]]
    if not tries:
        return f"its canary, job {held['job']}, left no record in {canary.path}"
    verdict = verdict_of(tries[-1]) or from_log(tries[-1]) or _of_word(Word("GONE"), held["job"], tries[-1], None)
    if verdict.kind == FINISHED:
        return None
    return f"its canary failed: job {held['job']}: {verdict.kind}: {verdict.message}; longclip logs {canary.path}"


def _in_queue(words: Words, alive: Sequence[str], last: Attempt, verdict: Verdict | None) -> tuple[str, str]:
    before = "" if verdict is None else f"; {verdict.kind} at {verdict.samples:,} samples"
    at_work = [j for j in alive if words.jobs[j].state != "PENDING"]
    if not at_work:
        return "queued", f"job {alive[0]}: {words.jobs[alive[0]].detail}{before}"
    job = at_work[0].rpartition(":")[2]
    nodes = (last.started or {}).get("nodes") if verdict is None else None
    return "running", f"job {job}" + (f" on {','.join(nodes)}" if nodes else f", starting{before}")


def _without_job(last: Attempt, words: Words) -> tuple[str, str]:
    """A submit that is under way, or that was killed before Slurm had the job (or between that and its record)."""
    verdict = verdict_of(last)
    if verdict is not None:
        return verdict.kind, verdict.message
    age = time.time() - float((last.submitted or {}).get("time", 0))
    if age < BEING_SUBMITTED:
        return "queued", "being submitted"
    if not _is_local(last) and not words.complete:
        return "unknown", "being submitted; the scheduler does not answer"
    return "lost", "was never queued"


def _of_word(word: Word, job: str, last: Attempt, verdict: Verdict | None) -> Verdict:
    """The verdict on the last attempt, with the scheduler's word where the worker left none."""
    if verdict is not None and verdict.source == "worker":
        return verdict
    samples = verdict.samples if verdict else 0
    if word.state in _OF_SLURM:
        return Verdict(_OF_SLURM[word.state], samples, f"job {job}: {word.state}", "scheduler")
    if word.state == CANCELLED.upper():
        return Verdict("interrupted", samples, f"job {job}: cancelled {word.detail}", "scheduler")
    if verdict is not None:
        if verdict.kind == CANCELLED:  # by whom the log does not say, and nobody else can
            return Verdict(CANCELLED, samples, f"job {job}: {verdict.message} (its log says)", "log")
        return Verdict(verdict.kind, samples, f"job {job}: {verdict.message} (its log says)", "log")
    if last.started is None:
        early = f"job {job} ended before its worker began"
        if (told := from_log(last)) is not None and told.kind == "out of memory":
            return Verdict(told.kind, 0, f"{early}: {told.message}", "log")
        lines = [line.strip() for line in log_text(last).splitlines() if line.strip()]
        if lines:
            return Verdict("crashed", 0, f"{early}: {lines[-1]}", "log")
        if word.state != "GONE" or _is_local(last):
            return Verdict(
                "crashed", 0, f"job {job}: {word.state}, before its worker began, without a log", "scheduler"
            )
        return Verdict("lost", 0, f"job {job} is gone and has never started", "nobody")
    said = "is gone" if word.state == "GONE" else f"is {word.state}"
    return Verdict("killed", samples, f"job {job} {said} and left no verdict", "nobody")
