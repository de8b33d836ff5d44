"""The worker: what a job runs on every rank. It knows the run folder and its attempt, and nothing else.

python -m longclip.launch.worker RUN_FOLDER ATTEMPT      (or through submitit, with the same two arguments)
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
import traceback
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from longclip import __version__
from longclip.errors import LongclipError, SiteError
from longclip.launch.caches import leave_home_alone
from longclip.launch.snapshot import code_hash
from longclip.run.attempts import Attempt, Superseded, attempts_of, claim
from longclip.run.folder import RunFolder, load_experiment, read_json, write_json

if TYPE_CHECKING:
    from longclip.train.ranks import Ranks

_stop = False
MEETING_TIMEOUT = 600
"""seconds that ranks wait for rank 0 to say where it listens"""


def run(folder: str, number: int) -> str:
    """One rank of attempt ``number`` of the run in ``folder``: trains, and leaves a verdict.

    Returns ``finished`` or ``interrupted``; raises whatever went wrong, after recording it.
    """
    stop_at_step_boundary()
    leave_home_alone()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ["HF_HUB_OFFLINE"] = "1"
    record = RunFolder(Path(folder))
    _set_ranks(record.attempts, number)
    try:
        return _train(record, number)
    except Superseded:
        raise
    except BaseException:
        _note_failure(record, number)
        raise


def _train(record: RunFolder, number: int) -> str:
    from longclip.train import ranks as processes

    ranks = processes.start()
    verdict = train_attempt(record, number, ranks)
    processes.stop()
    return verdict


def train_attempt(record: RunFolder, number: int, ranks: Ranks) -> str:
    """Claims attempt ``number`` (or a new one, after a requeue), trains it and leaves a verdict. On all ranks."""
    from longclip.train.loop import Diverged, Job, train

    facts = {
        "nodes": sorted(set(ranks.gather(socket.gethostname()))),
        "ranks": ranks.size,
        "device": str(ranks.device),
        "code": code_hash(),
        "version": __version__,
        "python": sys.version.split()[0],
        "pid": os.getpid(),
    }
    claimed = 0
    if ranks.rank == 0:
        try:
            claimed = claim(record, number, _job_id(), facts).number
        except LongclipError as error:
            print(error, file=sys.stderr)
    claimed = ranks.tell(claimed)
    if claimed == 0:
        raise Superseded(f"attempt {number} could not be claimed; rank 0's log says why")
    attempt = Attempt(record.attempts / f"{claimed:04d}")
    submitted = Attempt(record.attempts / f"{number:04d}")
    experiment = load_experiment(submitted.path / "experiment.yaml")
    job = Job(record, attempt, experiment, (submitted.submitted or {})["paths"])
    try:
        verdict = train(job, ranks, lambda: _stop)
    except Diverged as error:
        if ranks.rank == 0:
            attempt.end("diverged", _last_sample(attempt), error.message)
        raise
    if ranks.rank == 0:
        attempt.end(verdict, _last_sample(attempt))
    ranks.agree(True)  # nobody leaves before the verdict is written
    return verdict


def stop_at_step_boundary(with_ctrl_c: bool = False) -> None:
    """TERM and USR2 ask the loop to save and stop. Submitit's own handlers ignore TERM, and save inside."""
    for signum in (signal.SIGTERM, signal.SIGUSR2, *([signal.SIGINT] if with_ctrl_c else [])):
        signal.signal(signum, _request_stop)


def _request_stop(signum: int, frame: FrameType | None) -> None:
    """Sets a flag only; the loop saves at the next step boundary that all ranks agree on."""
    global _stop
    _stop = True


def _job_id() -> str:
    from submitit import JobEnvironment

    try:
        return str(JobEnvironment().job_id)
    except RuntimeError:
        return f"pid-{os.getpid()}"


def _set_ranks(folder: Path, number: int) -> None:
    """RANK and its kin: torchrun has set them; for submitit's jobs they are derived from its environment."""
    if "RANK" in os.environ:
        return
    from submitit import JobEnvironment

    try:
        job = JobEnvironment()
    except RuntimeError:
        return  # no launcher: a single process
    if "SUBMITIT_DEBUG_JOB_ID" in os.environ:
        return
    restart = os.environ.get("SLURM_RESTART_COUNT", "0")
    local = os.environ.get("SUBMITIT_EXECUTOR") == "local"
    place = folder / f".meeting-{number:04d}-{job.job_id}-{restart}.json"
    meet(place, job.global_rank, job.num_tasks, job.local_rank, "127.0.0.1" if local else None)


def meet(place: Path, rank: int, size: int, local_rank: int, host: str | None = None) -> None:
    """Sets RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT, the last two by way of the shared file ``place``.

    Rank 0 listens on a port that is free on its node and says so there; a port computed from the job id may be taken.

    Raises:
        SiteError: rank 0 does not say in time where it listens.
    """
    if rank == 0:
        host = host or os.environ.get("SLURMD_NODENAME") or socket.gethostname()
        with socket.socket() as probe:
            probe.bind(("", 0))
            write_json(place, {"host": host, "port": probe.getsockname()[1]})
    deadline = time.monotonic() + MEETING_TIMEOUT
    # Listing the folder makes an NFS client ask the server again; opening a name that was absent may not.
    while place.name not in os.listdir(place.parent):
        if time.monotonic() > deadline:
            raise SiteError(f"rank 0 has not said within {MEETING_TIMEOUT} s where it listens ({place})")
        time.sleep(0.2)
    meeting = read_json(place)
    os.environ.update(
        RANK=str(rank),
        WORLD_SIZE=str(size),
        LOCAL_RANK=str(local_rank),
        MASTER_ADDR=str(meeting["host"]),
        MASTER_PORT=str(meeting["port"]),
    )


def _note_failure(record: RunFolder, number: int) -> None:
    """Each rank writes its own traceback; the earliest is the culprit's. Rank 0 also ends the attempt."""
    rank = int(os.environ.get("RANK", "0"))
    mine = [a for a in attempts_of(record) if a.number >= number and a.job in (None, _job_id())]
    if not mine:
        return
    attempt = mine[-1]
    (attempt.path / f"error-{rank:04d}.txt").write_text(traceback.format_exc(), encoding="utf-8")
    if rank == 0 and attempt.ended is None:
        error = sys.exc_info()[1]
        last = traceback.format_exception_only(error)[-1].strip()
        attempt.end("crashed", _last_sample(attempt), error.message if isinstance(error, LongclipError) else last)


def _last_sample(attempt: Attempt) -> int:
    from longclip.run.journal import read_points

    points = read_points(attempt.journal)
    return points[-1].samples if points else (attempt.resumed_at or 0)


if __name__ == "__main__":
    run(sys.argv[1], int(sys.argv[2]))
