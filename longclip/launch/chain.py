"""The job behind a sweep's jobs, so that one submit does it all: train, evaluate, collect.

Training jobs evaluate as they go, and score the test set at their end, so ``longclip collect`` is what is left to
chain. It waits until all jobs of the sweep have ended *however* they end (afterany): after a run that failed for good
it runs all the same and shows that run as unfinished, where a job that waited for success would stay in the queue for
ever (DependencyNeverSatisfied).

    <runs>/<sweep>/collect/        collect.sh, submitted.json, <job>.out, and the tables
"""

from __future__ import annotations

import os
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from longclip.errors import SiteError
from longclip.launch import clients
from longclip.launch.job import LIMITS, as_written, check_slurm, setup_lines, test_only
from longclip.launch.plan import Plan
from longclip.launch.scheduler import Word, ask
from longclip.launch.site import Site
from longclip.launch.snapshot import code_hash, freeze, place
from longclip.launch.status import statuses
from longclip.run.folder import RunFolder, read_json, write_json, write_text
from longclip.track.lease import Lease

TIME, MEMORY = "00:30:00", "2G"
"""what the job asks for, on one CPU: it reads journals and draws curves"""


def check(plans: Sequence[Plan], site: Site) -> None:
    """The collect jobs of these plans are ones that Slurm would take. Raises SiteError."""
    check_slurm([], site)
    for sweep, partition in {p.run.path.parent: p.experiment.slurm.partition for p in plans}.items():
        test_only(script(sweep, site, partition, place(sweep, code_hash())))


def collect_after(sweep: Path, site: Site) -> str | None:
    """Lets ``longclip collect`` follow all jobs of the sweep in the folder ``sweep``; the id of the job that will.

    A collect job that still waits from an earlier submit stays the only one, and waits for the new jobs too. None
    where no job of the sweep is queued or running: there is nothing to wait for.

    Raises:
        SiteError: the queue cannot be asked, or Slurm does not take the job; the sweep's own jobs are as they were.
    """
    runs = [RunFolder(marker.parent) for marker in sorted(sweep.glob("*/identity.json"))]
    known, words = statuses(runs)
    again = "the same submit again: it queues nothing twice"
    if not words.complete:
        raise SiteError("squeue does not answer, so the collect job is not queued", again)
    jobs = [job for status in known for job in status.jobs if ":" not in job]
    if not jobs:
        return None
    dependency = f"afterany:{':'.join(jobs)}"
    folder = sweep.resolve() / "collect"
    try:
        folder.mkdir(exist_ok=True)
    except OSError as error:
        raise SiteError(f"{folder}: cannot be written: {error.strerror}") from None
    with Lease(folder / ".submit.lock"):
        for job, word in jobs_beside(sweep, "collect").items():
            # Where it has begun in this moment scontrol refuses, and the new runs need another.
            update = ("scontrol", "update", f"JobId={job}", f"Dependency={dependency}")
            if word.state == "PENDING" and clients.run(*update).returncode == 0:
                return job
        file = folder / "collect.sh"
        text = script(sweep, site, runs[0].experiment().slurm.partition, freeze(sweep).folder)
        write_text(file, text)
        with as_written(text):
            done = clients.run("sbatch", "--parsable", f"--dependency={dependency}", str(file))
        if done.returncode != 0:
            said = done.stderr.strip()
            full = any(sign in said for sign in LIMITS)
            raise SiteError(
                f"the collect job could not be queued: {said.splitlines()[-1] if said else 'sbatch failed'}",
                f"longclip collect {sweep.name}, when the runs have ended" if full else again,
            )
        job = done.stdout.strip().splitlines()[-1].partition(";")[0]  # "id;cluster" where there are several clusters
        write_json(folder / "submitted.json", {"job": job, "after": jobs, "uid": os.getuid(), "time": time.time()})
    return job


def script(sweep: Path, site: Site, partition: str | None, code: Path) -> str:
    """The collect job's batch script; ``code`` is the snapshot that it imports."""
    folder = sweep.resolve() / "collect"
    options: dict[str, Any] = {
        "job-name": f"{sweep.name}/collect",
        "nodes": 1,
        "ntasks": 1,
        "cpus-per-task": 1,
        "mem": MEMORY,
        "time": TIME,
        "partition": partition or site.partition,
        "account": site.account,
        "qos": site.qos,
        "mail-user": site.mail,
        "mail-type": "FAIL,END" if site.mail else None,
        # cancel finds a job by its folder whose id nobody could record
        "chdir": folder,
        "output": folder / "%j.out",
        "open-mode": "append",
        **{key.replace("_", "-"): value for key, value in site.sbatch.items()},
    }
    # To MLflow it sends nothing: a compute node may not reach the server. The front's Python, for that is where
    # pandas and matplotlib are.
    command = [sys.executable, "-m", "longclip.cli", "collect", sweep.name, "--runs", str(folder.parents[1])]
    command += ["--out", str(folder), "--no-sync"]
    return "\n".join(
        [
            "#!/bin/bash",
            *(
                f"#SBATCH --{key}" if value is True else f"#SBATCH --{key}={shlex.quote(str(value))}"
                for key, value in options.items()
                if value is not None
            ),
            *setup_lines(site, 1, code),
            "unset LONGCLIP_SITE  # it may name a file beside which the submit was typed",
            f"exec {shlex.join(command)}",
            "",
        ]
    )


def jobs_beside(sweep: Path, *names: str) -> dict[str, Word]:
    """Jobs that wait or run for the sweep's own folders ``names``, and not for one of its runs.

    By what submit recorded and by the folder that they work in, as for runs.
    """
    places = [place for name in names if (place := sweep.resolve() / name).is_dir()]
    if not places:
        return {}
    records = [_record(place / "submitted.json") for place in places]
    words = ask([str(r.get("job", "?")) for r in records], [], [int(r["uid"]) for r in records if "uid" in r])
    found = [str(r["job"]) for r in records if "job" in r]
    for folder, jobs in words.folders.items():
        if any(Path(folder).is_relative_to(place) for place in places):
            found += jobs
    return {j: words.jobs[j] for j in dict.fromkeys(found) if words.jobs.get(j, Word("GONE")).alive}


def _record(file: Path) -> dict[str, Any]:
    try:
        return read_json(file)
    except (OSError, ValueError):  # none yet, or torn
        return {}
