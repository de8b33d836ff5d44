"""The cluster that the other tests rely on is what it promises to be."""

import os
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import DEV_CLUSTER, Cluster

PRETEND = ["--partition=pretend", "--nodes=1", "--gpus-per-node=4", "--ntasks-per-node=4", "--time=60"]


def run(*command: str | Path, code: int = 0, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Run a command that must end with exit code ``code``."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=env, check=False)
    assert done.returncode == code, f"{command}: exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


def sbatch(folder: Path, script: str, *options: str) -> str:
    """Submit a batch job that writes to ``folder/<job id>.out``, and return its id."""
    command = ["sbatch", "--parsable", f"--output={folder}/%j.out", *options, f"--wrap={script}"]
    return run(*command).stdout.strip()


def wait_until(what: str, true: Callable[[], bool], seconds: float = 60) -> None:
    """Wait until ``true()`` is; fail after ``seconds``."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, f"waited {seconds} s for {what}"
        time.sleep(0.3)


def reason(job_id: str) -> str:
    """Return the state of a job in the queue and why it is not running, such as "PENDING Resources"."""
    return run("squeue", "--noheader", "--format=%T %r", f"--jobs={job_id}").stdout.strip()


def test_four_nodes_answer_by_their_own_names(cluster: Cluster) -> None:
    """Each node has its host name, and finds the others by name."""
    lines = run("srun", "-N4", "sh", "-c", "echo $(hostname) $(getent hosts n1 n4 | wc -l)").stdout.splitlines()
    assert sorted(lines) == ["n1 2", "n2 2", "n3 2", "n4 2"]


def test_gpus_are_handed_out(cluster: Cluster) -> None:
    """A job sees the GPUs it asked for, and cannot have more than the node has."""
    assert run("srun", "--gpus-per-node=2", "printenv", "CUDA_VISIBLE_DEVICES").stdout.strip() == "0,1"
    run("sbatch", "--test-only", "--gpus-per-node=3", "--wrap=true", code=1)


def test_accounting_knows_how_jobs_ended(cluster: Cluster, tmp_path: Path) -> None:
    """Good, bad and cancelled jobs have these words in the database."""
    good = sbatch(tmp_path, "hostname")
    bad = sbatch(tmp_path, "exit 3")
    stopped = sbatch(tmp_path, "sleep 600")
    wait_until("the job to run", lambda: reason(stopped).startswith("RUNNING"))
    run("scancel", stopped)
    expected = {good: "COMPLETED", bad: "FAILED", stopped: "CANCELLED"}
    wait_until("sacct", lambda: cluster.sacct(list(expected)) == expected)
    assert (tmp_path / f"{good}.out").read_text().strip() in {"n1", "n2", "n3", "n4"}


def test_requeued_job_does_not_wait(cluster: Cluster, tmp_path: Path) -> None:
    """A job that is requeued runs again long before Slurm's two minutes are over."""
    job = sbatch(tmp_path, "echo run $SLURM_RESTART_COUNT; sleep 600", "--requeue", "--open-mode=append")
    output = tmp_path / f"{job}.out"
    wait_until("the job to run", lambda: output.exists() and output.read_text() == "run\n")
    run("scontrol", "requeue", job)
    wait_until("the second run", lambda: "run 1" in output.read_text().splitlines(), seconds=90)
    run("scancel", job)


def test_pretend_answers_and_runs_nothing(cluster: Cluster, tmp_path: Path) -> None:
    """The partition that is not there tells when a job would start, and never starts one."""
    answer = run("sbatch", "--test-only", *PRETEND, "--wrap=true").stderr
    assert "to start at" in answer
    assert "partition pretend" in answer
    run("sbatch", "--test-only", *PRETEND, "--nodes=4", "--cpus-per-task=16", "--mem=500000", "--wrap=true")
    run("sbatch", "--test-only", *PRETEND, "--nodes=5", "--wrap=true", code=1)
    run("sbatch", "--test-only", *PRETEND, "--gpus-per-node=5", "--wrap=true", code=1)
    job = sbatch(tmp_path, "hostname", *PRETEND)
    try:
        wait_until("the scheduler to look at it", lambda: reason(job) == "PENDING PartitionDown")
        time.sleep(6)  # three rounds of the scheduler
        assert reason(job) == "PENDING PartitionDown"
        assert "to start at" in run("sbatch", "--test-only", *PRETEND, "--wrap=true").stderr
    finally:
        run("scancel", job)
    wait_until("sacct", lambda: cluster.sacct([job]) == {job: "CANCELLED"})
    assert not (tmp_path / f"{job}.out").exists()


def test_unknown_partition_is_refused(cluster: Cluster) -> None:
    """So that a typing error in a user's configuration is one in these tests, too."""
    refused = run("sbatch", "--partition=nowhere", "--wrap=true", code=1)
    assert "invalid partition" in refused.stderr


def test_up_again_changes_nothing(cluster: Cluster) -> None:
    """A second ``up`` says the same and starts no daemon anew."""
    before = run(DEV_CLUSTER, "status", cluster.dir).stdout
    assert f"dev-cluster env {cluster.dir}" in run(DEV_CLUSTER, "up", cluster.dir).stdout
    after = run(DEV_CLUSTER, "status", cluster.dir).stdout
    daemons = [line for line in before.splitlines() if ": pid " in line]
    assert len(daemons) == 9
    assert daemons == [line for line in after.splitlines() if ": pid " in line]


def test_env_is_all_a_client_needs(cluster: Cluster) -> None:
    """The printed lines, in a shell that knows nothing else, make Slurm's commands find the cluster."""
    lines = run(DEV_CLUSTER, "env", cluster.dir).stdout
    assert lines == f"export SLURM_CONF={cluster.dir}/etc/slurm.conf\n"
    script = f'eval "$({DEV_CLUSTER} env {cluster.dir})" && sinfo --noheader --format=%R'
    listed = run("bash", "-c", script, env={"PATH": os.environ["PATH"]}).stdout
    assert listed.split() == ["batch", "preempt", "pretend"]


def test_status_tells_a_dead_node(cluster: Cluster, tmp_path: Path) -> None:
    """``status`` is 0 only when all is up; a crash takes a node's tasks along, and the node comes back."""
    job = sbatch(tmp_path, "echo $$; exec sleep 600", "--nodelist=n4", "--no-requeue")
    output = tmp_path / f"{job}.out"
    wait_until("the job to run", lambda: output.exists() and output.read_text().endswith("\n"))
    task = Path("/proc") / output.read_text().strip()
    assert task.exists()
    run(DEV_CLUSTER, "status", cluster.dir)
    cluster.kill_node("n4")
    try:
        assert "slurmd-n4: down" in run(DEV_CLUSTER, "status", cluster.dir, code=1).stdout
        wait_until("the task to be gone", lambda: not (task / "exe").exists(), seconds=5)
        run(DEV_CLUSTER, "kill-node", cluster.dir, "n4", code=1)
        wait_until("Slurm to notice", lambda: cluster.sacct([job]) == {job: "NODE_FAIL"})
    finally:
        cluster.start_node("n4")
    run(DEV_CLUSTER, "status", cluster.dir)
    assert run("srun", "--nodelist=n4", "hostname").stdout == "n4\n"


def test_wrong_use(tmp_path: Path) -> None:
    """No cluster is needed to be told what was wrong; nothing is made, and nobody's folder is taken over."""
    run(DEV_CLUSTER, code=2)
    run(DEV_CLUSTER, "up", code=2)
    run(DEV_CLUSTER, "kill-node", tmp_path, "n5", code=2)
    long = tmp_path / ("x" * 70)
    assert "too long" in run(DEV_CLUSTER, "up", long, code=2).stderr
    assert not long.exists()


def test_a_folder_of_somebody_elses() -> None:
    """Neither ``up`` nor ``down --delete`` touches a folder that holds something else."""
    folder = Path(f"/tmp/lc-other-{os.getpid()}")
    folder.mkdir()
    try:
        (folder / "precious").touch()
        run(DEV_CLUSTER, "up", folder, code=2)
        run(DEV_CLUSTER, "down", folder, "--delete", code=1)
        run(DEV_CLUSTER, "status", folder, code=1)
        assert [path.name for path in folder.iterdir()] == ["precious"]
    finally:
        shutil.rmtree(folder)
    run(DEV_CLUSTER, "down", folder, "--delete")  # a folder that is not there is down


def test_missing_packages_are_named(tmp_path: Path) -> None:
    """Without Slurm, ``up`` says in one line what to install."""
    for tool in ("bash", "readlink", "sed", "id", "ls"):
        found = shutil.which(tool)
        if not found:
            pytest.skip(f"no {tool}")
        (tmp_path / tool).symlink_to(found)
    folder = Path(f"/tmp/lc-none-{os.getpid()}")
    refused = run(tmp_path / "bash", DEV_CLUSTER, "up", folder, code=3, env={"PATH": str(tmp_path)}).stderr
    assert refused.count("\n") == 1
    assert "slurm-client" in refused
    assert "apt-get install" in refused
    assert not folder.exists()
