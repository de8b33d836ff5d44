"""Stopping runs for good. The mark comes first: whatever the job still does, the run counts as cancelled.

A full disk takes no mark, and stops no cancel: nobody shall be unable to stop the jobs that filled it.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Sequence

from longclip.errors import NoSpace, SiteError, told_as_no_space
from longclip.launch import clients
from longclip.launch.chain import jobs_beside
from longclip.launch.status import statuses
from longclip.run.attempts import attempts_of
from longclip.run.folder import RunFolder, write_json


def cancel_runs(runs: Sequence[RunFolder]) -> list[tuple[str, str]]:
    """Cancels what is queued or running; ``(run, what was done)`` for each.

    With all runs of a sweep go its canaries, the job that would collect it, and those that score its checkpoints.

    Raises:
        SiteError: scancel failed; its own words. NoSpace: all are told to stop, but not marked.
    """
    known = statuses(runs)[0]
    if unsure := [s for s in known if s.state == "unknown"]:
        raise SiteError(f"{unsure[0].run.name}: {unsure[0].note}; nothing was cancelled")
    alive = [s for s in known if s.jobs]
    done = []
    slurm: list[str] = []
    unmarked: NoSpace | None = None
    for sweep in sorted({run.path.parent.resolve() for run in runs}):
        if {marker.parent for marker in sweep.glob("*/identity.json")} <= {run.path.resolve() for run in runs}:
            # Before the runs: their end would start it.
            beside = jobs_beside(sweep, "collect", "canary", "evaluate")
            slurm += beside
            done += [(sweep.name, f"scancel {job} (collect, canary or evaluate)") for job in beside]
    for status in alive:
        run, last = status.run, attempts_of(status.run)[-1]
        try:
            with told_as_no_space(last.path, "longclip prune makes room; the next submit would continue these runs"):
                user = os.environ.get("USER", str(os.getuid()))
                write_json(last.path / "cancelled.json", {"time": time.time(), "user": user})
        except NoSpace as error:
            unmarked = error
        for job in status.jobs:
            host, _, pid = job.rpartition(":")
            if host:
                with contextlib.suppress(ProcessLookupError):  # it ended by itself in this moment
                    os.kill(int(pid), signal.SIGTERM)  # "running" was said by this machine's process table
                done.append((run.name, f"told process {pid} to save and stop"))
            else:
                slurm.append(job)
                done.append((run.name, f"scancel {job}"))
    if slurm:
        result = clients.run("scancel", *slurm)
        if result.returncode != 0:
            raise SiteError(f"scancel: {result.stderr.strip()}")
    if unmarked is not None:
        told = "; ".join(f"{name}: {what}" for name, what in done)
        raise NoSpace(f"{told}; but not recorded: {unmarked.message}", unmarked.hint)
    return done
