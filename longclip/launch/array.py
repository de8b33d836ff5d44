"""Work that is not training, on Slurm: steps that follow each other, each an array of equal tasks.

Every step waits until the one before has succeeded (afterok); where one fails, Slurm takes the rest out of the queue
(kill-on-invalid-dep), and the same command queues what is still to be done.

    <folder>/jobs.json      ids of the jobs
    <folder>/code/<hash>/   the package as it was when they were queued
    <folder>/logs/
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import submitit

from longclip.errors import SiteError
from longclip.launch.job import as_written, need_slurm, setup_lines
from longclip.launch.scheduler import ask
from longclip.launch.site import Site
from longclip.launch.snapshot import freeze
from longclip.run.folder import read_json, write_json

MEM_GB = 4.0
"""of a task, where the site profile names no other"""


@dataclass(frozen=True)
class Step:
    name: str
    function: Callable[..., None]
    """at the top of a module, for it is called in another process"""
    tasks: Sequence[tuple[Any, ...]]
    """the arguments of each task"""


def alive(folder: Path) -> list[str]:
    """Ids of the jobs that still wait or run. Raises SiteError where the queue cannot be asked."""
    try:
        jobs = [str(job) for job in read_json(folder / "jobs.json")["jobs"]]
    except (OSError, ValueError, KeyError):
        return []
    words = ask(jobs, [])
    if not words.complete:
        raise SiteError("squeue does not answer, so nothing is queued", "the same command again")
    return [job for job in jobs if words.jobs[job].alive]


def queue(name: str, folder: Path, steps: Sequence[Step], site: Site, minutes: int) -> list[str]:
    """Queues the steps; ids of the jobs, one a step. ``minutes`` is the time limit of each.

    Raises:
        SiteError: there is no Slurm here, or it does not take a job; what was queued before is taken back.
    """
    need_slurm("use a login node, or leave out --on")
    code = freeze(folder)
    jobs: list[str] = []
    queued: list[submitit.Job[Any]] = []
    try:
        for step in steps:
            further = {"chdir": str(folder.resolve()), "kill-on-invalid-dep": "yes", **site.sbatch}
            asked = {
                "job_name": f"{name}/{step.name}",
                "nodes": 1,
                "ntasks_per_node": 1,
                "cpus_per_task": 1,
                "mem": f"{int((site.mem_gb or MEM_GB) * 1024)}M",
                "time": minutes,
                "partition": site.partition,
                "account": site.account,
                "qos": site.qos,
                "array_parallelism": len(step.tasks),
                "dependency": f"afterok:{jobs[-1]}" if jobs else None,
                "stderr_to_stdout": True,
                "srun_args": site.srun or None,
                "setup": setup_lines(site, 1, code.folder),
                "additional_parameters": further,
            }
            made = start(folder / "logs" / step.name, site, asked, step.function, step.tasks)
            queued += made
            jobs.append(str(made[0].job_id).partition("_")[0])
    except SiteError:
        for job in queued:
            job.cancel()
        raise
    write_json(folder / "jobs.json", {"jobs": jobs})
    return jobs


def start(
    logs: Path,
    site: Site,
    asked: Mapping[str, Any],
    function: Callable[..., Any],
    tasks: Sequence[tuple[Any, ...]],
) -> list[submitit.Job[Any]]:
    """Queues one array, a call of ``function`` a task, by ``asked``: submitit's parameters, None where nothing is.

    Raises SiteError where Slurm does not take it.
    """
    executor = submitit.SlurmExecutor(folder=logs.resolve(), python=site.python)
    # submitit takes None for what is not asked for, but its wckey has a default of its own
    executor.update_parameters(**{k: v for k, v in asked.items() if v is not None}, wckey=None)
    failures = (submitit.core.utils.FailedJobError, submitit.core.utils.FailedSubmissionError, OSError)
    try:
        with as_written(executor._make_submission_file_text("", "")):
            made: list[submitit.Job[Any]] = executor.map_array(function, *zip(*tasks, strict=True))
            return made
    except failures as error:
        raise SiteError(f"Slurm does not take the job: {(str(error).strip().splitlines() or [''])[-1]}") from None
