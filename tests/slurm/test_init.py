"""A child waits in the real queue for the run that it begins from, and begins when that has finished."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from longclip.run.attempts import attempts_of
from longclip.run.folder import read_json
from tests.conftest import Cluster
from tests.launch.small import longclip, make_sweep, the_run
from tests.slurm.test_canary import empty, queue
from tests.train.test_warm import CHILD, PARENT


@pytest.fixture
def sweep(tmp_path: Path, cluster: Cluster) -> Iterator[Path]:
    sweep = make_sweep(tmp_path, ())
    (sweep / "parent.yaml").write_text(PARENT)
    (sweep / "child.yaml").write_text(CHILD)
    yield sweep
    subprocess.run("squeue -h -o %A | xargs -r scancel", shell=True, check=False)


@pytest.mark.slow
def test_a_child_is_queued_behind_its_parent(sweep: Path) -> None:
    """One submit of both; a second submit queues nothing; the child's weights are its parent's."""
    runs = sweep.parent / "runs"
    submit = ("submit", sweep, "--set", "slurm.tasks_per_node=1", "--runs", runs)
    longclip(*submit, cwd=sweep.parent)
    parent, child = the_run(runs, "ctx77"), the_run(runs, "ctx512")
    job = attempts_of(parent)[-1].job
    assert any(f"afterok:{job}" in line for line in queue("%A %E"))
    assert "nothing to queue" in longclip(*submit, cwd=sweep.parent)
    empty(300)
    assert read_json(child.path / "origin.json")["run"] == parent.name
    assert (attempts_of(child)[-1].ended or {})["verdict"] == "finished"
