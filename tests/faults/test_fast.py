"""One fault of each kind, in a few minutes; test_full.py has the rest."""

import signal
import time
from collections.abc import Callable
from pathlib import Path

from tests.faults.trial import Record, Trial, popen, until, wrapper
from tests.launch.small import longclip

Make = Callable[..., Trial]


def test_a_signal_before_the_time_limit(trial: Make, undisturbed: Record) -> None:
    """USR2, as Slurm sends it to the step: saved at a step boundary, requeued by the batch script, nothing twice.

    The site's own lines neither end that script nor move it. The next life gets neither a sick node nor one that the
    site avoids: the requeue's TERM, which comes to all processes of the script, is in time to end the scontrol that
    says so.
    """
    one = trial(setup=["set -euo pipefail", "cd /"], sbatch={"exclude": "n4"})
    one.submit()
    one.wait_for(3_000)
    (one.run.attempts / ".exclude").write_text("n3")  # as a worker does that finds a sick node
    one.slurm("scancel", "--signal=USR2", one.job())
    until(lambda: len(one.attempts) == 2, 60, "the job's second life")
    assert "ExcNodeList=n4,n3\n" in one.slurm("scontrol", "show", "job", one.job())
    one.finished("USR2: saved, requeued by the batch script", undisturbed)
    assert one.verdicts() == ["preempted", "finished"] and one.recomputed() == [0]
    assert len({a.job for a in one.attempts}) == 1, "the same job"


def test_kill_9_of_a_rank(trial: Make, undisturbed: Record) -> None:
    one = trial()
    one.submit()
    one.wait_for(3_000)
    one.kill(1)
    one.finished("kill -9 of rank 1", undisturbed)
    assert one.verdicts() == ["killed", "finished"]


def test_a_chain_where_requeue_is_off(trial: Make, undisturbed: Record) -> None:
    """The next job begins when the first has ended; the ones behind find the run finished, and leave."""
    one = trial(restart="chain", links=2)
    assert "queued" in one.submit()
    first, *links = [one.job(), *one.attempts[0].submitted["links"]]  # type: ignore[index]
    assert len(links) == 2
    one.wait_for(3_000)
    one.slurm("scancel", "--signal=USR2", first)
    one.finished("USR2: the chain's next job goes on", undisturbed)
    assert [a.job for a in one.attempts] == [first, links[0]]
    until(lambda: not one.slurm("squeue", "-h", "-o", "%A").split(), 60, "the last link leaves")
    assert one.state() == "finished" and len(one.attempts) == 2
    until(lambda: one.cluster.sacct(links) == dict.fromkeys(links, "COMPLETED"), 20, "links COMPLETED by sacct")


def test_scancel_is_final(trial: Make) -> None:
    one = trial()
    one.submit()
    one.wait_for(1_000, checkpoint=False)
    one.slurm("scancel", one.job())
    row = one.wait_state("cancelled")
    assert "scancel" in row["note"], row
    time.sleep(5)
    assert not one.slurm("squeue", "-h").strip() and len(one.attempts) == 1
    assert "left alone" in one.submit() and "longclip retry continues it" in one.submit()


def test_an_exception_that_repeats_ends_the_run(trial: Make) -> None:
    """Tried again once, then left to a person; the note and the log name the first rank that failed."""
    one = trial({"engine.deepspeed": '{"zero_optimization": {"no_such_key": 1}}'})
    one.submit()
    row = one.wait_state("no progress")
    assert one.verdicts() == ["crashed", "crashed"] and "twice after 0 samples" in row["note"], row
    said = longclip("logs", "ctx6", "--runs", one.runs, cwd=one.sweep.parent)
    assert "Traceback" in said and "no_such_key" in said, said
    until(lambda: not one.slurm("squeue", "-h").strip(), 30, "the job has left")
    again = one.submit()
    assert "left alone" in again and "longclip retry continues it" in again


def test_nan_is_not_tried_again(trial: Make) -> None:
    one = trial({"train.weight_decay": 1e12})
    one.submit()
    row = one.wait_state("diverged")
    assert one.verdicts() == ["diverged"] and ("nan" in row["note"] or "inf" in row["note"]), row
    until(lambda: not one.slurm("squeue", "-h").strip(), 30, "the job has left")
    assert "left alone" in one.submit()


def test_two_submits_at_once(trial: Make, undisturbed: Record) -> None:
    one = trial({"slurm.partition": "pretend"})
    both = [popen(one.words(), one.sweep.parent) for _ in range(2)]
    said = [p.communicate(timeout=120)[0] for p in both]
    assert [p.returncode for p in both] == [0, 0], said
    waiting = one.slurm("squeue", "-h", "--partition=pretend").splitlines()
    assert len(waiting) == 1 and len(one.attempts) == 1, said


def test_submit_killed_between_sbatch_and_its_record(trial: Make, tmp_path: Path) -> None:
    """The job is in the queue and nobody wrote it down: status finds it, and the next submit leaves it alone."""
    one = trial({"slurm.partition": "pretend"})
    # submitit asks sbatch; this one answers only after its caller's caller is dead
    script = 'out=$("$real" "$@") || exit 1\n[ "$1" = --test-only ] || kill -9 $PPID\necho "$out"'
    wrapper(tmp_path / "bin", "sbatch", script)
    import os

    front = popen(one.words(), one.sweep.parent, PATH=f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    front.communicate(timeout=120)
    assert front.returncode == -signal.SIGKILL
    assert one.attempts[-1].submitted["job"] is None  # type: ignore[index]
    assert one.state() == "queued"
    assert "left alone" in one.submit() and len(one.slurm("squeue", "-h").splitlines()) == 1
    assert "scancel" in longclip("cancel", "ctx6", "--runs", one.runs, cwd=one.sweep.parent)
    until(lambda: not one.slurm("squeue", "-h").strip(), 20, "cancelled")
