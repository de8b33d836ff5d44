"""Every kept checkpoint of a sweep, scored by a Slurm array: what is missing is queued, and nothing twice."""

from __future__ import annotations

import re
import time
from pathlib import Path

from longclip.run.checkpoints import WEIGHTS
from longclip.run.folder import read_json, runs_of
from tests.conftest import Cluster
from tests.launch.small import longclip, make_sweep
from tests.slurm.test_build import queue_empty

SUITE = "tasks:\n  pairs: {kind: retrieval, data: ../test, windows: [own, 7], probes: [kept]}\n"
SETS = ("train.samples=360", "slurm.tasks_per_node=1", "checkpoint.every=8 steps", "slurm.time='00:10:00'")


def test_all_kept_checkpoints_of_a_sweep(tmp_path: Path, cluster: Cluster) -> None:
    sweep = make_sweep(tmp_path, (5, 9))
    for window in (5, 9):
        words = (word for each in SETS for word in ("--set", each))
        longclip("train", sweep / f"ctx{window}.yaml", *words, cwd=tmp_path)
    (tmp_path / "suites").mkdir()
    (tmp_path / "suites" / "pairs.yaml").write_text(SUITE)
    command = ("evaluate", "small", "--suite", tmp_path / "suites" / "pairs.yaml", "--checkpoint", "all")
    runs = list(runs_of(tmp_path / "runs"))
    states = {(run.name, path.name) for run in runs for path in run.checkpoints.glob("step-*")}
    assert len(states) >= 4

    (tmp_path / "gone.yaml").write_text("partition: gone\n")
    said = longclip(*command, "--on", "slurm", "--site", tmp_path / "gone.yaml", cwd=tmp_path, code=3)
    assert "Slurm does not take the job" in said and "nvalid partition" in said

    said = longclip(*command, "--on", "slurm", cwd=tmp_path)
    (job,) = re.findall(rf"queued {len(states)} in (\d+);", said)
    again = longclip(*command, "--on", "slurm", cwd=tmp_path)
    busy = re.findall(rf"left alone: .*: job {job}_\d+ waits or runs", again)
    assert len(busy) + again.count("there already") == len(states) and busy and "queued" not in again, again
    queue_empty(tmp_path, 240)

    def records() -> dict[tuple[str, str], Path]:
        return {(run.name, f.stem): f for run in runs for f in (run.evaluations / "pairs").glob("*.json")}

    found = records()
    logs = "".join(p.read_text() for p in (tmp_path / "runs" / "small" / "evaluate" / "logs").glob("*.out"))
    assert set(found) == states, logs
    deadline = time.monotonic() + 20  # sacct lags by seconds
    tasks = [f"{job}_{i}" for i in range(len(states))]
    while set(cluster.sacct(tasks).values()) != {"COMPLETED"}:
        assert time.monotonic() < deadline, cluster.sacct(tasks)
        time.sleep(1)

    lost = sorted(found)[0]
    expected = read_json(found[lost])["tasks"]
    found[lost].unlink()
    said = longclip(*command, "--on", "slurm", cwd=tmp_path)
    assert "queued 1 in " in said and said.count("there already") == len(states) - 1, said
    said = longclip(*command, "--on", "slurm", cwd=tmp_path)
    assert said.count("left alone: ") == 1 and "queued" not in said, f"Submitit makes no array of one task: {said}"
    queue_empty(tmp_path, 120)
    assert read_json(records()[lost])["tasks"] == expected
    said = longclip(*command, "--on", "slurm", cwd=tmp_path)
    assert f"{len(states)} records; next: longclip collect small" in said

    records()[lost].unlink()
    weights = next(run for run in runs if run.name == lost[0]).checkpoints / lost[1] / f"{WEIGHTS}.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    assert "queued 1 in " in longclip(*command, "--on", "slurm", cwd=tmp_path)
    queue_empty(tmp_path, 120)
    said = longclip(*command, "--on", "slurm", cwd=tmp_path)
    assert re.search(rf"! failed before: .*{lost[1]}.*; the logs are in .*/evaluate/logs", said), said
