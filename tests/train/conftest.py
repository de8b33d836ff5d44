"""Runs shared by the tests of this folder: starting processes costs more than the steps that they take."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
STAGES = (0, 1, 2, 3)
SAVED = "step-00000010"

Groups = dict[int, dict[str, dict[str, Any]]]
"""ranks -> label -> job, or its result"""


@pytest.fixture(scope="session")
def run_ranks(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Groups], Groups]:
    """Runs labelled jobs on groups of ranks, in processes of their own; the results under the same labels."""

    def run(groups: Groups) -> Groups:
        folder = tmp_path_factory.mktemp("ranks")
        asked = [
            {"ranks": size, "jobs": list(jobs.values()), "results": str(folder / f"{size}.json")}
            for size, jobs in groups.items()
        ]
        (folder / "groups.json").write_text(json.dumps(asked))
        env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE.parents[1])}
        command = [sys.executable, str(HERE / "train_worker.py"), str(folder / "groups.json")]
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr[-5000:]
        return {
            size: dict(zip(jobs, json.loads((folder / f"{size}.json").read_text()), strict=True))
            for size, jobs in groups.items()
        }

    return run


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the uninterrupted runs leave their checkpoints of step 10: ``<ranks>-<label>/step-00000010``."""
    return tmp_path_factory.mktemp("checkpoints")


@pytest.fixture(scope="session")
def trained(run_ranks: Callable[[Groups], Groups], checkpoints: Path) -> Groups:
    """Uninterrupted runs of 24 steps: all stages on 1, 2 and 4 ranks; some others on 2."""
    groups: Groups = {}
    for size in (1, 2, 4):
        groups[size] = {f"zero{stage}": {"do": "train", "stage": stage} for stage in STAGES}
        if size == 2:
            groups[size] |= {
                f"bf16 zero{stage}": {"do": "train", "stage": stage, "precision": "bf16"} for stage in (1, 2, 3)
            }
        for label, job in groups[size].items():
            job |= {"save_at": 10, "folder": str(checkpoints / f"{size}-{label}")}
        if size < 4:
            groups[size] |= {
                f"bound zero{stage}": {"do": "train", "stage": stage, "near_bound": True} for stage in STAGES
            }
        groups[size]["talk"] = {"do": "talk"}
        groups[size]["masked"] = {"do": "train", "stage": 2, "masked": True}
    groups[1] |= {f"diverge zero{stage}": {"do": "diverge", "stage": stage} for stage in STAGES}
    groups[2] |= {f"timeouts zero{stage}": {"do": "timeouts", "stage": stage} for stage in STAGES}
    groups[2]["wrong"] = {"do": "wrong", "stage": 1}
    return run_ranks(groups)


@pytest.fixture(scope="session")
def tmpfs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path | None]:
    """A file system of 3 MB; None where nothing may be mounted."""
    folder = tmp_path_factory.mktemp("small") / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(folder)]
    try:
        subprocess.run(mount, capture_output=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        yield None
        return
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.fixture
def small_disk(tmpfs: Path | None) -> Path:
    if tmpfs is None:
        pytest.skip("a small disk takes a mount, which is not allowed here")
    return tmpfs
