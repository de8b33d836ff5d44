"""What the scheduler says of jobs, in two calls for any number of them."""

from __future__ import annotations

import os
import shutil
import socket
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from longclip.errors import SiteError
from longclip.launch import clients

_OVER = (
    "COMPLETED",
    "FAILED",
    "TIMEOUT",
    "CANCELLED",
    "NODE_FAIL",
    "OUT_OF_MEMORY",
    "PREEMPTED",
    "BOOT_FAIL",
    "DEADLINE",
    "REVOKED",
)


@dataclass(frozen=True)
class Word:
    """The scheduler's word on one job."""

    state: str
    """Slurm's: PENDING, RUNNING, COMPLETED, FAILED, TIMEOUT, CANCELLED, ...; GONE where nobody knows the job"""
    detail: str = ""
    """why it waits, or who cancelled it"""
    by_owner: bool = False
    """cancelled by the user whose job it is, and not by an administrator or by Slurm"""

    @property
    def alive(self) -> bool:
        # What is over is a short list; what Slurm calls the rest grows with its versions.
        return self.state not in _OVER and self.state not in ("GONE", "UNKNOWN")


@dataclass(frozen=True)
class Words:
    """Answers for a set of jobs, and whether the questions could be put at all."""

    jobs: Mapping[str, Word] = field(default_factory=dict)
    folders: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """ids of the jobs in the queue by working folder, which is their run's: so a job is found that nobody recorded"""
    sources: str = ""
    """``squeue, sacct`` or what was down"""
    complete: bool = True
    """False where squeue did not answer: then an absent job may well be running"""


def ask(slurm_jobs: Iterable[str], local_jobs: Iterable[tuple[str, str]], users: Iterable[int] = ()) -> Words:
    """Asks squeue and sacct once each, however many jobs.

    Args:
        slurm_jobs: ids, or ``?`` for a job whose id nobody could record: then the queue is looked at for its folder.
        local_jobs: ``(host, pid)``, asked of this machine's process table.
        users: ids of the users whose queue is looked at besides one's own.
    """
    words = {f"{host}:{pid}": _local(host, pid) for host, pid in local_jobs}
    jobs = sorted(set(slurm_jobs))
    if not jobs:
        return Words(words, sources="process table" if words else "")
    queue = _ask("squeue", "--noheader", f"--user={_users(users)}", "--format=%A|%T|%r|%Z")
    folders: dict[str, list[str]] = {}
    for line in (queue or "").splitlines():
        job, state, reason, folder = [*line.split("|", 3), "", "", ""][:4]
        words[job] = Word(state, reason if state == "PENDING" else "")
        if words[job].alive:
            folders.setdefault(folder, []).append(job)
    rest = [j for j in jobs if j not in words and j.isdecimal()]  # one that is no id, and sacct answers nothing at all
    history = None
    if rest:
        # sacct's default start is midnight; -X is the job, not its steps; of a requeued job the last life is shown.
        options = ["-X", "--noheader", "--parsable2", "--starttime=now-365days", "--format=JobIDRaw,UID,State"]
        history = _ask("sacct", *options, "--jobs", ",".join(rest))
        for line in (history or "").splitlines():
            job, owner, state = [*line.split("|"), "", ""][:3]
            word, _, detail = state.partition(" ")  # "CANCELLED by 1000" is a state
            if job in rest and (job not in words or Word(word).alive is False):
                words[job] = Word(word, detail, detail == f"by {owner}")
    if queue is not None:
        for job in jobs:
            words.setdefault(job, Word("GONE"))
    said = ["squeue" if queue is not None else "squeue down: from run records"]
    if rest:
        said.append("sacct" if history is not None else "sacct down: from run records")
    return Words(words, folders, ", ".join(said), queue is not None)


def _users(others: Iterable[int]) -> str:
    return ",".join(str(u) for u in sorted({os.getuid(), *others}))


def array_tasks(users: Iterable[int] = ()) -> dict[str, set[int]] | None:
    """Of each array in the queue the tasks that wait or run; None where squeue does not answer.

    A job that is no array counts as an array's first task: Submitit makes one of a single call.
    """
    queue = _ask("squeue", "--noheader", "--array", f"--user={_users(users)}", "--format=%F|%K")
    if queue is None:
        return None
    found: dict[str, set[int]] = {}
    for line in queue.splitlines():
        job, _, task = line.strip().partition("|")
        found.setdefault(job, set()).add(int(task) if task.isdecimal() else 0)
    return found


def jobs_of_mine() -> int | None:
    """How many jobs this user has in the queue; None where squeue does not answer."""
    queue = _ask("squeue", "--noheader", f"--user={os.getuid()}", "--format=%A")
    return None if queue is None else len(queue.split())


def have_slurm() -> bool:
    return shutil.which("sbatch") is not None and shutil.which("srun") is not None


def _local(host: str, pid: str) -> Word:
    if host != socket.gethostname():
        return Word("UNKNOWN", f"process {pid} on {host}, which cannot be asked from here")
    try:
        command = Path(f"/proc/{pid}/cmdline").read_bytes()
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return Word("GONE")
    return Word("RUNNING") if (b"submitit" in command or b"longclip" in command) and state != "Z" else Word("GONE")


def _ask(*command: str) -> str | None:
    try:
        return clients.ask(*command)
    except SiteError:
        return None
