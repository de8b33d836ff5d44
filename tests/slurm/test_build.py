"""Shards built by a Slurm array: the same bytes as one process makes, also after the jobs were cancelled half-way."""

from __future__ import annotations

import re
import subprocess
import time
from pathlib import Path

from tests.conftest import Cluster
from tests.launch.small import longclip
from tests.longcap.corpus import write_corpus
from tests.longcap.test_build import build, progress_of, tree

OPTIONS = ("--shard-size", "4", "--val", "0.2", "--test", "0.2")


def queue_empty(dst: Path, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while left := subprocess.run(["squeue", "-h", "-o", "%i %T %r"], capture_output=True, text=True).stdout:
        logs = "".join(p.read_text() for p in dst.glob(".build/logs/*/*.out"))
        assert time.monotonic() < deadline, f"{left}\n{logs}"
        time.sleep(0.5)


def test_an_array_gives_the_same_bytes(tmp_path: Path, cluster: Cluster) -> None:
    src, dst = write_corpus(tmp_path / "src"), tmp_path / "out"
    (tmp_path / "site.yaml").write_text("mem_gb: 1.5\n")
    on_slurm = (*OPTIONS, "--on", "slurm", "--workers", "3", "--time", "00:10:00", "--site", tmp_path / "site.yaml")
    command = ("longcap", "build", src, dst, *on_slurm)

    said = longclip(*command, cwd=tmp_path)
    jobs = re.findall(r"\d+", re.search(r"queued ([\d, ]+):", said)[1])  # type: ignore[index]
    assert len(jobs) == 4, "units, arrange, shards, finish"
    assert "left alone: jobs" in longclip(*command, cwd=tmp_path)
    deadline = time.monotonic() + 120
    while not progress_of(dst):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    subprocess.run(["scancel", *jobs], check=True)
    queue_empty(dst, 60)
    assert not (dst / "manifest.json").exists()

    assert "queued" in longclip(*command, cwd=tmp_path)
    queue_empty(dst, 240)
    said = longclip(*command, cwd=tmp_path)
    assert "was built already" in said and "18 pairs" in said
    build(src, tmp_path / "here", *OPTIONS)
    assert tree(dst) == tree(tmp_path / "here")


def test_a_time_that_is_none_and_a_partition_that_is_none(tmp_path: Path, cluster: Cluster) -> None:
    src, dst = write_corpus(tmp_path / "src", 2), tmp_path / "out"
    said = build(src, dst, "--on", "slurm", "--time", "soon", code=2)
    assert "soon" in said
    (tmp_path / "site.yaml").write_text("partition: gone\n")
    said = build(src, dst, "--on", "slurm", "--site", tmp_path / "site.yaml", code=3)
    assert "Slurm does not take the job" in said and "Invalid partition" in said
    build(src, dst)
    assert (dst / "manifest.json").exists(), "and here it goes on"
