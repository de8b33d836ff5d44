"""A collect job behind a sweep: it runs whatever becomes of the runs, and nothing stays in the queue."""

from __future__ import annotations

import re
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import pytest

from longclip.run.attempts import attempts_of
from longclip.run.folder import read_json
from tests.conftest import Cluster
from tests.launch.small import longclip, make_sweep, the_run

SHORT = ("--set", "train.samples=240", "--set", "slurm.tasks_per_node=1")
DOOMED = "extends: _base.yaml\nname: ctx6\nmodel: {context_length: 6}\n" + (
    "engine: {deepspeed: {zero_optimization: {no_such_key: 1}}}\n"
)


@pytest.fixture
def sweep(tmp_path: Path, cluster: Cluster) -> Iterator[Path]:
    yield make_sweep(tmp_path, (4, 6))
    subprocess.run("squeue -h -o %A | xargs -r scancel", shell=True, check=False)


def queue(columns: str = "%A") -> list[str]:
    done = subprocess.run(["squeue", "--noheader", f"--format={columns}"], capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


def collect_job(said: str) -> str:
    found = re.search(r"then collect: job (\d+)", said)
    assert found, said
    return found[1]


def test_collect_runs_though_a_run_fails_for_good(sweep: Path, cluster: Cluster) -> None:
    (sweep / "ctx6.yaml").write_text(DOOMED)
    runs = sweep.parent / "runs"
    submit = ("submit", sweep, *SHORT, "--collect", "--runs", runs)
    job = collect_job(longclip(*submit, cwd=sweep.parent))
    again = longclip(*submit, cwd=sweep.parent)
    assert "nothing to queue" in again and collect_job(again) == job and len(queue()) == 3

    deadline = time.monotonic() + 240
    while left := queue("%i %T %r"):
        assert time.monotonic() < deadline, left
        time.sleep(1)
    deadline = time.monotonic() + 20  # sacct lags by seconds
    while (state := cluster.sacct([job])) != {job: "COMPLETED"}:
        assert time.monotonic() < deadline, state
        time.sleep(1)
    assert len(attempts_of(the_run(runs, "ctx6"))) == 2, "it was tried again, and the collect job waited for that too"

    folder = runs / "small" / "collect"
    log = (folder / f"{job}.out").read_text()
    assert re.search(r"! ctx6: unfinished \(0/240\), crashed: .*no_such_key", log, re.DOTALL), log
    table = pd.read_csv(folder / "table.csv").set_index("run")
    assert table.loc["ctx4", "state"] == "finished" and "unfinished" in table.loc["ctx6", "state"]
    assert "no progress" in longclip("status", "ctx6", "--runs", runs, cwd=sweep.parent)
    assert "no job to wait for" in longclip(*submit, cwd=sweep.parent)


def test_it_waits_for_what_is_queued_later_and_goes_with_the_sweep(sweep: Path, cluster: Cluster) -> None:
    runs = sweep.parent / "runs"
    never = ("--set", "slurm.partition=pretend", "--collect", "--runs", runs)
    job = collect_job(longclip("submit", sweep / "ctx4.yaml", *never, cwd=sweep.parent))
    assert collect_job(longclip("submit", sweep, *never, cwd=sweep.parent)) == job
    both = {str(attempts_of(the_run(runs, f"ctx{w}"))[-1].job) for w in (4, 6)}
    (waits_for,) = [line.partition(" ")[2] for line in queue("%A %E") if line.startswith(job)]
    assert set(re.findall(r"afterany:(\d+)", waits_for)) == both, waits_for

    record = runs / "small" / "collect" / "submitted.json"
    assert read_json(record)["job"] == job
    record.unlink()  # as if submit had been killed before it could write it: the job is known by its folder
    assert f"scancel {job}" not in longclip("cancel", "ctx4", "--runs", runs, cwd=sweep.parent)
    assert f"scancel {job}" in longclip("cancel", "small", "--runs", runs, cwd=sweep.parent)
    deadline = time.monotonic() + 20
    while left := queue("%i %T %r"):
        assert time.monotonic() < deadline, left
        time.sleep(1)


def test_collect_needs_a_queue(tmp_path: Path) -> None:
    sweep = make_sweep(tmp_path, (4,))
    said = longclip("submit", sweep, "--on", "local", "--collect", cwd=tmp_path, code=2)
    assert "--collect is for Slurm's queue" in said and not (tmp_path / "runs").exists()
