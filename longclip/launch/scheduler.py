"""What the scheduler says of jobs, in two calls for any number of them."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

TIMEOUT = 20
"""seconds that squeue or sacct may take before it counts as down"""


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

    @property
    def alive(self) -> bool:
        # What is over is a short list; what Slurm calls the rest grows with its versions.
        return self.state not in _OVER and self.state not in ("GONE", "UNKNOWN")


@dataclass(frozen=True)
class Words:
    """Answers for a set of jobs, and whether the questions could be put at all."""

    jobs: Mapping[str, Word] = field(default_factory=dict)
    sources: str = ""
    """``squeue, sacct`` or what was down"""
    complete: bool = True
    """False where squeue did not answer: then an absent job may well be running"""


def ask(slurm_jobs: Iterable[str], local_jobs: Iterable[tuple[str, str]]) -> Words:
    """Asks squeue and sacct once each; ``local_jobs`` are ``(host, pid)``, asked of this machine's process table."""
    words = {f"{host}:{pid}": _local(host, pid) for host, pid in local_jobs}
    jobs = sorted(set(slurm_jobs))
    if not jobs:
        return Words(words, "process table" if words else "")
    queue = _run(["squeue", "--noheader", "--format=%A|%T|%r"])
    if queue is not None:
        for line in queue.splitlines():
            job, state, reason = [*line.split("|"), "", ""][:3]
            if job in jobs:
                words[job] = Word(state, reason if state == "PENDING" else "")
    rest = [j for j in jobs if j not in words]
    history = None
    if rest:
        # sacct's default start is midnight; -X is the job, not its steps.
        options = ["-X", "--noheader", "--parsable2", "--starttime=now-365days", "--format=JobIDRaw,State"]
        history = _run(["sacct", *options, "--jobs", ",".join(rest)])
        for line in (history or "").splitlines():
            job, _, state = line.partition("|")
            word, _, detail = state.partition(" ")  # "CANCELLED by 1000" is a state
            if job in rest and (job not in words or Word(word).alive is False):
                words[job] = Word(word, detail)
    if queue is not None:
        for job in jobs:
            words.setdefault(job, Word("GONE"))
    said = ["squeue" if queue is not None else "squeue down"]
    if rest:
        said.append("sacct" if history is not None else "sacct down: from run records")
    return Words(words, ", ".join(said), queue is not None)


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


def _run(command: list[str]) -> str | None:
    """Output of a Slurm client, or None where it is missing, fails or does not answer in time."""
    if shutil.which(command[0]) is None:
        return None
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, env=dict(os.environ))
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None
