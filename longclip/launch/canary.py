"""Canaries: one short job for each memory shape of a sweep, which its runs wait for.

Runs that differ in seed or learning rate need the same memory, so one of them tells for all. The canary takes its
steps (train/canary.py) on the nodes and ranks of the real run; where it fails, Slurm takes the waiting runs out of the
queue (afterok, kill-on-invalid-dep), so that a shape that does not fit costs minutes of one job, and not a place in the
queue for every run.

    <runs>/<sweep>/canary/<hash of the shape>/     as a run's folder; canary.json once it has passed
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from longclip.experiment.durations import parse_time
from longclip.experiment.identity import flatten, uid
from longclip.launch.site import Site
from longclip.launch.snapshot import Snapshot
from longclip.launch.status import statuses
from longclip.run.attempts import attempts_of
from longclip.run.folder import RunFolder, read_json
from longclip.track.lease import Lease

if TYPE_CHECKING:
    import submitit

    from longclip.launch.plan import Plan

    Queue = Callable[[Plan, Site, str, Snapshot], submitit.Job[Any]]
    """what queues a plan's job; handed in, for submit imports this file"""

TIME = "00:30:00"
"""of a canary; a run that asks for less gives its canary that"""

_SHAPE = ("model.", "engine.", "slurm.", "data.train", "data.val", "data.text", "train.global_batch", "train.precision")
_SAME_MEMORY = ("engine.hang_minutes", "slurm.time")


def shape(plan: Plan, site: Site) -> dict[str, Any]:
    """What decides how much memory a run needs, and how much it gets; flat, by dotted key."""
    how = flatten(plan.experiment.model_dump(mode="json", include={"engine", "slurm", "evaluate"}))
    flat = {**plan.identity, **how}
    facts = {k: v for k, v in flat.items() if k.startswith(_SHAPE) and k not in _SAME_MEMORY}
    return {**facts, "evaluate.batch": how["evaluate.batch"], "site": [site.name, site.gpu_type, site.mem_gb]}


def holds(plan: Plan, site: Site, code: Snapshot, queue: Queue) -> dict[str, str] | None:
    """The canary that the plan's run waits for: its folder, from the run's, and its job; queued now if need be.

    None where the shape has passed with this code. A canary that waits or runs already is waited for; one that failed
    is tried again.
    """
    facts = shape(plan, site)
    run = RunFolder(plan.run.path.parent / "canary" / uid(facts))
    if _passed_with(run) == code.hash:
        return None
    slurm = plan.experiment.slurm
    asked = plan.experiment.model_copy(
        update={"slurm": slurm.model_copy(update={"time": min(slurm.time, TIME, key=parse_time)})}
    )
    run.create(asked, facts, {})
    with Lease(run.attempts / ".submit.lock"):
        jobs = statuses([run])[0][0].jobs if attempts_of(run) else ()
        if jobs:
            job = jobs[0]
        else:
            this = replace(plan, experiment=asked, run=run, canary=True)
            job = str(queue(this, _without_links(site), "slurm", code).job_id)
    return {"canary": os.path.relpath(run.path, plan.run.path), "job": job}


def _passed_with(run: RunFolder) -> str | None:
    """Hash of the code with which the shape has passed."""
    try:
        return str(read_json(run.path / "canary.json")["code"])
    except (OSError, ValueError, KeyError):
        return None


def _without_links(site: Site) -> Site:
    """Slurm itself may requeue a canary, after preemption or the loss of its node; nothing else begins it again."""
    return site.model_copy(update={"restart": "submit"}) if site.restart == "chain" else site
