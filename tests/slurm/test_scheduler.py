"""What longclip asks Slurm's clients, and hands to them."""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from longclip.launch.scheduler import Word, ask
from longclip.launch.status import statuses
from longclip.run.folder import runs_of
from tests.conftest import Cluster
from tests.launch.small import longclip, make_sweep
from tests.slurm.test_cluster import sbatch, wait_until


def test_a_job_whose_id_is_not_known_hides_no_other(cluster: Cluster, tmp_path: Path) -> None:
    """sacct refuses a list with one id that is none, and a submit that was killed has left a job without id."""
    job = sbatch(tmp_path, "sleep 600", "--partition=pretend")
    subprocess.run(["scancel", job], check=True)
    wait_until("sacct", lambda: cluster.sacct([job]) == {job: "CANCELLED"})
    words = ask([job, "?"], [])
    assert words.jobs[job].state == "CANCELLED" and words.jobs[job].by_owner, words
    assert words.jobs["?"] == Word("GONE") and words.sources == "squeue, sacct"


def test_a_full_disk_stops_no_cancel_and_leaves_no_lock(cluster: Cluster, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", disk], capture_output=True)
    if mounted.returncode != 0:
        pytest.skip("mounting needs root")
    try:
        sweep = make_sweep(tmp_path, (4,))
        words = (sweep, "--set", "slurm.partition=pretend", "--runs", disk)
        longclip("submit", *words, cwd=tmp_path)
        filler = disk / "filler"
        with pytest.raises(OSError), filler.open("wb", buffering=0) as f:
            while True:
                f.write(bytes(1024))
        said = longclip("cancel", "small", "--runs", disk, cwd=tmp_path, code=3)
        assert "scancel" in said and "not recorded" in said and "longclip prune" in said, said
        wait_until("an empty queue", lambda: not subprocess.check_output(["squeue", "-h"]))
        (run,) = runs_of(disk)
        said = longclip("retry", run.name, "--runs", disk, cwd=tmp_path, code=3)
        assert "No space left on device" in said and "longclip prune" in said, said
        filler.unlink()
        assert "queued" in longclip("retry", run.name, "--runs", disk, cwd=tmp_path), "no lock is left"
        longclip("cancel", "small", "--runs", disk, cwd=tmp_path)
    finally:
        subprocess.run(["umount", "-l", disk], check=True)


def test_submit_from_inside_a_job(cluster: Cluster, tmp_path: Path) -> None:
    """salloc, a notebook: what that job was given is not the run's, whose srun would ask for its GPU."""
    sweep = make_sweep(tmp_path, (4,))
    one_rank = ("--set", "slurm.tasks_per_node=1", "--set", "train.samples=240")
    submit = [sys.executable, "-m", "longclip.cli", "submit", sweep, *one_rank, "--runs", tmp_path / "runs"]
    outer = sbatch(tmp_path, shlex.join(map(str, submit)), "--gpus-per-node=1", "--mem=1G", "--time=5")
    out = tmp_path / f"{outer}.out"
    wait_until("the submit", lambda: out.exists() and "queued" in out.read_text())
    (run,) = runs_of(tmp_path / "runs")

    def state() -> str:
        return statuses([run])[0][0].state

    wait_until("the run's end", lambda: state() not in ("queued", "running", "starting"), 120)
    assert state() == "finished", longclip("logs", run.name, "--runs", tmp_path / "runs", cwd=tmp_path)


def test_a_job_whose_submit_died_before_its_record_runs(cluster: Cluster, tmp_path: Path) -> None:
    """Submitit names what it has pickled after the job only when sbatch has answered."""
    sweep = make_sweep(tmp_path, (4,))
    site = tmp_path / "held.yaml"
    site.write_text("sbatch: {hold: true}\n")
    short = ("--set", "slurm.tasks_per_node=1", "--set", "train.samples=240")
    longclip("submit", sweep, *short, "--site", site, "--runs", tmp_path / "runs", cwd=tmp_path)
    (run,) = runs_of(tmp_path / "runs")
    (pickled,) = run.attempts.glob("0001/logs/*_submitted.pkl")
    pickled.rename(pickled.with_name(f"{'5eed' * 8}.pkl"))
    subprocess.run(["scontrol", "release", pickled.name.partition("_")[0]], check=True)
    wait_until("the run's end", lambda: statuses([run])[0][0].state not in ("queued", "running"), 120)
    assert statuses([run])[0][0].state == "finished"


def test_the_profile_is_not_overridden_from_the_shell(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To sbatch SBATCH_TIMELIMIT goes before the script's own line. Of what the script does not say it stays valid."""
    for name, value in (("TIMELIMIT", "7"), ("NO_REQUEUE", "1"), ("MEM_PER_CPU", "99M"), ("PARTITION", "pretend")):
        monkeypatch.setenv(f"SBATCH_{name}", value)
    monkeypatch.setenv("SQUEUE_PARTITION", "batch")
    sweep = make_sweep(tmp_path, (4,))
    longclip("submit", sweep, "--runs", tmp_path / "runs", cwd=tmp_path)
    (run,) = runs_of(tmp_path / "runs")
    (status,), _ = statuses([run])
    assert status.state == "queued", "squeue was asked for all partitions"
    said = subprocess.check_output(["scontrol", "show", "job", status.jobs[0]], text=True)
    subprocess.run(["scancel", status.jobs[0]], check=True)
    for fact in ("TimeLimit=00:20:00", "Requeue=1", "MinMemoryNode=2560M", "Partition=pretend"):
        assert f"{fact} " in said.replace("\n", " ").replace("2.50G", "2560M"), said


def test_a_chain_has_no_more_links_than_there_are_places(cluster: Cluster, tmp_path: Path) -> None:
    wait_until("an empty queue", lambda: not subprocess.check_output(["squeue", "-h"]))
    sweep = make_sweep(tmp_path, (4,))
    site = tmp_path / "chain.yaml"
    site.write_text("{restart: chain, links: 4, max_jobs: 3, partition: pretend}\n")
    assert "queued" in longclip("submit", sweep, "--site", site, "--runs", tmp_path / "runs", cwd=tmp_path)
    (run,) = runs_of(tmp_path / "runs")
    (status,), _ = statuses([run])
    assert len(status.jobs) == 3
    subprocess.run(["scancel", *status.jobs], check=True)
