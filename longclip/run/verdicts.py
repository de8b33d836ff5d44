"""Why attempts ended, and whether the run goes on: from what the worker wrote and, where it could not, from its log.

A worker that is killed writes nothing. Then the lines count that Slurm leaves in the job's log, which are there when
accounting is off and inside a container that has no Slurm commands. What no record tells is ``killed``.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from longclip.run.attempts import CANCELLED, FINISHED, Attempt, attempts_of
from longclip.run.folder import RunFolder, read_json

INFRASTRUCTURE = ("timed out", "preempted", "interrupted", "node failed")
"""Not the run's fault: it goes on, however often."""
OWN = ("crashed", "out of memory", "hung", "killed")
"""Perhaps the run's own fault: it goes on as long as it gets further."""
NEEDS_HANDS = ("diverged", "no space", "bad input", "rejected")
"""Would end the same way again: a person decides."""
REQUEUED = "requeued-by-slurm"
"""In the folder of an attempt that left no word, and whose job Slurm started again unasked (launch/restart.py)"""
SAME_CHECKPOINT = 3
"""Own failures in a row from one checkpoint that end a run, wherever after it they happened"""
NODES_IN_A_ROW = 3
"""Preflights in a row that blamed the only node they had, and end a run: it is not the nodes, then"""

_LOST_PEER = re.compile(
    r"Connection (?:reset|closed) by peer|Broken pipe|Connection refused|remote process exited", re.I
)
"""What gloo, NCCL and the store say on a rank whose partner has gone"""
_LOG_TAIL = 256 * 1024
_SIGNS = (  # first match wins; slurmstepd, srun and the kernel's words by way of slurmstepd
    ("node failed", re.compile(r"CANCELLED AT \S+ DUE TO NODE FAILURE.*|Node failure on \S+|.*NODE FAIL.*")),
    ("out of memory", re.compile(r".*(?:oom[-_ ]kill|OOM Killed|exceeded (?:job |step )?memory limit).*", re.I)),
    ("timed out", re.compile(r"CANCELLED AT \S+ DUE TO TIME LIMIT")),
    ("preempted", re.compile(r"CANCELLED AT \S+ DUE TO PREEMPTION")),
    (CANCELLED, re.compile(r"JOB \S+ ON \S+ CANCELLED AT \S+ \*\*\*")),  # of a step: srun, when one rank has failed
    ("killed", re.compile(r"srun: error: (\S+: task \S+: (?:Killed|Segmentation fault|Bus error|Aborted))")),
    ("interrupted", re.compile(r"CANCELLED AT \S+ DUE TO JOB REQUEUE")),  # last: our own batch script says it, too
)


@dataclass(frozen=True)
class Verdict:
    """Why an attempt ended."""

    kind: str
    samples: int
    """pairs seen when it ended, as far as is known"""
    message: str = ""
    source: str = "worker"
    """who says so: worker, log, scheduler, or nobody"""
    time: float | None = None


def verdict_of(attempt: Attempt) -> Verdict | None:
    """Why ``attempt`` ended; None if it has not started, or nothing says that it ended (it may be running).

    A log's word counts only where the worker left none: a job that Slurm kills after the worker has saved is what the
    worker says it is.
    """
    ended = attempt.ended
    if ended:
        return Verdict(
            str(ended.get("verdict")),
            int(ended.get("samples") or 0),
            str(ended.get("message", "")),
            time=ended.get("time"),
        )
    if failure := first_failure(attempt):
        kind, samples, when = failure["kind"], int(failure["samples"]), failure["time"]
        where = f"rank {failure['rank']} on {failure['host']}"
        if not _LOST_PEER.search(failure["message"]):
            return Verdict(kind, samples, f"{where}: {failure['message']}", time=when)
        # Whoever it lost was killed before it could say a word; perhaps Slurm says why.
        told = from_log(attempt) or _requeued(attempt)
        if told is not None and told.kind != CANCELLED:
            return Verdict(told.kind, samples, told.message, told.source, when)
        return Verdict("killed", samples, f"{where} lost its connection to another rank", time=when)
    if attempt.started is None:
        return None
    return from_log(attempt) or _requeued(attempt)


def _requeued(attempt: Attempt) -> Verdict | None:
    if not (attempt.path / REQUEUED).exists():
        return None
    node = ", ".join((attempt.started or {}).get("nodes", ())[:1])
    return Verdict("node failed", reached(attempt), f"Slurm started the job again unasked: {node} is gone", "scheduler")


def first_failure(attempt: Attempt) -> dict[str, Any] | None:
    """The record of the rank that failed first, of those that did not only lose their connection to another."""
    records = []
    for file in attempt.path.glob("failed-*.json"):
        try:
            records.append(read_json(file))
        except (OSError, ValueError):  # torn: killed in the act
            continue
    own = [r for r in records if not _LOST_PEER.search(r["message"])]
    return min(own or records, key=lambda r: r["time"], default=None)


def log_of(attempt: Attempt) -> tuple[Path, int] | None:
    """The log of the attempt's first rank, and where in it the attempt begins: a requeued job goes on in its log."""
    started = attempt.started or {}
    if name := started.get("log"):
        return attempt.path / name, int(started.get("log_start", 0))
    files = sorted(attempt.logs.glob("*_0_log.out"))
    return (files[-1], 0) if files else None


def log_text(attempt: Attempt) -> str:
    """The last part of the attempt's own share of its log."""
    found = log_of(attempt)
    if found is None:
        return ""
    file, start = found
    end = None
    for later in attempts_of(RunFolder(attempt.path.parent.parent)):
        place = log_of(later) if later.number > attempt.number else None
        if place is not None and place[0].resolve() == file.resolve():
            end = place[1]
            break
    try:
        with file.open("rb") as f:
            size = f.seek(0, 2) if end is None else end
            f.seek(max(start, size - _LOG_TAIL))
            return f.read(max(0, size - f.tell())).decode(errors="replace")
    except OSError:
        return ""


def from_log(attempt: Attempt) -> Verdict | None:
    """What Slurm left in the attempt's log, whether or not its worker came to claim it."""
    text = log_text(attempt)
    for kind, sign in _SIGNS:
        if match := sign.search(text):
            return Verdict(kind, reached(attempt), match[match.lastindex or 0].strip(" *"), "log")
    return None


def reached(attempt: Attempt) -> int:
    """Pairs that the attempt had seen at its last sign of life."""
    from longclip.run.journal import read_points

    points = read_points(attempt.journal)
    try:
        beat = int(read_json(attempt.path / "heartbeat.json")["samples"])
    except (OSError, ValueError, KeyError, TypeError):
        beat = 0
    return max(points[-1].samples if points else 0, beat, attempt.resumed_at or 0)


def trail(run: RunFolder) -> list[Attempt]:
    """The attempts since a person last submitted the run: the others were made by jobs that were started again."""
    attempts = attempts_of(run)
    for i in reversed(range(len(attempts))):
        if attempts[i].submitted is not None:
            return attempts[i:]
    return attempts


def stays(run: RunFolder) -> str | None:
    """Why the run is not to be started again without a person; None if it may.

    Asked by a job that starts (again), of the attempts before it, which have all ended: those that left no word were
    killed.
    """
    attempts = [a for a in trail(run) if a.started is not None]
    if not attempts:
        return None
    if any((a.path / "cancelled.json").exists() for a in attempts):
        return CANCELLED
    verdicts = [verdict_of(a) or Verdict("killed", reached(a), source="nobody") for a in attempts]
    last = verdicts[-1]
    if last.kind in (FINISHED, CANCELLED):
        return last.kind
    if last.kind in NEEDS_HANDS:
        return f"{last.kind}: {last.message}"
    return no_progress(attempts, verdicts) or _no_node(attempts, verdicts)


def no_progress(attempts: list[Attempt], verdicts: list[Verdict]) -> str | None:
    """Set where the last attempts failed by themselves and did not get further: see OWN, SAME_CHECKPOINT."""
    failed = 0
    while failed < len(verdicts) and verdicts[-1 - failed].kind in OWN:
        failed += 1
    last = verdicts[-1]
    if failed >= 2 and verdicts[-2].samples == last.samples:
        return f"{last.kind} twice after {last.samples:,} samples: {last.message}".rstrip(": ")
    begun = {a.resumed_at for a in attempts[-SAME_CHECKPOINT:]}
    if failed >= SAME_CHECKPOINT and len(begun) == 1:
        return (
            f"{failed} failures in a row from sample {begun.pop() or 0:,}, the last: {last.kind} {last.message}".strip()
        )
    return None


def _no_node(attempts: list[Attempt], verdicts: list[Verdict]) -> str | None:
    """Set where node after node is found sick by a run of one node; with more, those that pass bear witness."""
    recent = list(zip(attempts, verdicts, strict=True))[-NODES_IN_A_ROW:]
    blamed = [
        v.kind == "node failed" and v.source == "worker" and a.resumed_at is None and len(a.started["nodes"]) == 1
        for a, v in recent
        if a.started and "nodes" in a.started
    ]
    if len(blamed) < NODES_IN_A_ROW or not all(blamed):
        return None
    return f"{NODES_IN_A_ROW} nodes in a row failed the preflight, so they are hardly to blame: {verdicts[-1].message}"
