"""What ``longclip evaluate`` has planned, done: in this process, as a job of this machine, or as Slurm arrays.

    <root>/<sweep>/evaluate/units/       what is asked of a worker, one file a state of a model (launch/evaluator.py)
                            jobs.json    arrays that were queued, with the unit of each task
                            failed/      what a worker said of a unit that it could not do
                            logs/

What a job that waits or runs has been given is not queued again.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import submitit

from longclip.errors import LongclipError, SiteError, UserError
from longclip.experiment.schema import Slurm
from longclip.launch import array, evaluator
from longclip.launch.environment import before_torch
from longclip.launch.evaluation import Unit
from longclip.launch.job import child_environment, need_slurm, resources, worker_env
from longclip.launch.scheduler import array_tasks
from longclip.launch.site import Site
from longclip.launch.snapshot import freeze
from longclip.run import evaluations
from longclip.run.folder import read_json, write_json

LONGEST_ARRAY = 1000
"""tasks; Slurm's MaxArraySize is 1001 unless the site has set it"""


def prepare(units: Sequence[Unit]) -> None:
    """Writes what the workers read. Raises SiteError where that cannot be written."""
    for unit in units:
        try:
            (unit.work / "units").mkdir(parents=True, exist_ok=True)
            write_json(unit.work / "units" / f"{unit.key}.json", unit.spec)
            (unit.work / "failed" / f"{unit.key}.json").unlink(missing_ok=True)
            if unit.spec["form"] != "checkpoint":
                folder = Path(unit.spec["out"]).parent
                folder.mkdir(parents=True, exist_ok=True)
                about = {"source": unit.spec["source"], "name": folder.name, "weights": unit.spec["about"]["weights"]}
                about |= {"form": unit.spec["form"], "model": unit.spec["model"]}
                window = {"context_length": unit.spec["model"]["context_length"]}
                write_json(folder / evaluations.MODEL, {**about, **window})
        except OSError as error:
            raise SiteError(f"{unit.work}: cannot be written: {error.strerror}", "--out DIR") from None


def here(decide: Callable[[], list[Unit]]) -> list[Unit]:
    """In this process, or on the ranks that torchrun made: scores what rank 0 decides on. All units that it did."""
    before_torch()
    from longclip.train import ranks as processes

    ranks = processes.start()
    units: list[Unit] = []
    failure: LongclipError | None = None
    told: list[dict[str, Any]] | None = None
    try:
        if ranks.rank == 0:  # one rank decides: another would already see the records that this one writes
            try:
                units = decide()
                prepare(units)
                told = [unit.spec for unit in units]
            except LongclipError as error:
                failure = error
        told = ranks.tell(told)
        if told is None:
            raise failure or UserError("rank 0 could not begin; its message says why")
        for spec in told:
            list(evaluator.score_unit(spec, ranks))
    finally:
        processes.stop()
    return units


def locally(units: Sequence[Unit], site: Site) -> None:
    """On this machine, as many ranks as a job would have, one group of units after the other.

    Raises the LongclipError that a worker met, or one that names its log.
    """
    prepare(units)
    for group, shape, ours in _alike(units):
        keys = [unit.key for unit in ours]
        code = freeze(group)
        executor = submitit.LocalExecutor(folder=(group / "evaluate" / "logs").resolve(), python=site.python)
        executor.update_parameters(
            tasks_per_node=shape.ranks,
            gpus_per_node=shape.gpus_per_node,
            timeout_min=60 * 24 * 365,
            stderr_to_stdout=True,
        )
        with child_environment({**worker_env(shape.cpus_per_task), **site.env}, code.folder):
            job = executor.submit(evaluator.run, str((group / "evaluate").resolve()), keys)
        with _ended_with_this(job):
            job.wait()
        for file in (group / "evaluate").glob(f".meeting-*-{job.job_id}-*"):
            file.unlink()  # its id is a process's, and comes again
        if job.state != "FINISHED" or any(failure(unit) for unit in ours):
            told = next(filter(None, map(failure, ours)), None)
            log = f"{job.paths.stdout}"
            raise told or LongclipError(f"a worker of {', '.join(u.name for u in ours)} failed", f"see {log}")


@contextmanager
def _ended_with_this(job: Any) -> Iterator[None]:
    """Ctrl-C, or a kill of this command, takes the job's processes along."""

    def leave(signum: int, frame: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    except KeyboardInterrupt:
        job.cancel(check=False)
        raise
    finally:
        signal.signal(signal.SIGTERM, before)


def failure(unit: Unit) -> LongclipError | None:
    """What a worker said of the unit when it failed."""
    try:
        said = read_json(unit.work / "failed" / f"{unit.key}.json")
    except (FileNotFoundError, ValueError):
        return None
    kind = {2: UserError, 3: SiteError}.get(said["code"], LongclipError)
    return kind(f"{unit.name}: {said['message']}", said["hint"])


def _alike(units: Iterable[Unit]) -> list[tuple[Path, Slurm, list[Unit]]]:
    """Units by group and by what they ask of a machine."""
    found: dict[tuple[Path, str], list[Unit]] = {}
    for unit in units:
        found.setdefault((unit.group, unit.shape.model_dump_json()), []).append(unit)
    return [(group, ours[0].shape, ours) for (group, _), ours in found.items()]


def under_way(units: Sequence[Unit]) -> dict[str, str]:
    """Key -> job of the units that an array which waits or runs was given. Raises SiteError without squeue's word."""
    jobs: dict[str, list[str]] = {}
    users: set[int] = set()
    for work in {unit.work for unit in units}:
        record = _jobs(work)
        jobs |= record["jobs"]
        users |= set(record["users"])
    if not jobs:
        return {}
    alive = array_tasks(users)
    if alive is None:
        raise SiteError("squeue does not answer, so nothing is queued", "the same command again")
    found = {}
    for job, keys in jobs.items():
        for i in sorted(alive.get(job, ())):
            if i < len(keys):
                found[keys[i]] = f"{job}_{i}" if len(keys) > 1 else job
    return found


def _jobs(work: Path) -> dict[str, Any]:
    try:
        return read_json(work / "jobs.json")
    except (OSError, ValueError):
        return {"jobs": {}, "users": []}


def queue(units: Sequence[Unit], site: Site) -> list[str]:
    """Queues an array for each group of units alike, one task a unit; ids of the arrays.

    Raises SiteError where there is no Slurm, or where it does not take an array; those before it stay queued.
    """
    need_slurm("use a login node, or --on local")
    prepare(units)
    queued = []
    for group, shape, alike in _alike(units):
        for start in range(0, len(alike), LONGEST_ARRAY):
            ours = alike[start : start + LONGEST_ARRAY]
            work = ours[0].work
            asked = {
                "job_name": f"{group.name}/evaluate",
                **resources(shape, site, freeze(group).folder),
                "array_parallelism": len(ours),
                "additional_parameters": {"chdir": str(work.resolve()), **site.sbatch},
            }
            keys = [unit.key for unit in ours]
            made = array.start(
                work / "logs", site, asked, evaluator.run, [(str(work.resolve()), [key]) for key in keys]
            )
            job = str(made[0].job_id).partition("_")[0]
            record = _jobs(work)
            known = {"jobs": {**record["jobs"], job: keys}, "users": sorted({*record["users"], os.getuid()})}
            write_json(work / "jobs.json", known)
            queued.append(job)
    return queued
