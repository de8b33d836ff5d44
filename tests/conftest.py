"""A real Slurm cluster for the tests, made by ``slurm/dev-cluster`` and shared by all of them."""

import os
import shlex
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

DEV_CLUSTER = Path(__file__).parents[1] / "slurm" / "dev-cluster"
# A shell that starts the suite in the background has it ignore Ctrl-C, and so would the commands that it tests.
signal.signal(signal.SIGINT, signal.default_int_handler)

FAULTS: list[tuple[str, int, int, float]] = []
"""fault, attempts, samples computed more than once, seconds longer than the undisturbed run"""
SOMETHING_MISSING = 3
"""The exit code by which dev-cluster says that a cluster cannot be had on this machine."""


def dev_cluster(*args: str | Path, timeout: float = 300) -> subprocess.CompletedProcess[str]:
    """Run ``slurm/dev-cluster`` and return what came of it, whatever the exit code."""
    return subprocess.run([DEV_CLUSTER, *args], capture_output=True, text=True, timeout=timeout, check=False)


@dataclass(frozen=True)
class Cluster:
    """A running cluster: the folder it lives in and the environment variables its clients need."""

    dir: Path
    env: dict[str, str]

    def sacct(self, job_ids: list[str]) -> dict[str, str]:
        """Return each job's state as the accounting database has it; a job it does not know yet is left out.

        Only the state's first word is kept: sacct says "CANCELLED by 0". The start time is given because,
        without one, some versions of sacct look at today only, and a test may run over midnight.
        """
        if not job_ids:
            return {}
        command = ["sacct", "-X", "-n", "-P", "-o", "JobID,State", "--starttime=2000-01-01", "-j", ",".join(job_ids)]
        done = subprocess.run(
            command, env={**os.environ, **self.env}, capture_output=True, text=True, timeout=60, check=False
        )
        if done.returncode != 0:
            raise RuntimeError(f"sacct failed: {done.stderr.strip()}")
        rows = (line.split("|") for line in done.stdout.splitlines())
        return {job_id: state.split()[0] for job_id, state in rows}

    def kill_node(self, name: str) -> None:
        """Crash a node: kill -9 its slurmd and everything that runs on it."""
        self._node("kill-node", name)

    def start_node(self, name: str) -> None:
        """Bring a crashed node back, and return when Slurm has it again."""
        self._node("start-node", name)

    def _node(self, command: str, name: str) -> None:
        done = dev_cluster(command, self.dir, name)
        if done.returncode != 0:
            raise RuntimeError(f"{command} {name} failed: {done.stderr.strip()}")


def _logs(directory: Path, lines: int = 15) -> str:
    """Return the end of every log file, for a report on a cluster that did not come up."""
    parts = []
    for path in sorted((directory / "log").glob("*")):
        tail = path.read_text(errors="replace").splitlines()[-lines:]
        if tail:
            parts.append("\n".join([f"--- {path.name}", *tail]))
    return "\n".join(parts)


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """Start a cluster, let every Slurm command of this process talk to it, and remove it in the end.

    Where Slurm cannot be had the tests are skipped, but not in CI: there, a test that did not run has failed.
    """
    # not pytest's own temporary folder: its path is too long for unix sockets
    directory = Path(tempfile.mkdtemp(prefix="lc-", dir="/tmp"))
    install = ["--install"] if os.geteuid() == 0 and shutil.which("apt-get") else []
    try:
        started = dev_cluster("up", directory, *install, timeout=1200)
        if started.returncode == SOMETHING_MISSING:
            reason = f"no Slurm cluster here: {started.stderr.splitlines()[-1]}"
            if os.environ.get("CI"):
                pytest.fail(reason, pytrace=False)
            pytest.skip(reason)
        if started.returncode != 0:
            pytest.fail(f"the cluster did not start: {started.stderr.strip()}\n{_logs(directory)}", pytrace=False)
        exports = dev_cluster("env", directory).stdout.splitlines()
        env = dict(shlex.split(line)[1].split("=", 1) for line in exports)
        with pytest.MonkeyPatch.context() as patch:
            for name, value in env.items():
                patch.setenv(name, value)
            yield Cluster(directory, env)
    finally:
        if any(directory.iterdir()):
            stopped = dev_cluster("down", directory, "--delete")
            assert stopped.returncode == 0, stopped.stderr
        else:  # it never came so far as to be a cluster
            directory.rmdir()


# ---- the table of tests/faults, which may have run in processes of its own -----------------------------------------


def pytest_sessionfinish(session: pytest.Session) -> None:
    if (output := getattr(session.config, "workeroutput", None)) is not None:
        output["faults"] = FAULTS


@pytest.hookimpl(optionalhook=True)  # xdist's
def pytest_testnodedown(node: Any) -> None:
    FAULTS.extend(getattr(node, "workeroutput", {}).get("faults", ()))


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if FAULTS:
        terminalreporter.section("faults survived")
        terminalreporter.write_line(f"{'fault':58s} attempts  recomputed  seconds lost")
        for fault, attempts, again, seconds in FAULTS:
            terminalreporter.write_line(f"{fault:58s} {attempts:8d}  {again:10,d}  {seconds:12.0f}")
