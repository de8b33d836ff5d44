"""The worker: what a job runs on every rank. It knows the run folder and its attempt, and nothing else.

python -m longclip.launch.worker RUN_FOLDER ATTEMPT      (or through submitit, with the same two arguments)
"""

from __future__ import annotations

import errno
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from longclip import __version__
from longclip.errors import LongclipError, SiteError, UserError
from longclip.evaluate.suite import Resolved
from longclip.experiment.durations import parse_time
from longclip.experiment.schema import Experiment
from longclip.launch import restart
from longclip.launch.environment import before_torch
from longclip.launch.node import Needs
from longclip.launch.preflight import NodeFault, excluded, preflight
from longclip.launch.snapshot import OtherCode, check_imported, code_hash
from longclip.launch.suites import suites_of
from longclip.run import checkpoints
from longclip.run.attempts import FINISHED, INTERRUPTED, Attempt, Superseded, claim
from longclip.run.folder import RunFolder, load_experiment, read_json, write_json
from longclip.run.journal import longest_save
from longclip.run.verdicts import stays
from longclip.track.stream import start_stream

if TYPE_CHECKING:
    from longclip.train.ranks import Ranks
    from longclip.train.watch import Who

STARTING = 30
"""seconds that a job may have run before its worker looked at the clock"""
MEETING_TIMEOUT = 600
"""seconds that ranks wait for rank 0 to say where it listens"""


class _Signals:
    """What Slurm has asked of this process: handlers set a flag, and the loop acts at the next step boundary."""

    received: int | None = None

    @classmethod
    def note(cls, signum: int, frame: FrameType | None) -> None:
        cls.received = cls.received or signum


class Leave(LongclipError):
    """The run is not to be started (again); its last verdict says why."""


_attempt: Attempt | None = None
"""the attempt that this process has claimed, with the others"""
_seen = 0
"""pairs seen, for the record of a failure"""


def run(folder: str, number: int) -> str:
    """One rank of attempt ``number`` of the run in ``folder``: trains, and leaves a verdict.

    Returns why it ended: ``finished``, ``preempted``, ...; raises whatever went wrong, after recording it. In a Slurm
    job that is to be started again the process leaves with the exit code AGAIN.
    """
    global _attempt, _seen
    _attempt, _seen = None, 0  # the debug executor runs one after the other in one process
    stop_at_step_boundary()
    before_torch()
    record = RunFolder(Path(folder))
    try:
        set_ranks(record.attempts, f"{number:04d}")
        check_imported(record.path, read_json(record.attempts / f"{number:04d}" / "submitted.json"))
        verdict = _train(record, number)
    except Leave as reason:
        restart.not_again(record, _job_id())
        print(f"not started: {reason}", flush=True)
        if restart.in_slurm() and reason.message != FINISHED:
            sys.exit(1)
        return reason.message
    except Superseded:
        restart.not_again(record, _job_id())
        raise
    except BaseException as error:
        note_failure(record, number, error)
        raise
    if verdict == FINISHED:
        restart.not_again(record, _job_id())
    elif restart.in_slurm():
        sys.exit(restart.AGAIN)
    return verdict


def _train(record: RunFolder, number: int) -> str:
    from longclip.train import ranks as processes

    ranks = processes.start()
    try:
        verdict = train_attempt(record, number, ranks)
    except (Leave, Superseded):
        processes.leave(ranks)
        raise
    processes.stop()
    return verdict


def train_attempt(record: RunFolder, number: int, ranks: Ranks) -> str:
    """Claims attempt ``number`` (or a new one, after a restart), trains it and leaves a verdict. On all ranks.

    Raises on all ranks: Leave where the last verdict is final, Superseded where another job has the attempt.
    """
    global _attempt
    from longclip.train.watch import Who

    who = ranks.gather(Who.here(ranks.rank))
    facts = {
        "nodes": sorted({w.node for w in who}),
        "who": who,
        "ranks": ranks.size,
        "device": str(ranks.device),
        "code": code_hash(),
        "version": __version__,
        "python": sys.version.split()[0],
        "pid": os.getpid(),
    }
    _attempt = attempt = _claim(record, number, facts, ranks)
    submitted = Attempt(record.attempts / f"{number:04d}")
    experiment = load_experiment(submitted.path / "experiment.yaml")
    asked = submitted.submitted or {}
    suites = suites_of(submitted.path, asked["paths"])
    uri = asked.get("tracking") if ranks.rank == 0 else None
    with _streamed(attempt, uri):
        return _train_claimed(record, attempt, experiment, asked["paths"], suites, who, ranks, "canary" in asked)


def _train_claimed(
    record: RunFolder,
    attempt: Attempt,
    experiment: Experiment,
    paths: Mapping[str, str],
    suites: Sequence[Resolved],
    who: Sequence[Who],
    ranks: Ranks,
    is_canary: bool,
) -> str:
    from longclip.train.canary import canary
    from longclip.train.loop import Job, train
    from longclip.train.watch import Watch

    limit = restart.TimeLimit(parse_time(experiment.slurm.time), time.time(), longest_save(record))
    report = preflight(attempt.path, ranks, who, needs_of(experiment, paths))
    if ranks.rank == 0:
        print(f"preflight: {report.seconds:.1f} s", *report.warnings, sep="\n  ", flush=True)
    floor = experiment.engine.hang_minutes * 60
    with Watch(attempt.path, ranks.rank, who, floor, lambda found: attempt.end("hung", _seen, found)) as watch:

        def beat(samples: int) -> None:
            global _seen
            _seen = samples
            watch.beat(samples)

        job = Job(record, attempt, experiment, paths, beat, limit.saved, suites)
        if is_canary:  # it takes minutes, and has nothing that were worth saving at a signal
            canary(job, ranks)
            verdict = FINISHED
        else:
            verdict = train(job, ranks, lambda: _Signals.received is not None or limit.is_near())
    message = ""
    if verdict == INTERRUPTED:
        verdict, message = why_interrupted(ranks, limit)
    if ranks.rank == 0:
        attempt.end(verdict, _seen, message)
    ranks.agree(True)  # nobody leaves before the verdict is written
    return verdict


@contextmanager
def _streamed(attempt: Attempt, uri: str | None) -> Iterator[None]:
    """What the attempt writes goes to the server meanwhile, from a child that no step waits for."""
    if uri is None:
        yield
        return
    stream = start_stream(attempt, uri)
    try:
        yield
    except Superseded:
        raise
    except BaseException as error:
        _record_failure(attempt, error)  # before the child looks for the last time
        raise
    finally:
        stream.stop()


def _claim(record: RunFolder, number: int, facts: dict[str, Any], ranks: Ranks) -> Attempt:
    """The job's first act: rank 0 reads the last verdict, and claims an attempt if the run may go on."""
    told: tuple[str, str] = ("", "")
    if ranks.rank == 0:
        try:
            told = _claim_alone(record, number, facts)
        except LongclipError as error:
            told = ("superseded", str(error))
    kind, what = ranks.tell(told)
    if kind == "attempt":
        return Attempt(record.attempts / what)
    raise (Leave if kind == "leave" else Superseded)(what)


def _claim_alone(record: RunFolder, number: int, facts: dict[str, Any]) -> tuple[str, str]:
    job = _job_id()
    if restart.in_slurm():
        restart.note_who_requeued(record, job)
    if why := stays(record):
        return "leave", why
    is_canary = "canary" in (Attempt(record.attempts / f"{number:04d}").submitted or {})
    if restart.in_slurm() and not is_canary:  # a canary that fails has told what it was sent for
        restart.may_again(record, job, excluded(record.path, time.time()))
    log = _log()
    if log is not None:
        facts["log"] = os.path.relpath(log, record.attempts.resolve() / "0000")
        facts["log_start"] = log.stat().st_size if log.exists() else 0
    return "attempt", claim(record, number, job, facts).path.name


def needs_of(experiment: Experiment, paths: Mapping[str, str]) -> Needs:
    """What the preflight shall find on every node."""
    from longclip.data.loader import AHEAD
    from longclip.model.clip import count_parameters
    from longclip.model.towers import pixels_of
    from longclip.train.loop import localized

    spec = localized(experiment.model, paths)
    parameters = count_parameters(spec)
    share = experiment.train.global_batch // experiment.slurm.nodes
    image = 3 * pixels_of(spec.image).size ** 2
    return Needs(
        gpus=experiment.slurm.gpus_per_node,
        memory=2**28 + 4 * parameters,
        shm=AHEAD * share * image * experiment.engine.loader_workers,
        disk=2 * 12 * parameters,
    )


def stop_at_step_boundary(with_ctrl_c: bool = False) -> None:
    """TERM and USR2 ask the loop to save and stop. Submitit's own handlers ignore TERM, and save inside."""
    for signum in (signal.SIGTERM, signal.SIGUSR2, *([signal.SIGINT] if with_ctrl_c else [])):
        signal.signal(signum, _Signals.note)


def why_interrupted(ranks: Ranks, limit: restart.TimeLimit) -> tuple[str, str]:
    """Verdict and message for a run that a signal stopped, or the clock. Collective: a signal may have reached some
    ranks only.

    USR2 comes before the time limit, and on some clusters at preemption too; the clock tells which. Outside Slurm
    nobody preempts.
    """
    signum = int(max(ranks.gather(float(_Signals.received or 0))))
    name = signal.Signals(signum).name if signum else "the clock"
    if not restart.in_slurm():
        return INTERRUPTED, f"{name}, saved"
    # The signal's lead may be that of a first life, which had not saved yet.
    lead = max(limit.lead, restart.lead(limit.minutes, None))
    if signum in (0, signal.SIGUSR2) and limit.left < lead + restart.SLACK + STARTING:
        return "timed out", f"{name} {limit.left / 60:.0f} min before the time limit, saved"
    return "preempted", f"{name}, saved"


def _job_id() -> str:
    from submitit import JobEnvironment

    try:
        return str(JobEnvironment().job_id)
    except RuntimeError:
        return f"pid-{os.getpid()}"


def _log() -> Path | None:
    """The log of rank 0, where Slurm's own words go too."""
    from submitit import JobEnvironment

    if "SUBMITIT_FOLDER" not in os.environ:
        return None
    return Path(JobEnvironment().paths.stdout)


def set_ranks(folder: Path, name: str) -> None:
    """RANK and its kin: torchrun has set them; for submitit's jobs they are derived from its environment.

    ``folder`` is shared by all ranks of the job, which meet there; ``name`` says for what.
    """
    if "RANK" in os.environ:
        return
    from submitit import JobEnvironment

    try:
        job = JobEnvironment()
    except RuntimeError:
        return  # no launcher: a single process
    if "SUBMITIT_DEBUG_JOB_ID" in os.environ:
        return
    life = os.environ.get("SLURM_RESTART_COUNT", "0")
    local = os.environ.get("SUBMITIT_EXECUTOR") == "local"
    place = folder / f".meeting-{name}-{job.job_id}-{life}.json"
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


def note_failure(record: RunFolder, number: int, error: BaseException) -> None:
    """Every rank records its own failure; and whether this job may be started again is decided with it."""
    attempt = _attempt or _unmet(record, number, error)
    if attempt is None:
        return
    _record_failure(attempt, error)
    if kind_of(error)[0] == "node failed":
        restart.may_again(record, _job_id(), excluded(record.path, time.time()))
    if stays(record):
        restart.not_again(record, _job_id())


def _unmet(record: RunFolder, number: int, error: BaseException) -> Attempt | None:
    """The attempt of a job whose ranks did not even meet.

    Where the job is one of Slurm's, rank 0 claims it by itself (or another, for the one that the job was submitted as
    may be an earlier life's), so that the failure counts, and is tried again as any other: a network that is sick for
    a minute, a port that was taken. What the user must mend is not tried again.
    """
    attempt = Attempt(record.attempts / f"{number:04d}")
    claims = os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0"
    if attempt.started is None and not (
        claims and restart.in_slurm() and not isinstance(error, (OtherCode, UserError))
    ):
        return attempt
    if not claims:
        return None
    facts = {"nodes": [os.environ.get("SLURMD_NODENAME") or socket.gethostname()], "code": code_hash()}
    try:
        kind, what = _claim_alone(record, number, facts)
    except LongclipError:  # another job has the run
        return None
    return Attempt(record.attempts / what) if kind == "attempt" else None


def _record_failure(attempt: Attempt, error: BaseException) -> None:
    kind, message = kind_of(error)
    record = RunFolder(attempt.path.parents[1])
    if good := _last_good(record) if kind == "diverged" else "":
        message += f"; last good checkpoint: {good}"
    attempt.fail(int(os.environ.get("RANK", "0")), kind, _seen, message, "".join(traceback.format_exception(error)))


def kind_of(error: BaseException) -> tuple[str, str]:
    """Verdict and message for what was raised."""
    from longclip.train.loop import Diverged

    message = error.message if isinstance(error, LongclipError) else traceback.format_exception_only(error)[-1].strip()
    names = {cls.__name__ for cls in type(error).__mro__}
    if isinstance(error, NodeFault):
        return "node failed", message
    if isinstance(error, Diverged):
        return "diverged", message
    if isinstance(error, OtherCode):
        return "rejected", message  # it never began: submit may try again
    if isinstance(error, UserError):
        return "bad input", message
    if "NoSpace" in names or (isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)):
        return "no space", message
    if names & {"MemoryError", "OutOfMemoryError"}:  # the second is torch's
        return "out of memory", message
    return "crashed", message


def _last_good(record: RunFolder) -> str:
    newest = checkpoints.pointer(record.checkpoints)
    try:
        return f"{newest} ({checkpoints.state_of(record.checkpoints / newest)['samples']:,} samples)" if newest else ""
    except (OSError, LongclipError, KeyError):
        return ""


if __name__ == "__main__":
    run(sys.argv[1], int(sys.argv[2]))
