"""How a job gets its run's next time slot: what the batch script does around the worker, outside any container.

*requeue*: the worker leaves with :data:`AGAIN`, or is killed, and its batch script hands the job back to Slurm.
*chain*: jobs queued ahead, each after the end of the one before, for sites where requeue is off or where preemption
cancels. *submit*: nobody but the user, with ``longclip submit``.

Whether a run may go on is decided by the worker, who can read its record (:func:`longclip.run.verdicts.stays`). It
tells the script by a file, because srun's exit code is the highest of all ranks': one that was killed hides AGAIN.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import time
from pathlib import Path

from longclip.run.attempts import attempts_of
from longclip.run.folder import RunFolder, write_text
from longclip.run.verdicts import REQUEUED

AGAIN = 85
"""The exit code of a worker that has saved and wants to go on"""
SIGNAL_LEAD = 120
"""seconds before the time limit at which Slurm sends USR2, until a save has been measured"""
SLACK = 60
"""USR2 may come this many seconds early (sbatch(1), --signal), so a save must not be late by as much"""
EXCLUDE = ".exclude"
"""Below ``attempts/``: nodes that Slurm shall not give to this run's next attempt"""


def mark(run: RunFolder, job: str) -> Path:
    """The file that says "start this job again if it fails"; it is there while a worker of the job is at work."""
    return run.attempts / f".again-{job}"


def may_again(run: RunFolder, job: str, excluded: list[str]) -> None:
    """Lets the batch script start ``job`` again, elsewhere than on ``excluded``."""
    write_text(mark(run, job), "")
    if excluded or (run.attempts / EXCLUDE).exists():
        write_text(run.attempts / EXCLUDE, ",".join(excluded))


def not_again(run: RunFolder, job: str) -> None:
    """The batch script lets ``job`` end."""
    with contextlib.suppress(OSError):
        mark(run, job).unlink()


def note_who_requeued(run: RunFolder, job: str) -> None:
    """Called by a worker that starts: says of the job's last life, if Slurm ended it by itself, that it did.

    Where the node of the batch script dies, nobody is left to write a word; but then the script has not asked for the
    requeue either.
    """
    asked = run.attempts / f".requeued-{job}"
    if os.environ.get("SLURM_RESTART_COUNT", "0") == "0":
        return
    last = next((a for a in reversed(attempts_of(run)) if a.started is not None), None)
    if asked.exists():
        asked.unlink()
    elif last is not None and last.job == job:
        write_text(last.path / REQUEUED, "")


def before() -> list[str]:
    """Lines of the batch script before the worker.

    The trap: Slurm sends TERM to a script whose job is requeued, and it must live for the line after that. A trap and
    not an ignored signal, which the worker would inherit where srun is not between them.
    """
    return ["trap : TERM", "here=$PWD", 'again="attempts/.again-$SLURM_JOB_ID"', 'rm -f "$again"']


def settled() -> list[str]:
    """Lines after the site's own, which may say ``set -e`` or ``cd``: the script must outlive its worker, in place."""
    return ["set +e", 'cd "$here"']


def after(exclude: str | None) -> list[str]:
    """Lines of the batch script after the worker; they run in the run's folder (``--chdir``).

    Only a RUNNING job is requeued: one that was cancelled, or that Slurm itself requeues after preemption, is not. The
    nodes to avoid can be set once it is pending; ``exclude`` are those that the site avoids anyway. A controller that
    is down for a moment is asked again. TERM, which a requeue sends to all processes of the script, must not end the
    scontrol that says which nodes; with the worker gone nothing else inherits that it is ignored.
    """
    nodes = f'{shlex.quote(exclude)}"${{nodes:+,$nodes}}"' if exclude else '"$nodes"'
    return [
        "code=$?",
        'if [ "$code" -ne 0 ] && [ -e "$again" ]; then',
        "  trap '' TERM",
        "  for pause in 0 5 10 20 40 60; do",
        '    sleep "$pause"',
        '    state=$(scontrol show job -o "$SLURM_JOB_ID") || continue',
        '    case $state in *" JobState=RUNNING "*) ;; *) break ;; esac',
        '    : >"attempts/.requeued-$SLURM_JOB_ID"',
        '    scontrol requeue "$SLURM_JOB_ID" || continue',
        f"    if [ -e attempts/{EXCLUDE} ]; then",
        f"      nodes=$(cat attempts/{EXCLUDE})",
        f'      scontrol update JobId="$SLURM_JOB_ID" ExcNodeList={nodes}',
        "    fi",
        "    break",
        "  done",
        "fi",
        'exit "$code"',
    ]


def lead(limit_minutes: int, save_seconds: float | None) -> int:
    """Seconds before the time limit at which to ask a worker to save.

    Three times what the run's saves have taken so far, for a step and the ranks' agreement come before; no more than
    a quarter of the time limit, or a short job would do nothing but save.
    """
    wanted = SIGNAL_LEAD if save_seconds is None else SLACK + max(30, 3 * save_seconds)
    return int(max(1, min(wanted, limit_minutes * 60 / 4)))


class TimeLimit:
    """The clock of one job. Slurm's signal comes as long before the end as submit asked for: the saves may have become
    slower since then, and a job that is requeued keeps the signal of its first life."""

    def __init__(self, minutes: int, begun: float, longest_save: float | None) -> None:
        """``begun``: when the worker was (seconds since 1970); ``longest_save``: of the run so far, in seconds."""
        self.minutes, self._save = minutes, longest_save
        self._end = float(os.environ.get("SLURM_JOB_END_TIME", begun + minutes * 60))  # set since Slurm 23.02

    def saved(self, seconds: float) -> None:
        self._save = max(seconds, self._save or 0.0)

    @property
    def lead(self) -> int:
        return lead(self.minutes, self._save)

    @property
    def left(self) -> float:
        """seconds"""
        return self._end - time.time()

    def is_near(self) -> bool:
        """Whether it is time to save and leave."""
        return in_slurm() and self.left < self.lead


def in_slurm() -> bool:
    """Whether this process runs in a job that submit queued."""
    return os.environ.get("SUBMITIT_EXECUTOR") == "slurm"
