"""Four experiments through sbatch on a real cluster: two nodes x one rank, one table, the local executor's losses."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest

from longclip.run.attempts import attempts_of
from longclip.run.folder import RunFolder, runs_of
from tests.conftest import Cluster
from tests.launch.small import curve, environment, longclip, make_sweep, the_run

WINDOWS = (4, 5, 6, 9)
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_sweep(tmp_path_factory.mktemp("slurm"), WINDOWS)


@pytest.fixture(scope="module")
def runs(sweep: Path, cluster: Cluster) -> Path:
    """The sweep, submitted as a user does and waited for."""
    where = sweep.parent / "runs"
    two_nodes = ("--set", "slurm.nodes=2", "--set", "slurm.tasks_per_node=1")
    said = longclip("submit", sweep, *two_nodes, "--runs", where, "--wait", cwd=sweep.parent, timeout=400)
    assert "queued" in said and "all finished" in said, said
    return where


def jobs(runs: Path) -> dict[str, RunFolder]:
    return {str(attempts_of(run)[-1].job): run for run in runs_of(runs)}


def test_all_completed_by_sacct_s_own_word(runs: Path, cluster: Cluster) -> None:
    ids = list(jobs(runs))
    assert len(ids) == 4
    deadline = time.monotonic() + 20  # sacct lags by seconds
    while set((states := cluster.sacct(ids)).values()) != {"COMPLETED"} and time.monotonic() < deadline:
        time.sleep(1)
    assert states == dict.fromkeys(ids, "COMPLETED")


def test_two_nodes_took_part(runs: Path) -> None:
    for run in jobs(runs).values():
        started = attempts_of(run)[-1].started
        assert started is not None and started["ranks"] == 2 and len(started["nodes"]) == 2


def test_a_second_submit_queues_nothing(sweep: Path, runs: Path) -> None:
    two_nodes = ("--set", "slurm.nodes=2", "--set", "slurm.tasks_per_node=1")
    assert "nothing to queue" in longclip("submit", sweep, *two_nodes, "--runs", runs, cwd=sweep.parent)
    other = longclip(
        "submit", sweep, "--set", "slurm.nodes=1", "--set", "engine.zero_stage=1", "--runs", runs, cwd=sweep.parent
    )
    assert other.count("left alone") == 4 and "nothing to queue" in other


def test_four_mlflow_runs_and_one_table(sweep: Path, runs: Path) -> None:
    from mlflow import MlflowClient

    longclip("collect", "small", "--runs", runs, "--out", sweep.parent / "table", cwd=sweep.parent)
    table = pd.read_csv(sweep.parent / "table" / "table.csv")
    assert len(table) == 4
    client = MlflowClient(f"sqlite:///{runs}/mlflow.db")
    (experiment,) = [e for e in client.search_experiments() if e.name == "small"]
    found = client.search_runs([experiment.experiment_id], "tags.mlflow.parentRunId != ''")
    assert len(found) == 4
    assert {run.info.status for run in found} == {"FINISHED"}
    assert {run.data.params["model.context_length"] for run in found} == {"4", "5", "6", "9"}


def test_the_local_executor_gives_the_same_losses(sweep: Path, runs: Path) -> None:
    local = sweep.parent / "local"
    longclip("submit", sweep / "ctx6.yaml", "--on", "local", "--runs", local, cwd=sweep.parent)
    assert curve(the_run(local, "ctx6")) == curve(the_run(runs, "ctx6"))


def test_under_plain_srun(sweep: Path, runs: Path) -> None:
    """``srun -N2 longclip train FILE``: no Submitit, no torchrun; two nodes meet, and the losses are the job's."""
    direct = sweep.parent / "srun"
    command = ["srun", "--nodes=2", "--ntasks=2", "--mem=2500M", "--kill-on-bad-exit=1", sys.executable, "-m"]
    command += ["longclip.cli", "train", str(sweep / "ctx6.yaml"), "--runs", str(direct)]
    done = subprocess.run(command, cwd=sweep.parent, capture_output=True, text=True, timeout=240, env=environment())
    assert done.returncode == 0, done.stderr
    assert curve(the_run(direct, "ctx6")) == curve(the_run(runs, "ctx6"))


def test_status_logs_and_cancel(sweep: Path, cluster: Cluster, tmp_path: Path) -> None:
    """A job that waits is shown with Slurm's reason, and cancelling it is final."""
    submit = ("submit", sweep / "ctx4.yaml", "--runs", tmp_path / "waiting")
    longclip(*submit, "--set", "slurm.partition=pretend", cwd=sweep.parent)
    shown = longclip("status", "ctx4", "--runs", tmp_path / "waiting", cwd=sweep.parent)
    assert "queued" in shown and "PartitionDown" in shown, shown
    assert "scancel" in longclip("cancel", "small", "--runs", tmp_path / "waiting", cwd=sweep.parent)
    deadline = time.monotonic() + 20
    while "cancelled" not in (shown := longclip("status", "ctx4", "--runs", tmp_path / "waiting", cwd=sweep.parent)):
        assert time.monotonic() < deadline, shown
        time.sleep(1)
    assert "nothing to queue" in longclip(*submit, cwd=sweep.parent)


def test_unknown_partition_is_refused_in_sbatch_s_own_words(sweep: Path, cluster: Cluster, tmp_path: Path) -> None:
    never = tmp_path / "never"
    said = longclip("submit", sweep, "--set", "slurm.partition=mars", "--runs", never, cwd=sweep.parent, code=3)
    assert "invalid partition specified" in said and not never.exists()


def test_the_paper_s_sweep_is_accepted_on_pretend(cluster: Cluster, tmp_path: Path) -> None:
    """``submit experiments/longcap --dry-run``: four scripts, 1 node x 4 GPUs, taken by ``sbatch --test-only``."""
    (tmp_path / "pretend.yaml").write_text("partition: pretend\n")
    said = longclip(
        "submit", ROOT / "experiments" / "longcap", "--dry-run", "--site", tmp_path / "pretend.yaml", cwd=tmp_path
    )
    assert said.count("#!/bin/bash") == 4
    assert said.count("#SBATCH --nodes=1\n") == said.count("#SBATCH --gpus-per-node=4\n") == 4
    assert said.count("sbatch --test-only: Job") == 4 and said.count("to start at") == 4, said
