"""Attempts: the tries of one run, numbered from 1.

Submit makes ``attempts/0003/`` with ``submitted.json``; rank 0 of the job claims it by creating ``started.json``
(O_EXCL: one job wins) and ends it with ``ended.json``. An attempt without ``ended.json`` was killed, or still runs:
the scheduler knows which. A later claim fences off an earlier one, which must check before it publishes anything.
"""

from __future__ import annotations

import json
import os
import socket
import time
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from longclip.errors import LongclipError
from longclip.run.folder import RunFolder, read_json, write_json

FINISHED = "finished"
"""The verdict that ends a run for good."""
INTERRUPTED = "interrupted"
"""Stopped at a step boundary by a signal, after a checkpoint."""
CANCELLED = "cancelled"
"""Stopped for good by a person."""


class Superseded(LongclipError):
    """A later attempt of the same run has started; this one must stop and publish nothing."""


@dataclass(frozen=True)
class Attempt:
    """One try of a run."""

    path: Path

    @property
    def number(self) -> int:
        return int(self.path.name)

    @property
    def journal(self) -> Path:
        return self.path / "journal.jsonl"

    @property
    def logs(self) -> Path:
        return self.path / "logs"

    @cached_property
    def submitted(self) -> dict[str, Any] | None:
        return _read(self.path / "submitted.json")

    @cached_property
    def started(self) -> dict[str, Any] | None:
        return _read(self.path / "started.json")

    @cached_property
    def ended(self) -> dict[str, Any] | None:
        return _read(self.path / "ended.json")

    @cached_property
    def resumed_at(self) -> int | None:
        """Samples seen when training of this attempt began; None if it never began."""
        resumed = _read(self.path / "resumed.json")
        return None if resumed is None else int(resumed["samples"])

    @property
    def job(self) -> str | None:
        """The scheduler's id; for the local executor the process id of the job's controller."""
        job = (self.submitted or {}).get("job") or (self.started or {}).get("job")
        return None if job is None else str(job)

    def begin(self, samples: int) -> None:
        """Records where training resumed. Written once, before the first point of the journal."""
        write_json(self.path / "resumed.json", {"samples": samples})

    def end(self, verdict: str, samples: int, message: str = "") -> None:
        """Records why the attempt ended."""
        write_json(
            self.path / "ended.json", {"verdict": verdict, "samples": samples, "message": message, "time": time.time()}
        )

    def fail(self, rank: int, kind: str, samples: int, message: str, trace: str) -> None:
        """Records that ``rank`` failed, one file a rank: the verdict is that of the first (run/verdicts.py)."""
        record = {
            "rank": rank,
            "kind": kind,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "samples": samples,
            "time": time.time(),
            "message": message,
            "traceback": trace,
        }
        write_json(self.path / f"failed-{rank:04d}.json", record)

    def fence(self) -> None:
        """Raises Superseded if a later attempt has been claimed."""
        run = RunFolder(self.path.parent.parent)
        later = [a for a in attempts_of(run) if a.number > self.number and (a.path / "started.json").exists()]
        if later:
            raise Superseded(f"attempt {self.number} was superseded by attempt {later[-1].number}")


def attempts_of(run: RunFolder) -> list[Attempt]:
    """All attempts, oldest first."""
    return [Attempt(p) for p in sorted(run.attempts.glob("[0-9]*")) if p.is_dir()]


def new_attempt(run: RunFolder) -> Attempt:
    """Makes the next attempt's folder; mkdir decides between two that try at once."""
    while True:
        known = attempts_of(run)
        path = run.attempts / f"{(known[-1].number if known else 0) + 1:04d}"
        try:
            path.mkdir()
        except FileExistsError:
            continue
        (path / "logs").mkdir()
        return Attempt(path)


def claim(run: RunFolder, number: int, job: str, facts: dict[str, Any]) -> Attempt:
    """The attempt that this job is to be: the one it was submitted as, or a new one if that has started (a requeue) or
    counts as rejected (sbatch was given up on, and Slurm had taken the job all the same)."""
    attempt = Attempt(run.attempts / f"{number:04d}")
    if not attempt.path.is_dir() or attempt.started is not None or attempt.ended is not None:
        attempt = new_attempt(run)
    try:
        handle = os.open(attempt.path / "started.json", os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
    except FileExistsError:
        raise Superseded(f"{attempt.path}: claimed by another job in the same moment") from None
    with os.fdopen(handle, "w", encoding="utf-8") as f:  # after this a later attempt's start would fence this one
        json.dump({"job": job, "time": time.time(), **facts}, f)
        f.flush()
        os.fsync(f.fileno())
    attempt.fence()
    return attempt


def _read(path: Path) -> dict[str, Any] | None:
    try:
        return read_json(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValueError:  # torn: its writer was killed in the act, so the event was not recorded
        return {}
