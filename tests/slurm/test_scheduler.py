"""What longclip asks Slurm's clients, and hands to them."""

from __future__ import annotations

import subprocess
from pathlib import Path

from longclip.launch.scheduler import Word, ask
from tests.conftest import Cluster
from tests.slurm.test_cluster import sbatch, wait_until


def test_a_job_whose_id_is_not_known_hides_no_other(cluster: Cluster, tmp_path: Path) -> None:
    """sacct refuses a list with one id that is none, and a submit that was killed has left a job without id."""
    job = sbatch(tmp_path, "sleep 600", "--partition=pretend")
    subprocess.run(["scancel", job], check=True)
    wait_until("sacct", lambda: cluster.sacct([job]) == {job: "CANCELLED"})
    words = ask([job, "?"], [])
    assert words.jobs[job].state == "CANCELLED" and words.jobs[job].by_owner, words
    assert words.jobs["?"] == Word("GONE") and words.sources == "squeue, sacct"
