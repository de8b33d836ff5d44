"""One run as a job: what is asked of Slurm, the batch script, and its start by Submitit on any executor."""

from __future__ import annotations

import os
import re
import shlex
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import submitit

from longclip.errors import SiteError
from longclip.experiment.durations import parse_time
from longclip.experiment.schema import Experiment, Slurm
from longclip.launch import clients, restart, worker
from longclip.launch.plan import Plan
from longclip.launch.preflight import excluded
from longclip.launch.scheduler import have_slurm
from longclip.launch.site import Site
from longclip.launch.snapshot import Snapshot, code_hash, place
from longclip.run.attempts import Attempt
from longclip.run.folder import RunFolder
from longclip.run.journal import longest_save

LIMITS = ("MaxSubmit", "MaxJobs", "GrpSubmit", "job submit limit", "AssocGrp", "QOSMax")
"""In sbatch's words: this user has as many jobs in the queue as may be"""


_VARIABLES = {
    "time": ("TIMELIMIT",),
    "mem": ("MEM_PER_NODE", "MEM_PER_CPU", "MEM_PER_GPU"),
    "requeue": ("REQUEUE", "NO_REQUEUE"),
    "no-requeue": ("REQUEUE", "NO_REQUEUE"),
}
"""sbatch's environment variables for an option, where they are not called as it is (sbatch(1), INPUT ENVIRONMENT)"""


class QueueFull(SiteError):
    """The site takes no more jobs now; what was queued stays, the rest waits for the next submit."""


def slurm_parameters(experiment: Experiment, run: RunFolder, site: Site, code: Path) -> dict[str, Any]:
    """The job's submitit parameters; ``code`` is the snapshot that it imports."""
    ask = experiment.slurm
    parameters = {
        "job_name": f"{run.sweep}/{run.name}",
        **resources(ask, site, code),
        "signal_delay_s": restart.lead(parse_time(ask.time), longest_save(run)),
        "wckey": None,
    }
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
        parameters["setup"] = [*restart.before(), *parameters["setup"], *restart.settled()]
        parameters["teardown"] = restart.after(site.sbatch.get("exclude"))
    return {k: v for k, v in parameters.items() if v is not None or k == "wckey"}


def resources(ask: Slurm, site: Site, code: Path) -> dict[str, Any]:
    """What any job asks for in the way of nodes, ranks, time and memory, and how it begins; None where nothing."""
    cpus = ask.cpus_per_task or site.cpus_per_task
    parameters: dict[str, Any] = {
        "nodes": ask.nodes,
        "ntasks_per_node": ask.ranks_per_node,
        "time": parse_time(ask.time),
        "partition": ask.partition or site.partition,
        "account": site.account,
        "qos": site.qos,
        "cpus_per_task": cpus,
        "stderr_to_stdout": True,
        # One rank that dies takes the others with it, instead of leaving them in a collective that never ends.
        "srun_args": ["--kill-on-bad-exit=1", *site.srun],
        "mail_user": site.mail,
        "mail_type": "FAIL,END" if site.mail else None,
        "setup": setup_lines(site, cpus, code),
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
    return parameters


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
    parameters = slurm_parameters(experiment, run, site, code)
    parameters["setup"] = [*parameters["setup"], _named_after_its_job(logs.resolve())]
    executor.update_parameters(**parameters)
    return executor


def _named_after_its_job(logs: Path) -> str:
    """A line of the batch script: what Submitit has pickled for the job lies where the job looks for it.

    Submitit gives it the job's name when sbatch has answered. One that was killed before, or whose sbatch gave up on a
    controller that took the job all the same, has left it under a name of 32 characters.
    """
    wanted = f'{shlex.quote(str(logs))}/"${{SLURM_JOB_ID}}_submitted.pkl"'
    return f"[ -e {wanted} ] || cp {shlex.quote(str(logs))}/{'?' * 32}.pkl {wanted} 2>/dev/null || true"


def shape(script: str) -> str:
    """What Slurm judges a batch script by: its ``#SBATCH`` lines, without the run's name and folder."""
    own = ("--job-name=", "--chdir=", "--output=", "--error=")
    lines = (line.removeprefix("#SBATCH ") for line in script.splitlines() if line.startswith("#SBATCH "))
    return "\n".join(line for line in lines if not line.startswith(own))


def test_only(script: str) -> str:
    """``sbatch --test-only``: Slurm's estimate of when and where the job would start.

    Raises:
        SiteError: Slurm would not take the job; its own words. QueueFull: not now.
    """
    with tempfile.NamedTemporaryFile("w", suffix=".sh") as file:
        # The run folder may not exist yet.
        file.write("\n".join(line for line in script.splitlines() if not line.startswith("#SBATCH --chdir")) + "\n")
        file.flush()
        with as_written(script):
            done = clients.run("sbatch", "--test-only", file.name)
    words = " ".join(line.removeprefix("sbatch: ").strip() for line in done.stderr.splitlines() if line.strip())
    if done.returncode != 0 and "SubmitJob" in words:  # AssocMaxSubmitJobLimit, QOSGrpSubmitJobsLimit, ...
        raise QueueFull(f"the queue is full: {words.removeprefix('error: ')}")
    if done.returncode != 0:
        raise SiteError(
            f"sbatch --test-only: {words.removeprefix('error: ')}", "sinfo shows partitions and their limits"
        )
    return words


def need_slurm(otherwise: str) -> None:
    """Raises SiteError, with what to do ``otherwise``, on a machine without Slurm."""
    if not have_slurm():
        raise SiteError("there is no Slurm on this machine (no sbatch, no srun)", otherwise)


def check_slurm(plans: Sequence[Plan], site: Site) -> None:
    """Every job of ``plans`` is one that Slurm would take; it is asked once for each distinct :func:`shape`.

    Raises SiteError, or QueueFull where Slurm takes no more of this user's jobs now, whatever they ask for.
    """
    need_slurm("submit on a login node, or add --on local")
    code = code_hash()
    scripts = (batch_script(plan, site, code) for plan in plans)
    for script in {shape(script): script for script in scripts}.values():
        test_only(script)


def start(
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
        with as_written(executor._make_submission_file_text("", "")):
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
    with child_environment({**worker_env(experiment.slurm.cpus_per_task), **site.env}, code.folder):
        return local.submit(worker.run, *arguments)


@contextmanager
def child_environment(values: Mapping[str, str], code: Path) -> Iterator[None]:
    """The local executor hands its jobs this process's environment: with ``values``, and the snapshot ``code``."""
    behind = {**os.environ, **values}.get("PYTHONPATH")
    path = os.pathsep.join(filter(None, (str(code), behind)))
    with _environment({**values, "PYTHONPATH": path}), _ctrl_c_stays_here():
        yield


@contextmanager
def as_written(script: str) -> Iterator[None]:
    """Within, sbatch takes the batch script ``script`` at its word, whatever this process's environment says.

    To sbatch a variable such as SBATCH_ACCOUNT goes before the script's own line; one of which the script says nothing
    stays the user's default. And if this process is in a job itself (salloc, a notebook), the new one is handed nothing
    of it: its srun would ask for the GPUs, tasks and memory of the old one ("Job doesn't have GRES").
    """
    told = ("SLURM_", "SLURMD_", "SUBMITIT_") if "SLURM_JOB_ID" in os.environ else ()
    names = {name for name in os.environ if name.startswith(told) and name != "SLURM_CONF"} if told else set()
    for option in re.findall(r"^#SBATCH --([a-z-]+)", script, re.MULTILINE):
        stem = option.replace("-", "_").upper()
        names |= {f"SBATCH_{name}" for name in _VARIABLES.get(option, (stem,))}
    mine = {name: os.environ[name] for name in names if name in os.environ}
    for name in mine:
        del os.environ[name]
    try:
        yield
    finally:
        os.environ.update(mine)


@contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
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
