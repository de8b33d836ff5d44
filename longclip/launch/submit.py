"""From experiments to jobs: plan what to do with each, check all of it, then queue.

Submitting is idempotent: a run that is finished, running or queued is left alone, one that was interrupted continues
at its sample. Nothing is queued unless everything could be.
"""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import submitit

from longclip.errors import LongclipError, SiteError, UserError
from longclip.experiment.identity import differences, identity, uid
from longclip.experiment.load import Loaded
from longclip.experiment.schema import Experiment, parse_time
from longclip.launch import canary as canaries
from longclip.launch import restart, worker
from longclip.launch.preflight import excluded
from longclip.launch.resolve import Resolved, resolve
from longclip.launch.scheduler import have_slurm, jobs_of_mine
from longclip.launch.site import Site
from longclip.launch.snapshot import Code, Snapshot, code_hash, freeze, place
from longclip.launch.status import CONTINUES, UNDER_WAY, statuses
from longclip.run.attempts import Attempt, attempts_of, new_attempt
from longclip.run.folder import RunFolder, dump_experiment, read_json, runs_of, write_json, write_text
from longclip.run.journal import SAVE_SECONDS, effective, series
from longclip.track.lease import Lease
from longclip.track.stream import streamable

LIMITS = ("MaxSubmit", "MaxJobs", "GrpSubmit", "job submit limit", "AssocGrp", "QOSMax")
"""In sbatch's words: this user has as many jobs in the queue as may be"""


class QueueFull(SiteError):
    """The site takes no more jobs now; what was queued stays, the rest waits for the next submit."""


@dataclass(frozen=True)
class Plan:
    """What submit will do with one experiment."""

    experiment: Experiment
    axes: Mapping[str, Any]
    resolved: Resolved
    identity: dict[str, Any]
    run: RunFolder
    action: str
    """new, resume, or left alone"""
    why: str
    attempts: list[tuple[Any, ...]] = field(default_factory=list)
    """those that the decision knew of, as :func:`_attempts` gives them"""
    canary: bool = False
    """this is no run of the sweep, but tries out the shape of some (launch/canary.py)"""
    held_by: Mapping[str, str] | None = None
    """the canary that the run waits for: ``canary`` (folder, from the run's) and ``job``"""

    @property
    def queues(self) -> bool:
        return self.action != "left alone"


def plan(loaded: Sequence[Loaded], site: Site, retry: bool = False) -> list[Plan]:
    """Decides for every experiment; changes nothing. ``retry`` also continues runs that ended badly.

    Raises:
        UserError: two experiments are the same run, or a run folder belongs to another experiment.
    """
    drafts = []
    for one in loaded:
        resolved = resolve(one.experiment, site)
        facts = identity(one.experiment, resolved.pins)
        run = RunFolder(site.runs / one.sweep / f"{one.experiment.name}-{uid(facts)}")
        drafts.append((one, resolved, facts, run))
    seen: dict[tuple[str, str], Loaded] = {}
    for one, _, _, run in drafts:
        twin = seen.setdefault((run.sweep, run.uid), one)
        if twin is not one:
            raise UserError(
                f"{one.file} ({one.experiment.name}) and {twin.file} ({twin.experiment.name}) are the same experiment: "
                "nothing that decides the weights differs"
            )
    # Before anything else is read of the runs: what happens from here on, submit sees as a difference.
    attempts = {run.path: _attempts(run) for _, _, _, run in drafts}
    existing = []
    for _, _, facts, run in drafts:
        if run.exists():
            run.check(facts)
            existing.append(run)
    known, words = statuses(existing)
    states = {s.run.path: s for s in known}
    grown = {run.sweep for _, _, _, run in drafts if run.path not in states}
    others = {sweep: [(r, r.identity()) for r in runs_of(site.runs, sweep)] for sweep in grown}
    plans = []
    for one, resolved, facts, run in drafts:
        if run.path not in states:
            action, why = "new", _nearest(run, facts, others[run.sweep])
        else:
            state = states[run.path]
            action, why = _decide(state.state, state.note, state.samples, retry and words.complete)
        plans.append(Plan(one.experiment, one.axes, resolved, facts, run, action, why, attempts[run.path]))
    return plans


def _attempts(run: RunFolder) -> list[tuple[Any, ...]]:
    """What changes in a run's record when somebody else submits it, or its job goes on."""
    return [(a.number, a.submitted is not None, a.job, a.ended is not None) for a in attempts_of(run)]


def _decide(state: str, note: str, samples: int, retry: bool) -> tuple[str, str]:
    if state == "waiting":
        return "new", "was not queued yet"
    if state in ("finished", "queued", "running"):
        return "left alone", f"{state} ({note})"
    if state == "unknown":
        return "left alone", note
    if state in CONTINUES or retry:
        return "resume", f"{state} at {samples:,} samples ({note})" if note else f"{state} at {samples:,} samples"
    return "left alone", f"{state}: {note}; longclip retry continues it"


def _nearest(run: RunFolder, facts: dict[str, Any], others: Sequence[tuple[RunFolder, dict[str, Any]]]) -> str:
    """Which of the sweep's runs (with their identities) differs in the fewest keys, and in which."""
    best: tuple[RunFolder, dict[str, tuple[Any, Any]]] | None = None
    for other, theirs in others:
        if other.name == run.name:  # another submit has made it in this moment
            continue
        differs = differences(theirs, facts)
        if best is None or len(differs) < len(best[1]):
            best = (other, differs)
    if best is None or len(best[1]) > 3:
        return ""
    if not best[1]:
        raise UserError(
            f"{run.name}: is the same experiment as {best[0].name}, under another name: nothing that decides the "
            "weights differs",
            f"name: {best[0].label}",
        )
    what = ", ".join(f"{k} {_short(a)}->{_short(b)}" for k, (a, b) in best[1].items())
    return f"= {best[0].name} but {what}"


def _short(value: Any) -> str:
    text = "default" if value is None else str(value)
    return text if len(text) <= 16 else text[:12]


def problems(plans: Sequence[Plan]) -> list[LongclipError]:
    """All that stands in the way of queuing, each once."""
    found = [p for plan in plans if plan.queues for p in plan.resolved.problems]
    return list({(type(p), p.message): p for p in found}.values())


# ---- jobs --------------------------------------------------------------------------------------------------------


def slurm_parameters(experiment: Experiment, run: RunFolder, site: Site, code: Path) -> dict[str, Any]:
    """The job's submitit parameters; ``code`` is the snapshot that it imports."""
    ask = experiment.slurm
    cpus = ask.cpus_per_task or site.cpus_per_task
    parameters: dict[str, Any] = {
        "job_name": f"{run.sweep}/{run.name}",
        "nodes": ask.nodes,
        "ntasks_per_node": ask.ranks_per_node,
        "time": parse_time(ask.time),
        "partition": ask.partition or site.partition,
        "account": site.account,
        "qos": site.qos,
        "cpus_per_task": cpus,
        "signal_delay_s": restart.lead(parse_time(ask.time), save_seconds(run)),
        "stderr_to_stdout": True,
        # One rank that dies takes the others with it, instead of leaving them in a collective that never ends.
        "srun_args": ["--kill-on-bad-exit=1", *site.srun],
        "mail_user": site.mail,
        "mail_type": "FAIL,END" if site.mail else None,
        "setup": setup_lines(site, cpus, code),
        "wckey": None,
    }
    if ask.gpus_per_node:
        typed = f"{site.gpu_type}:" if site.gpu_type else ""
        if site.gpus == "gres":
            parameters["gres"] = f"gpu:{typed}{ask.gpus_per_node}"
        elif site.gpus == "gpus-per-task":
            parameters["gpus_per_task"] = f"{typed}1"
        else:
            parameters["gpus_per_node"] = f"{typed}{ask.gpus_per_node}"
    memory = ask.mem_gb or site.mem_gb
    if memory is not None:
        parameters["mem"] = f"{int(memory * 1024)}M"
    # --chdir: a package that lies in the folder of submission must not come before the installed one; the batch script
    # finds the run's marks there, and status finds a job by it whose id nobody could record.
    again = site.restart == "requeue"
    parameters["additional_parameters"] = {
        "chdir": str(run.path.resolve()),
        "requeue" if again else "no-requeue": True,
        # What waits for a canary that failed is taken out of the queue, instead of waiting there for ever.
        "kill-on-invalid-dep": "yes",
        **site.sbatch,
    }
    if nodes := excluded(run.path, time.time()):
        theirs = [str(site.sbatch["exclude"])] if "exclude" in site.sbatch else []
        parameters["additional_parameters"]["exclude"] = ",".join([*theirs, *nodes])
    if again:
        parameters["setup"] = [*restart.before(), *parameters["setup"]]
        parameters["teardown"] = restart.after()
    return {k: v for k, v in parameters.items() if v is not None or k == "wckey"}


def save_seconds(run: RunFolder) -> float | None:
    """The longest that a save of this run has taken, by its journal; None before the first."""
    if not run.exists():
        return None
    return max((seconds for _, seconds in series(effective(run), SAVE_SECONDS)), default=None)


def warnings(plans: Sequence[Plan], site: Site) -> list[str]:
    """What a submit should know and is no obstacle."""
    found = []
    if (site.tracking or "").startswith("http") and streamable(site.tracking) is None:
        found.append(
            "jobs do not stream to the tracking server: its address holds a password, which run folders would keep; "
            "take it from MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
        )
    for plan in plans:
        taken = save_seconds(plan.run) if plan.queues else None
        if taken is not None and site.grace_s is not None and taken > site.grace_s:
            found.append(
                f"{plan.run.name}: a save takes {taken:.0f} s, preemption leaves {site.grace_s} s: the loss is "
                f"bounded by checkpoint.every = {plan.experiment.checkpoint.every}"
            )
    return found


def setup_lines(site: Site, cpus: int | None, code: Path) -> list[str]:
    """Lines of a batch script before its command: the site's, and what makes a job import the snapshot ``code``."""
    lines = list(site.setup)
    lines += [f"export {name}={shlex.quote(value)}" for name, value in {**worker_env(cpus), **site.env}.items()]
    # First, and after all that a module or the site may have put there; PYTHONSAFEPATH keeps the current folder out.
    lines.append(f"export PYTHONPATH={shlex.quote(str(code))}${{PYTHONPATH:+:$PYTHONPATH}}")
    if cpus is not None:
        # Since Slurm 22.05 srun gives a task one CPU, whatever the job has, unless told so.
        lines.append(f"export SRUN_CPUS_PER_TASK={cpus}")
    return lines


def worker_env(cpus: int | None) -> dict[str, str]:
    """Environment of every worker: no hub, no stray imports, one thread a CPU."""
    return {
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONSAFEPATH": "1",
        "OMP_NUM_THREADS": str(cpus or 1),
    }


def batch_script(plan: Plan, site: Site, code: str | None = None) -> str:
    """The batch script that submit would hand to sbatch, as it is.

    ``code`` is the hash of the code, for who has it already: it takes longer than the script.
    """
    logs = plan.run.attempts / "NNNN" / "logs"
    snapshot = place(plan.run.path.resolve().parent, code or code_hash())
    executor = _slurm_executor(plan.experiment, plan.run, site, logs, snapshot)
    text: str = executor._make_submission_file_text(executor._submitit_command_str, "dry-run")
    return text


def _slurm_executor(
    experiment: Experiment, run: RunFolder, site: Site, logs: Path, code: Path
) -> submitit.SlurmExecutor:
    if have_slurm():
        executor = submitit.SlurmExecutor(folder=logs.resolve(), python=site.python)
    else:  # a dry run on a machine without Slurm: only the text is wanted, and the constructor insists on srun
        executor = submitit.SlurmExecutor.__new__(submitit.SlurmExecutor)
        submitit.core.core.PicklingExecutor.__init__(executor, folder=logs.resolve())
        executor.python = site.python or shlex.quote(sys.executable)
    executor.update_parameters(**slurm_parameters(experiment, run, site, code))
    return executor


def shape(script: str) -> str:
    """What Slurm judges a batch script by: its ``#SBATCH`` lines, without the run's name and folder."""
    own = ("--job-name=", "--chdir=", "--output=", "--error=")
    lines = (line.removeprefix("#SBATCH ") for line in script.splitlines() if line.startswith("#SBATCH "))
    return "\n".join(line for line in lines if not line.startswith(own))


def test_only(script: str) -> str:
    """``sbatch --test-only``: Slurm's estimate of when and where the job would start.

    Raises:
        SiteError: Slurm would not take the job; its own words.
    """
    with tempfile.NamedTemporaryFile("w", suffix=".sh") as file:
        # The run folder may not exist yet.
        file.write("\n".join(line for line in script.splitlines() if not line.startswith("#SBATCH --chdir")) + "\n")
        file.flush()
        done = subprocess.run(["sbatch", "--test-only", file.name], capture_output=True, text=True)
    words = " ".join(line.removeprefix("sbatch: ").strip() for line in done.stderr.splitlines() if line.strip())
    if done.returncode != 0:
        raise SiteError(
            f"sbatch --test-only: {words.removeprefix('error: ')}", "sinfo shows partitions and their limits"
        )
    return words


def check_slurm(plans: Sequence[Plan], site: Site) -> None:
    """Every job of ``plans`` is one that Slurm would take; it is asked once for each distinct :func:`shape`.

    Raises SiteError.
    """
    if not have_slurm():
        raise SiteError(
            "there is no Slurm on this machine (no sbatch, no srun)", "submit on a login node, or add --on local"
        )
    code = code_hash()
    scripts = (batch_script(plan, site, code) for plan in plans)
    for script in {shape(script): script for script in scripts}.values():
        test_only(script)


def submit(
    plans: Sequence[Plan], site: Site, executor: str, canary: bool = False
) -> Iterator[tuple[Plan, str, submitit.Job[Any]]]:
    """Queues the planned jobs one by one, yielding each with its id. With ``canary`` (Slurm only) each waits until
    its memory shape has been tried out.

    Raises:
        QueueFull: the site takes no more; those that were yielded are queued, the others wait.
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
    each = 1 + (site.links if site.restart == "chain" else 0)
    beside = len({str(canaries.shape(p, site)) for p in todo}) if canary else 0
    for done, one in enumerate(todo):
        if room is not None and (done + 1) * each + beside > room:
            raise QueueFull(f"the site lets one user have {site.max_jobs} jobs in the queue")
        # Of two people who submit the same run at once, the second finds the first one's attempt. As long as the record
        # is that of the plan, though hours may have passed, the scheduler is not asked again for every single run.
        with Lease(one.run.attempts / ".submit.lock"):
            changed = _attempts(one.run) != one.attempts
            if changed and statuses([one.run])[0][0].state in (*UNDER_WAY, "finished"):
                continue
            code = codes[one.run.path.resolve().parent]
            if canary:
                one = replace(one, held_by=canaries.holds(one, site, code, _queue))
            job = _queue(one, site, executor, code)
        yield one, str(job.job_id), job


def _room(site: Site) -> int | None:
    """Jobs that this user may still queue; None where the site sets no limit, or nobody can say."""
    queued = None if site.max_jobs is None else jobs_of_mine()
    return None if queued is None or site.max_jobs is None else site.max_jobs - queued


def record_attempt(plan: Plan, site: Site, executor: str, code: Code, job: str | None = None) -> Attempt:
    """A new attempt of the plan's run, with all that its worker needs to know."""
    try:
        attempt = new_attempt(plan.run)
        write_text(attempt.path / "experiment.yaml", dump_experiment(plan.experiment))
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


def _queue(plan: Plan, site: Site, kind: str, code: Snapshot) -> submitit.Job[Any]:
    attempt = record_attempt(plan, site, kind, code)
    passed = [f"afterok:{plan.held_by['job']}"] if plan.held_by else []
    try:
        job = _start(plan.experiment, plan.run, attempt, site, kind, code, passed)
        record = {
            **read_json(attempt.path / "submitted.json"),
            "job": str(os.getpid()) if kind == "debug" else str(job.job_id),
        }
        write_json(attempt.path / "submitted.json", record)
        if kind == "slurm" and site.restart == "chain":
            record["links"] = []
            for _ in range(site.links):
                before = (record["links"] or [record["job"]])[-1]
                link = _start(plan.experiment, plan.run, attempt, site, kind, code, [f"afterany:{before}", *passed])
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


def _start(
    experiment: Experiment,
    run: RunFolder,
    attempt: Attempt,
    site: Site,
    kind: str,
    code: Snapshot,
    after: Sequence[str],
) -> submitit.Job[Any]:
    """``after``: what a Slurm job waits for, as ``--dependency`` has it."""
    arguments = (str(run.path.resolve()), attempt.number)
    if kind == "slurm":
        executor = _slurm_executor(experiment, run, site, attempt.logs, code.folder)
        if after:
            executor.update_parameters(dependency=",".join(after))
        return executor.submit(worker.run, *arguments)
    if kind == "debug":
        return submitit.DebugExecutor(folder=attempt.logs.resolve()).submit(worker.run, *arguments)
    local = submitit.LocalExecutor(folder=attempt.logs.resolve(), python=site.python)
    local.update_parameters(
        tasks_per_node=experiment.slurm.ranks,
        gpus_per_node=experiment.slurm.gpus_per_node,
        timeout_min=60 * 24 * 365,
        stderr_to_stdout=True,
    )
    env = {**worker_env(experiment.slurm.cpus_per_task), **site.env}
    behind = {**os.environ, **env}.get("PYTHONPATH")
    env["PYTHONPATH"] = os.pathsep.join(filter(None, (str(code.folder), behind)))
    with _environment(env), _ctrl_c_stays_here():
        return local.submit(worker.run, *arguments)


@contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    """The local executor hands its jobs this process's environment."""
    before = dict(os.environ)
    os.environ.update(values)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


@contextmanager
def _ctrl_c_stays_here() -> Iterator[None]:
    """Children started inside ignore Ctrl-C: it ends the watching, not the runs (``longclip cancel`` does)."""
    try:
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    except ValueError:  # not the main thread
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
