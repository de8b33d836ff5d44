"""Training without a queue: under torchrun, under srun, or as one process. The record is the same."""

from __future__ import annotations

import os
from pathlib import Path

from longclip.errors import LongclipError, UserError
from longclip.experiment.load import load
from longclip.launch.environment import before_torch
from longclip.launch.plan import plan as plan_all
from longclip.launch.plan import problems
from longclip.launch.site import Site
from longclip.launch.snapshot import todays_code
from longclip.launch.submit import record_attempt
from longclip.launch.worker import Leave, meet, note_failure, stop_at_step_boundary, train_attempt
from longclip.run.attempts import Superseded
from longclip.run.folder import RunFolder


def train_here(file: Path, overrides: list[str], site: Site) -> str:
    """Trains the one experiment of ``file`` on the ranks that the launcher made; returns the verdict.

    Raises:
        UserError: the file is a sweep, or its run is finished, queued or running.
    """
    before_torch(offline=False)
    from longclip.train import ranks as processes

    stop_at_step_boundary(with_ctrl_c=True)
    _ranks_of_srun(site.runs)
    ranks = processes.start()
    failure: LongclipError | None = None
    told: tuple[str, int] | None = None
    if ranks.rank == 0:  # one rank decides: another would already see the attempt that this one makes
        try:
            told = _record(file, overrides, site)
        except LongclipError as error:
            failure = error
    told = ranks.tell(told)
    if told is None:
        processes.stop()
        raise failure or UserError("rank 0 could not begin; its message says why")
    record, number = RunFolder(Path(told[0])), told[1]
    try:
        verdict = train_attempt(record, number, ranks)
    except (Superseded, Leave):
        processes.leave(ranks)
        raise
    except BaseException as error:
        note_failure(record, number, error)
        raise
    processes.stop()
    return verdict


def _ranks_of_srun(runs: Path) -> None:
    """srun says who is who in its own words, and only inside a step (SLURM_STEP_ID; a batch script has none)."""
    env = os.environ
    if "RANK" in env or "SLURM_STEP_ID" not in env or "SLURM_PROCID" not in env:
        return
    runs.mkdir(parents=True, exist_ok=True)
    token = "-".join(env.get(k, "0") for k in ("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_RESTART_COUNT"))
    size = int(env.get("SLURM_STEP_NUM_TASKS", env.get("SLURM_NTASKS", "1")))
    meet(runs / f".meeting-{token}.json", int(env["SLURM_PROCID"]), size, int(env.get("SLURM_LOCALID", "0")))


def _record(file: Path, overrides: list[str], site: Site) -> tuple[str, int]:
    loaded = load([file], overrides)
    if len(loaded) != 1:
        raise UserError(f"{file}: is a sweep of {len(loaded)} experiments; longclip submit queues them")
    (plan,) = plan_all(loaded, site, retry=True)
    for problem in problems([plan]):
        raise problem
    if not plan.queues:
        raise UserError(f"{plan.run.name}: {plan.why}", f"longclip status {plan.run.name}")
    plan.run.create(plan.experiment, plan.identity, dict(plan.axes))
    attempt = record_attempt(plan, site, "local", todays_code(), str(os.getpid()))
    return str(plan.run.path), attempt.number
