"""Canaries on the real cluster: a shape that passes lets its runs go, one that cannot work ends them in the queue."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from longclip.run.attempts import attempts_of
from longclip.run.folder import RunFolder, read_json
from longclip.run.journal import effective
from tests.conftest import Cluster
from tests.launch.small import longclip, make_sweep, the_run

SHORT = ("--set", "train.samples=240", "--set", "slurm.nodes=2", "--set", "slurm.tasks_per_node=1")


@pytest.fixture
def sweep(tmp_path: Path, cluster: Cluster) -> Iterator[Path]:
    yield make_sweep(tmp_path, (6,))
    subprocess.run("squeue -h -o %A | xargs -r scancel", shell=True, check=False)


def queue(columns: str = "%A") -> list[str]:
    done = subprocess.run(["squeue", "--noheader", f"--format={columns}"], capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


def empty(seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while left := queue("%i %j %T %r"):
        assert time.monotonic() < deadline, left
        time.sleep(1)


def status(runs: Path, label: str) -> dict[str, Any]:
    (row,) = json.loads(longclip("status", label, "--json", "--runs", runs, cwd=runs.parent))
    return dict(row)


def test_one_canary_a_shape_then_its_runs(sweep: Path, cluster: Cluster) -> None:
    """Two seeds have one shape: one canary, and both wait for it."""
    (sweep / "seed1.yaml").write_text("extends: ctx6.yaml\nname: seed1\ntrain: {seed: 1}\n")
    runs = sweep.parent / "runs"
    submit = ("submit", sweep, *SHORT, "--runs", runs, "--canary")
    longclip(*submit, cwd=sweep.parent)
    (folder,) = (runs / "small" / "canary").iterdir()
    canary = str(attempts_of(RunFolder(folder))[-1].job)
    waiting = [line for line in queue("%A %E") if "afterok" in line]
    assert len(queue()) == 3 and len(waiting) == 2 and all(f"afterok:{canary}" in line for line in waiting)
    assert "nothing to queue" in longclip(*submit, cwd=sweep.parent)
    empty(240)

    measures = read_json(folder / "canary.json")
    assert all(measures[k] > 0 for k in ("peak_gib", "step_seconds", "save_seconds")), measures
    assert not list(folder.glob("checkpoints/*")) and not (folder / "attempts" / "0001" / "journal.jsonl").exists()
    passed = (attempts_of(RunFolder(folder))[0].ended or {})["time"]
    for label in ("ctx6", "seed1"):
        run = the_run(runs, label)
        (attempt,) = attempts_of(run)
        assert status(runs, label)["state"] == "finished" and effective(run)[-1].samples == 240
        assert (attempt.started or {})["time"] > passed, "it waited"
    assert len(json.loads(longclip("status", "small", "--json", "--runs", runs, cwd=sweep.parent))) == 2

    # Another learning rate is another run, of a shape that has passed.
    (sweep / "lr.yaml").write_text("extends: ctx6.yaml\nname: lr\ntrain: {lr: 1e-3}\n")
    longclip("submit", sweep / "lr.yaml", *submit[2:], cwd=sweep.parent)
    assert "afterok" not in "".join(queue("%E")) and len(attempts_of(RunFolder(folder))) == 1


def test_a_shape_that_cannot_work_ends_its_runs(sweep: Path, cluster: Cluster) -> None:
    """The canary fails once; the run that waits leaves the queue, says why, and the next submit tries both again."""
    runs = sweep.parent / "runs"
    doomed = ("--set", 'engine.deepspeed={"zero_optimization": {"no_such_key": 1}}')
    submit = ("submit", sweep, *SHORT, "--runs", runs, "--canary")
    site = sweep.parent / "chain.yaml"
    site.write_text("restart: chain\nlinks: 1\n")  # the job queued behind must not begin either
    empty(120)  # of the test before
    longclip(*submit, *doomed, "--site", site, cwd=sweep.parent)
    assert len(queue()) == 3
    empty(120)
    row = status(runs, "ctx6")
    assert row["state"] == "rejected" and "its canary failed: job" in row["note"] and "no_such_key" in row["note"], row
    assert row["attempts"] == 1 and attempts_of(the_run(runs, "ctx6"))[0].started is None
    (folder,) = (runs / "small" / "canary").iterdir()
    assert len(attempts_of(RunFolder(folder))) == 1 and not (folder / "canary.json").exists()
    assert "no_such_key" in longclip("logs", folder, "--runs", runs, cwd=sweep.parent), "the command in the note"

    assert "resume" in longclip(*submit, cwd=sweep.parent)  # without the fault: another shape, another canary
    assert sum("afterok" in line for line in queue("%E")) == 1 and len(list(folder.parent.iterdir())) == 2


def test_a_canary_that_slurm_kills_says_so(sweep: Path, cluster: Cluster) -> None:
    """Too little memory: nobody could write a verdict, but Slurm left its words in the log."""
    runs = sweep.parent / "runs"
    longclip("submit", sweep, *SHORT, "--set", "slurm.mem_gb=0.15", "--runs", runs, "--canary", cwd=sweep.parent)
    empty(120)
    row = status(runs, "ctx6")
    assert row["state"] == "rejected" and "its canary failed" in row["note"] and "memory" in row["note"], row


def test_scancel_of_a_run_that_waits_is_no_fault_of_its_canary(sweep: Path, cluster: Cluster) -> None:
    runs = sweep.parent / "runs"
    never = ("--set", "slurm.partition=pretend", "--runs", runs, "--canary")
    longclip("submit", sweep, *never, cwd=sweep.parent)
    assert len(queue()) == 2
    subprocess.run(["scancel", str(attempts_of(the_run(runs, "ctx6"))[-1].job)], check=True)
    deadline = time.monotonic() + 20  # sacct lags by seconds
    while (row := status(runs, "ctx6"))["state"] != "cancelled" or "scancel" not in row["note"]:
        assert time.monotonic() < deadline, row
        time.sleep(1)
    assert len(queue()) == 1
    assert "(collect, canary or evaluate)" in longclip("cancel", "small", "--runs", runs, cwd=sweep.parent)
    empty(20)


def test_canaries_need_a_queue(tmp_path: Path) -> None:
    sweep = make_sweep(tmp_path, (4,))
    said = longclip("submit", sweep, "--on", "local", "--canary", cwd=tmp_path, code=2)
    assert "--canary is for Slurm's queue" in said and not (tmp_path / "runs").exists()
