"""Submitting for real, on the local executor with two ranks: runs that end, continue, and are recognised."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from longclip.run.attempts import attempts_of
from longclip.run.folder import read_json, runs_of
from tests.launch.small import curve, environment, kill_after_checkpoint, longclip, make_sweep, the_run


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_sweep(tmp_path_factory.mktemp("local"))


@pytest.fixture(scope="module")
def whole(sweep: Path) -> Path:
    """Runs folder with ctx5 trained from start to end without a break; every step flushed."""
    runs = sweep.parent / "whole"
    said = longclip("submit", sweep / "ctx5.yaml", "--on", "local", "--runs", runs, cwd=sweep.parent)
    assert "all finished" in said
    return runs


def test_a_run_leaves_its_record(whole: Path) -> None:
    run = the_run(whole, "ctx5")
    assert [samples for samples, _ in curve(run)] == list(range(24, 1441, 24))
    assert [samples for samples, _ in curve(run, "val/mean_recall_at_1")] == [480, 960, 1440]
    test = read_json(run.evaluations / "test.json")
    assert test["metrics"]["pairs"] == 31
    assert test["context_length"] == 5
    (attempt,) = attempts_of(run)
    assert attempt.ended is not None and attempt.ended["verdict"] == "finished"
    losses = [loss for _, loss in curve(run)]
    assert losses[-1] < 0.9 * losses[0]


def test_a_second_submit_queues_nothing(sweep: Path, whole: Path) -> None:
    submit = ("submit", sweep / "ctx5.yaml", "--on", "local", "--runs", whole)
    assert "nothing to queue" in longclip(*submit, cwd=sweep.parent)
    for change in ("engine.zero_stage=3", "evaluate.batch=3", "slurm.time='1-00'"):
        said = longclip(*submit, "--set", change, cwd=sweep.parent)
        assert "left alone" in said and "nothing to queue" in said, said
    said = longclip(*submit, "--set", "train.lr=1e-3", "--dry-run", cwd=sweep.parent, code=None)
    assert "new" in said and "train.lr 0.002->0.001" in said, said
    assert len(list(runs_of(whole))) == 1


def test_killed_and_submitted_again_ends_the_same(sweep: Path, whole: Path) -> None:
    """kill -9 of everything after a checkpoint; the same submit continues, and no loss differs in a single bit."""
    runs = sweep.parent / "killed"
    submit = ["submit", sweep / "ctx5.yaml", "--on", "local", "--runs", runs]
    kill_after_checkpoint(list(submit), sweep.parent, runs, sample=600)
    assert "killed" in longclip("status", "small", "--runs", runs, cwd=sweep.parent)
    said = longclip(*submit, cwd=sweep.parent)
    assert "resume" in said, said
    run, reference = the_run(runs, "ctx5"), the_run(whole, "ctx5")
    first, second = attempts_of(run)
    assert first.ended is None and second.resumed_at is not None and 360 <= second.resumed_at < 1440
    assert curve(run) == curve(reference)
    assert curve(run, "train/grad_norm") == curve(reference, "train/grad_norm")
    assert curve(run, "val/mean_recall_at_1") == curve(reference, "val/mean_recall_at_1")
    test, expected = (read_json(r.evaluations / "test.json")["metrics"] for r in (run, reference))
    assert test == expected
    assert "nothing to queue" in longclip(*submit, cwd=sweep.parent)


def test_continues_on_other_ranks_and_another_stage(sweep: Path, whole: Path) -> None:
    runs = sweep.parent / "moved"
    submit = ["submit", sweep / "ctx5.yaml", "--on", "local", "--runs", runs]
    kill_after_checkpoint(list(submit), sweep.parent, runs, sample=400)
    longclip(*submit, "--set", "engine.zero_stage=3", "--set", "slurm.tasks_per_node=1", cwd=sweep.parent)
    moved, reference = curve(the_run(runs, "ctx5")), curve(the_run(whole, "ctx5"))
    assert [s for s, _ in moved] == [s for s, _ in reference]
    for (_, a), (_, b) in zip(moved, reference, strict=True):
        assert a == pytest.approx(b, rel=1e-5)


def test_one_process_without_a_queue(sweep: Path, whole: Path) -> None:
    """``longclip train``: no launcher, one rank; the same samples, so the same curve to rounding."""
    runs = sweep.parent / "direct"
    stage = ("--set", "engine.zero_stage=0", "--set", "slurm.tasks_per_node=1")
    said = longclip("train", sweep / "ctx5.yaml", *stage, "--runs", runs, cwd=sweep.parent)
    assert "finished" in said
    for (s, a), (t, b) in zip(curve(the_run(runs, "ctx5")), curve(the_run(whole, "ctx5")), strict=True):
        assert s == t and a == pytest.approx(b, rel=1e-5)


def test_in_this_process(sweep: Path) -> None:
    """``--on debug``: two runs after each other in the submitting process, on one rank."""
    runs = sweep.parent / "debug"
    words = ("--on", "debug", "--set", "slurm.tasks_per_node=1", "--set", "train.samples=240", "--runs", runs)
    longclip("submit", sweep / "ctx5.yaml", sweep / "ctx6.yaml", *words, cwd=sweep.parent)
    assert len(curve(the_run(runs, "ctx5"))) == len(curve(the_run(runs, "ctx6"))) == 10


def test_under_torchrun(sweep: Path, whole: Path) -> None:
    """Two ranks of torchrun are two ranks of Submitit: the same losses, bit for bit."""
    runs = sweep.parent / "torchrun"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m"]
    command += ["longclip.cli", "train", str(sweep / "ctx5.yaml"), "--runs", str(runs)]
    done = subprocess.run(command, cwd=sweep.parent, capture_output=True, text=True, timeout=240, env=environment())
    assert done.returncode == 0, done.stderr
    assert curve(the_run(runs, "ctx5")) == curve(the_run(whole, "ctx5"))


def test_no_thread_of_gloo_outlives_its_work(sweep: Path) -> None:
    """One that still drops a tensor while the interpreter ends aborts it (134), some 4 % of short runs."""
    names = "[open(f'/proc/self/task/{t}/comm').read().strip() for t in os.listdir('/proc/self/task')]"
    script = f"import atexit, os, runpy; atexit.register(lambda: print('threads:', {names})); "
    script += "runpy.run_module('longclip.cli', run_name='__main__', alter_sys=True)"
    runs = sweep.parent / "threads"
    words = ["train", str(sweep / "ctx5.yaml"), "--set", "train.samples=240", "--runs", str(runs)]
    for code in (0, 2):  # trained; and refused, for it is finished
        one = subprocess.run(
            [sys.executable, "-c", script, *words],
            cwd=sweep.parent,
            capture_output=True,
            text=True,
            timeout=240,
            env=environment(),
        )
        assert one.returncode == code, one.stderr
        assert "threads:" in one.stdout and "gloo" not in one.stdout.split("threads:")[1]


def test_a_crash_is_told_and_not_tried_again(sweep: Path) -> None:
    """An option that only DeepSpeed knows to be wrong: found by the worker, shown by status and logs."""
    runs = sweep.parent / "crashed"
    ask = ("--set", "engine.deepspeed={zero_optimization: {no_such_option: 1}}", "--on", "local", "--runs", runs)
    said = longclip("submit", sweep / "ctx4.yaml", *ask, cwd=sweep.parent, code=1)
    assert "crashed" in said and "longclip logs" in said
    assert "no_such_option" in longclip("logs", "ctx4", "--runs", runs, cwd=sweep.parent)
    again = longclip("submit", sweep / "ctx4.yaml", "--on", "local", "--runs", runs, cwd=sweep.parent)
    assert "longclip retry continues it" in again and "nothing to queue" in again
    retried = longclip("retry", "ctx4", "--on", "local", "--runs", runs, cwd=sweep.parent, code=1)
    assert "resume" in retried and len(attempts_of(the_run(runs, "ctx4"))) == 2


def test_one_curve_in_mlflow(sweep: Path, whole: Path) -> None:
    """The killed run and the whole one: the same points in MLflow, each step once."""
    from mlflow import MlflowClient

    killed = sweep.parent / "killed"
    histories = []
    for runs in (whole, killed):
        longclip("sync", "--runs", runs, cwd=sweep.parent)
        client = MlflowClient(f"sqlite:///{runs}/mlflow.db")
        (experiment,) = [e for e in client.search_experiments() if e.name == "small"]
        (run,) = client.search_runs([experiment.experiment_id], "tags.mlflow.parentRunId != ''")
        assert run.info.status == "FINISHED"
        history = client.get_metric_history(run.info.run_id, "train/loss")
        histories.append(sorted((m.step, m.value) for m in history))
    assert histories[0] == histories[1]
    assert [step for step, _ in histories[0]] == list(range(24, 1441, 24))
