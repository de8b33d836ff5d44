"""What submit and retry do once the plan stands: queue it, stay with it where that was asked, and say how it went."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import suppress

from longclip import screen
from longclip.launch.chain import check, collect_after
from longclip.launch.job import QueueFull
from longclip.launch.plan import Plan, known_attempts, problems
from longclip.launch.site import Site
from longclip.launch.status import statuses
from longclip.launch.submit import submit, warnings
from longclip.launch.tracking import sync_runs
from longclip.run.folder import RunFolder


def carry_out(
    plans: Sequence[Plan],
    site: Site,
    on: str,
    wait: bool = False,
    parallel: bool = False,
    collect: bool = False,
    canary: bool = False,
) -> int:
    """Queues what is to be queued; the exit code: 0, or 1 where a run that was waited for did not finish.

    On this machine (``on`` local or debug) runs go one after the other unless ``parallel``. ``collect`` adds a job that
    collects behind all others, ``canary`` one before them for each memory shape.
    """
    todo = [p for p in plans if p.queues]
    if not todo:
        print("nothing to queue")
        if collect:
            _collect(plans, site)
        return 0
    if collect and not problems(todo):
        with suppress(QueueFull):  # said when the runs have been tried
            check(todo, site)
    for warning in warnings(todo, site):
        print(f"! {warning}")
    if on == "debug" or (on == "local" and not parallel):
        if not _one_by_one(plans, site, on):
            return 1
    else:
        _queue(todo, site, on, canary, wait)
        if collect:
            _collect(plans, site)
        sweep = todo[0].run.sweep
        print(f"watch: longclip status {sweep} -w    undo: longclip cancel {sweep}")
        if not wait:
            return 0
        screen.watch([p.run for p in plans])
    print_sync([p.run for p in plans], site)
    return _outcome([p.run for p in todo])


def print_sync(runs: Sequence[RunFolder], site: Site) -> None:
    """Sends the runs' journals to MLflow, and says where to look at them."""
    report = sync_runs(runs, site.tracking_uri)
    look = f"mlflow ui --backend-store-uri {report.uri}" if report.uri.startswith("sqlite") else report.uri
    print(f"MLflow: {report}    look: {look}")


def _one_by_one(plans: Sequence[Plan], site: Site, on: str) -> bool:
    """Each run to its end before the next begins; False where somebody stopped that."""
    rest = [p.run.name for p in plans if p.queues]
    for plan, _, job in submit(plans, site, on):
        rest.remove(plan.run.name)
        if on == "debug":
            job.results()
        elif not screen.watch([p.run for p in plans], until=job.done):
            print(f"\nstopped watching; {plan.run.name} goes on (longclip cancel {plan.run.name} stops it)")
            break
        if statuses([plan.run])[0][0].state == "cancelled":
            print(f"{plan.run.name} was cancelled")
            break
    else:
        return True
    if rest:
        print(f"not started: {', '.join(rest)}; the same submit continues with them")
    return False


def _queue(todo: Sequence[Plan], site: Site, on: str, canary: bool, wait: bool) -> None:
    """Queues all; where the site has no room for all, with ``wait`` the rest when it has."""
    ids: list[str] = []
    full: QueueFull | None = None
    try:
        for _, job_id, _ in submit(todo, site, on, canary):
            ids.append(job_id)
    except QueueFull as error:
        full = error
    if ids:
        sweeps = ", ".join(str(site.runs / s) for s in sorted({p.run.sweep for p in todo}))
        print(f"queued {ids[0] if len(ids) == 1 else f'{ids[0]} .. {ids[-1]} ({len(ids)} jobs)'} -> {sweeps}")
    if full is not None:
        print(f"{len(todo) - len(ids)} runs wait: {full.message}; the same submit queues them when jobs have ended")
    while wait and full is not None:
        # What has had its turn is not begun again here, however it ended.
        rest = [p for p in todo if known_attempts(p.run) == p.attempts]
        if not rest:
            return
        time.sleep(30)
        with suppress(QueueFull):
            for plan, job_id, _ in submit(rest, site, on, canary):
                print(f"queued {plan.run.name}: {job_id}", flush=True)


def _collect(plans: Sequence[Plan], site: Site) -> None:
    """The job that collects each sweep, behind all its jobs, those of earlier submits too."""
    for sweep in sorted({p.run.path.parent for p in plans}):
        if job := collect_after(sweep, site):
            print(f"then collect: job {job} -> {sweep / 'collect'}")
        else:
            print(f"{sweep.name}: no job to wait for; next: longclip collect {sweep.name}")


def _outcome(runs: Sequence[RunFolder]) -> int:
    """1 if a run that was waited for did not finish, and what to do about it."""
    rows = statuses(runs)[0]
    bad = [r for r in rows if r.state != "finished"]
    for row in bad:
        print(f"{row.run.name}: {row.state}: {row.note}\n  next: longclip logs {row.run.name}")
    if not bad:
        print(f"all finished; next: longclip collect {rows[0].run.sweep}")
    return 1 if bad else 0
