"""Large sweeps: what one command asks of the scheduler does not grow with the number of runs."""

from __future__ import annotations

import os
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from longclip import submission
from longclip.launch.plan import plan
from longclip.launch.site import Site
from longclip.launch.submit import submit
from longclip.run.attempts import attempts_of
from longclip.run.folder import runs_of
from tests.conftest import Cluster
from tests.faults.trial import wrapper
from tests.launch.small import longclip, make_sweep

COMMANDS = ("sbatch", "squeue", "sacct", "scontrol", "sinfo", "sacctmgr")


@dataclass
class Calls:
    """The Slurm clients that commands have started, by name."""

    file: Path

    def since(self) -> Counter[str]:
        """Those since this was last asked."""
        names = self.file.read_text().split()
        self.file.write_text("")
        return Counter(names)


@pytest.fixture
def calls(cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Calls]:
    """Wrappers before the real commands; the queue is empty afterwards."""
    file = tmp_path / "calls"
    for name in COMMANDS:
        said = f'{name}$([ "$1" = --test-only ] && echo "$1")'
        wrapper(tmp_path / "bin", name, f'echo "{said}" >> {file}\nexec "$real" "$@"')
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    file.touch()
    yield Calls(file)
    subprocess.run("squeue -h -o %A | xargs -r scancel", shell=True, check=False)


def write_sweep(root: Path, seeds: int) -> Path:
    """A sweep of two windows times so many seeds, for a partition that takes jobs and starts none."""
    folder = make_sweep(root, ())
    grid = f"{{model.context_length: [4, 6], train.seed: {list(range(seeds))}}}"
    file = folder / "many.yaml"
    file.write_text(f"extends: _base.yaml\nslurm: {{partition: pretend}}\nsweep: {{grid: {grid}}}\n")
    return file


@pytest.mark.parametrize("runs", [(12, 24), pytest.param((20, 200), marks=pytest.mark.slow)])
def test_scheduler_calls_do_not_grow_with_the_runs(calls: Calls, tmp_path: Path, runs: tuple[int, int]) -> None:
    """One sbatch a run, and as many other calls for few runs as for many; the seconds are printed, not asserted."""
    for number in runs:
        where = tmp_path / f"runs{number}"
        words = ("submit", write_sweep(tmp_path / str(number), number // 2), "--runs", where)
        begun = time.monotonic()
        longclip(*words, cwd=tmp_path)
        submitted = time.monotonic()
        # All arms ask for the same nodes, time and memory.
        assert calls.since() == {"sbatch--test-only": 1, "sbatch": number} and len(list(runs_of(where))) == number
        asked = time.monotonic()
        assert longclip("status", "--runs", where, cwd=tmp_path).count("PartitionDown") == number
        seen = time.monotonic()
        assert calls.since() == {"squeue": 1}
        assert "nothing to queue" in longclip(*words, cwd=tmp_path)
        assert calls.since() == {"squeue": 1}
        print(f"{number} runs: submit {submitted - begun:.1f} s, status {seen - asked:.1f} s")


def test_each_shape_of_job_is_put_to_slurm(calls: Calls, tmp_path: Path) -> None:
    """What one arm alone asks for, and no node has, is refused before any arm is queued."""
    sweep = make_sweep(tmp_path, (4, 5, 6))
    with (sweep / "ctx6.yaml").open("a") as f:
        f.write("slurm: {mem_gb: 9999999}\n")
    pretend = ("--set", "slurm.partition=pretend", "--runs", tmp_path / "runs")
    said = longclip("submit", sweep, *pretend, cwd=tmp_path, code=3)
    assert "sbatch --test-only" in said and not (tmp_path / "runs").exists()
    assert calls.since() == {"sbatch--test-only": 2}


def test_what_another_submit_has_queued_since_the_plan_is_left_alone(calls: Calls, tmp_path: Path) -> None:
    """Both found all runs new; the second comes to the queue when the first has been through half of them."""
    from longclip.experiment.load import load

    site = Site(runs=tmp_path / "runs")
    loaded = load([write_sweep(tmp_path, 3)])
    first, second = plan(loaded, site), plan(loaded, site)
    assert [p.action for p in second] == ["new"] * 6
    jobs = [job for _, job, _ in (*submit(first[:3], site, "slurm"), *submit(second, site, "slurm"))]
    assert len(jobs) == len(set(jobs)) == 6 and all(len(attempts_of(p.run)) == 1 for p in first), "one job a run"
    # squeue: for the three whose record had changed, and for no others.
    assert calls.since() == {"sbatch--test-only": 2, "sbatch": 6, "squeue": 3}


# As Slurm 22.05 does at MaxSubmitJobs, also when only asked whether it would take the job.
FULL = """\
if [ "$(squeue -h -o %A | wc -l)" -ge 4 ]; then
  echo "sbatch: error: AssocMaxSubmitJobLimit" >&2
  said="Job violates accounting/QOS policy (job submit limit, user's size and/or time limits)"
  echo "sbatch: error: Batch job submission failed: $said" >&2
  exit 1
fi
exec "$real" "$@"
"""


@pytest.mark.parametrize("says", ["the profile", "sbatch"])
def test_what_the_site_has_no_room_for_waits(calls: Calls, tmp_path: Path, says: str) -> None:
    """Four of six go in; once there is room again the same submit queues the others, and nothing twice."""
    profile = tmp_path / "site.yaml"
    profile.write_text("max_jobs: 4\n" if says == "the profile" else "name: plain\n")
    (tmp_path / "bin" / "sbatch").unlink()
    if says == "sbatch":
        wrapper(tmp_path / "bin", "sbatch", FULL)
    words = ("submit", write_sweep(tmp_path, 3), "--site", profile, "--runs", tmp_path / "runs")
    said = longclip(*words, cwd=tmp_path)
    assert "(4 jobs)" in said and "2 runs wait" in said, said
    assert longclip("status", "--runs", tmp_path / "runs", cwd=tmp_path).count("waiting") == 2
    assert "2 runs wait" in longclip(*words, cwd=tmp_path), "the queue is still full"
    profile.write_text("name: plain\n")
    (tmp_path / "bin" / "sbatch").unlink(missing_ok=True)
    assert "(2 jobs)" in longclip(*words, cwd=tmp_path)
    assert len(subprocess.check_output(["squeue", "-h"]).splitlines()) == 6
    assert all(len(attempts_of(run)) == 1 for run in runs_of(tmp_path / "runs"))


def test_waiting_for_room_begins_nothing_again(calls: Calls, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``--wait``: two of four end badly while two wait; those two get their places, and nobody a second turn."""
    from longclip.experiment.load import load

    (tmp_path / "bin" / "sbatch").unlink()
    wrapper(tmp_path / "bin", "sbatch", FULL)
    site = Site(runs=tmp_path / "runs")
    plans = plan(load([write_sweep(tmp_path, 3)]), site)
    pauses = []

    def two_die(seconds: float) -> None:
        if seconds < 30:  # of others
            return
        pauses.append(seconds)
        for one in plans[:2]:
            (attempt,) = attempts_of(one.run)
            attempt.end("killed", 0, "out of luck")
            subprocess.run(["scancel", str(attempt.job)], check=True)

    monkeypatch.setattr(submission.time, "sleep", two_die)
    monkeypatch.setattr(submission.screen, "watch", lambda runs: None)
    assert submission.carry_out(plans, site, "slurm", wait=True) == 1
    assert len(pauses) == 1 and all(len(attempts_of(one.run)) == 1 for one in plans)
