"""Queueing what was planned. All of it is checked first, and nothing is queued unless everything could be.

Submitting is idempotent: a run that is finished, running or queued is left alone, one that was interrupted continues
at its sample.
"""

from __future__ import annotations

import os
import shutil
import socket
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import submitit

from longclip.errors import SiteError
from longclip.launch import canary as canaries
from longclip.launch.job import LIMITS, QueueFull, check_slurm, start
from longclip.launch.plan import Plan, known_attempts, problems
from longclip.launch.scheduler import jobs_of_mine
from longclip.launch.site import Site
from longclip.launch.snapshot import Code, Snapshot, freeze
from longclip.launch.status import UNDER_WAY, statuses
from longclip.launch.suites import write_suites
from longclip.run import lineage
from longclip.run.attempts import Attempt, attempts_of, new_attempt
from longclip.run.folder import dump_experiment, read_json, write_json, write_text
from longclip.run.journal import longest_save
from longclip.track.lease import Lease
from longclip.track.stream import streamable


def warnings(plans: Sequence[Plan], site: Site) -> list[str]:
    """What a submit should know and is no obstacle."""
    found = []
    if (site.tracking or "").startswith("http") and streamable(site.tracking) is None:
        found.append(
            "jobs do not stream to the tracking server: its address holds a password, which run folders would keep; "
            "take it from MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
        )
    for plan in plans:
        taken = longest_save(plan.run) if plan.queues else None
        if taken is not None and site.grace_s is not None and taken > site.grace_s:
            found.append(
                f"{plan.run.name}: a save takes {taken:.0f} s, preemption leaves {site.grace_s} s: the loss is "
                f"bounded by checkpoint.every = {plan.experiment.checkpoint.every}"
            )
    return found


def submit(
    plans: Sequence[Plan], site: Site, executor: str, canary: bool = False
) -> Iterator[tuple[Plan, str, submitit.Job[Any]]]:
    """Queues the planned jobs one by one, yielding each with its id. With ``canary`` (Slurm only) each waits until
    its memory shape has been tried out.

    Raises:
        QueueFull: the site takes no more; those that were yielded are queued, the others (or all) wait.
        LongclipError: something stands in the way; nothing has been queued.
    """
    for problem in problems(plans):
        raise problem
    todo = [p for p in plans if p.queues]
    if executor == "slurm":
        check_slurm(todo, site)
    for one in todo:
        one.run.create(one.experiment, one.identity, dict(one.axes))
    # Before the first starts: where runs go one after the other, the source may be edited before the last does.
    codes = {sweep: freeze(sweep) for sweep in {one.run.path.resolve().parent for one in todo}}
    room = _room(site) if executor == "slurm" else None
    each = 1 + _links(site)
    beside = len({str(canaries.shape(p, site)) for p in todo}) if canary else 0
    for done, one in enumerate(todo):
        if room is not None and (done + 1) * each + beside > room:
            raise QueueFull(f"the site lets one user have {site.max_jobs} jobs in the queue")
        # Of two people who submit the same run at once, the second finds the first one's attempt. As long as the record
        # is that of the plan, though hours may have passed, the scheduler is not asked again for every single run.
        with Lease(one.run.attempts / ".submit.lock"):
            changed = known_attempts(one.run) != one.attempts
            if changed and statuses([one.run])[0][0].state in (*UNDER_WAY, "finished"):
                continue
            code = codes[one.run.path.resolve().parent]
            if canary:
                one = replace(one, held_by=canaries.holds(one, site, code, _queue))
            job = _queue(one, site, executor, code)
        yield one, str(job.job_id), job


def _links(site: Site) -> int:
    """Jobs that are queued behind each job; no more than leave it a place among those that a user may have."""
    links = site.links if site.restart == "chain" else 0
    return links if site.max_jobs is None else min(links, site.max_jobs - 1)


def _room(site: Site) -> int | None:
    """Jobs that this user may still queue; None where the site sets no limit, or nobody can say."""
    queued = None if site.max_jobs is None else jobs_of_mine()
    return None if queued is None or site.max_jobs is None else site.max_jobs - queued


def record_attempt(plan: Plan, site: Site, executor: str, code: Code, job: str | None = None) -> Attempt:
    """A new attempt of the plan's run, with all that its worker needs to know."""
    try:
        attempt = new_attempt(plan.run)
        write_text(attempt.path / "experiment.yaml", dump_experiment(plan.experiment))
        write_suites(attempt.path, plan.resolved.suites)
    except OSError as error:
        raise SiteError(f"{plan.run.path}: cannot be written: {error.strerror}") from None
    record = {
        "executor": executor,
        "job": job,
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "uid": os.getuid(),
        "site": site.name,
        "paths": plan.resolved.paths,
        "samples": plan.resolved.samples,
        "tracking": None if plan.canary else streamable(site.tracking),
        **code.as_record(plan.run.path),
        **({"canary": True} if plan.canary else {}),
        **({"held_by": plan.held_by} if plan.held_by else {}),
        "time": time.time(),
    }
    write_json(attempt.path / "submitted.json", record)
    return attempt


def _parent_s_job(plan: Plan) -> str | None:
    """The job by whose end the run that this one begins from has finished; None where there is nothing to wait for."""
    parent = plan.resolved.parent
    if parent is None or lineage.has_begun(plan.run) or lineage.is_finished(parent):
        return None
    records = [a.submitted for a in attempts_of(parent) if a.submitted and a.submitted.get("job")]
    # Of jobs queued ahead behind each other the last counts: those before it may end at their time limit.
    return str([records[-1]["job"], *records[-1].get("links", ())][-1]) if records else None


def _queue(plan: Plan, site: Site, kind: str, code: Snapshot) -> submitit.Job[Any]:
    attempt = record_attempt(plan, site, kind, code)
    passed = [f"afterok:{plan.held_by['job']}"] if plan.held_by else []
    if not plan.canary and (parents := _parent_s_job(plan)):
        passed.append(f"afterok:{parents}")
    try:
        job = start(plan.experiment, plan.run, attempt, site, kind, code, passed)
        record = {
            **read_json(attempt.path / "submitted.json"),
            "job": str(os.getpid()) if kind == "debug" else str(job.job_id),
        }
        write_json(attempt.path / "submitted.json", record)
        if kind == "slurm" and site.restart == "chain":
            record["links"] = []
            for _ in range(_links(site)):
                before = (record["links"] or [record["job"]])[-1]
                link = start(plan.experiment, plan.run, attempt, site, kind, code, [f"afterany:{before}", *passed])
                record["links"].append(str(link.job_id))
                write_json(attempt.path / "submitted.json", record)
    except Exception as error:
        words = str(error).strip().splitlines() or [repr(error)]
        full = any(sign in str(error) for sign in LIMITS)
        if read_json(attempt.path / "submitted.json")["job"] is None:
            if full:  # as if it had not been tried
                shutil.rmtree(attempt.path)
            else:
                attempt.end("rejected", 0, str(error).strip())
        elif full:  # the job itself is queued, with fewer links than there could be
            return job
        if full:
            raise QueueFull(f"{plan.run.name}: the queue is full: {words[-1]}") from None
        raise SiteError(f"{plan.run.name}: could not be queued: {words[-1]}") from None
    return job
