"""What a run is said to be, from its record and the scheduler's word; and that reading it never fails."""

from __future__ import annotations

import io
import time
from pathlib import Path

import pytest
from rich.console import Console

from longclip import screen
from longclip.errors import SiteError, UserError
from longclip.launch import restart, worker
from longclip.launch.cancel import cancel_runs
from longclip.launch.scheduler import Word, Words
from longclip.launch.status import state_of, statuses
from longclip.run.attempts import Attempt, Superseded, attempts_of, claim, new_attempt
from longclip.run.folder import RunFolder, find_runs, read_json, write_json
from longclip.run.verdicts import INFRASTRUCTURE, stays, verdict_of
from tests.helpers import START, add_attempt, end, experiment, make_run


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return make_run(tmp_path, experiment())


def said(run: RunFolder, word: Word) -> str:
    return state_of(run, Words({"101": word}))[0]


@pytest.mark.parametrize(
    ("word", "state"),
    [
        (Word("PENDING", "Priority"), "queued"),
        (Word("RUNNING"), "running"),
        (Word("REQUEUE_HOLD"), "running"),
        (Word("SIGNALING"), "running"),
        (Word("A_STATE_OF_TOMORROW"), "running"),
        (Word("FAILED"), "killed"),
        (Word("NODE_FAIL"), "node failed"),
        (Word("TIMEOUT"), "timed out"),
        (Word("PREEMPTED"), "preempted"),
        (Word("OUT_OF_MEMORY"), "out of memory"),
        (Word("GONE"), "killed"),
        (Word("CANCELLED", "by 1000", by_owner=True), "cancelled"),
        (Word("CANCELLED", "by 0"), "interrupted"),
        (Word("UNKNOWN"), "unknown"),
    ],
)
def test_without_a_verdict_the_scheduler_is_believed(run: RunFolder, word: Word, state: str) -> None:
    add_attempt(run, 0)
    assert said(run, word) == state


@pytest.mark.parametrize("verdict", ["finished", "preempted", "crashed", "diverged", "no space"])
@pytest.mark.parametrize("word", ["GONE", "FAILED", "TIMEOUT", "COMPLETED"])
def test_of_what_has_ended_the_worker_s_verdict_comes_first(run: RunFolder, verdict: str, word: str) -> None:
    end(add_attempt(run, 0), verdict, 100, START + 5)
    assert said(run, Word(word)) == verdict


def test_a_requeued_job_is_queued_whatever_the_last_verdict(run: RunFolder) -> None:
    end(add_attempt(run, 0), "timed out", 100, START + 5)
    assert state_of(run, Words({"101": Word("PENDING", "BeginTime")})) == (
        "queued",
        "job 101: BeginTime; timed out at 100 samples",
    )


def test_a_preempted_run_is_not_said_to_go_on_while_nobody_can_be_asked(run: RunFolder) -> None:
    end(add_attempt(run, 0), "preempted", 100, START + 5)
    state, note = state_of(run, Words({}, complete=False))
    assert state == "unknown" and "preempted at 100 samples" in note


def test_scancel_by_the_owner_is_final_also_after_a_save(run: RunFolder) -> None:
    end(add_attempt(run, 0), "preempted", 100, START + 5)
    assert said(run, Word("CANCELLED", "by 1000", by_owner=True)) == "cancelled"


def test_a_job_that_nobody_recorded_is_found_by_its_folder(run: RunFolder) -> None:
    """The submit was killed between sbatch and its record."""
    attempt = new_attempt(run)
    write_json(attempt.path / "submitted.json", {"executor": "slurm", "job": None, "time": time.time() - 3600})
    words = Words({"77": Word("PENDING", "Priority")}, {str(run.path.resolve()): ["77"]})
    assert state_of(run, words) == ("queued", "job 77: Priority")


def test_a_job_that_sbatch_was_given_up_on_is_an_attempt_of_its_own(run: RunFolder) -> None:
    """ "Socket timed out": the attempt was recorded as rejected, and Slurm had taken the job."""
    attempt = new_attempt(run)
    write_json(attempt.path / "submitted.json", {"executor": "slurm", "job": None, "time": START})
    attempt.end("rejected", 0, "sbatch: error: Batch job submission failed: Socket timed out on send/recv operation")
    folder = str(run.path.resolve())
    words = Words({"77": Word("RUNNING")}, {folder: ["77"]})
    claimed = claim(run, attempt.number, "77", {})
    assert verdict_of(claimed) is None and state_of(run, words)[0] == "running"
    end(claimed, "preempted", 100, START + 5)
    assert stays(run) is None, "a later life of the job goes on"


@pytest.mark.parametrize(
    ("lines", "state"),
    [
        ("slurmstepd: error: *** STEP 101.0 ON n1 CANCELLED AT 2026-11-23T10:00:00 DUE TO TIME LIMIT ***", "timed out"),
        ("slurmstepd: error: *** JOB 101 ON n1 CANCELLED AT 2026-11-23T10:00:00 DUE TO PREEMPTION ***", "preempted"),
        ("slurmstepd: error: *** STEP 101.0 ON n1 CANCELLED AT 2026-11-23T10:00:00 DUE TO NODE FAILURE, SEE LOG ***",
         "node failed"),
        ("srun: error: Node failure on n2", "node failed"),
        ("slurmstepd: error: Detected 1 oom_kill event in StepId=101.0.", "out of memory"),
        ("slurmstepd: error: Step 101.0 exceeded memory limit (9 > 8), being killed", "out of memory"),
        ("srun: error: n2: task 1: Killed", "killed"),
        ("srun: error: n2: task 1: Killed\nslurmstepd: error: *** JOB 101 ON n1 CANCELLED AT 2026-11-23T10:00:00 "
         "DUE TO JOB REQUEUE ***", "killed"),
        ("slurmstepd: error: *** JOB 101 ON n1 CANCELLED AT 2026-11-23T10:00:00 DUE TO JOB REQUEUE ***", "interrupted"),
        ("slurmstepd: error: *** JOB 101 ON n1 CANCELLED AT 2026-11-23T10:00:00 ***", "cancelled"),
        ("a log that says nothing", "killed"),
    ],
)  # fmt: skip
def test_without_accounting_the_job_s_log_tells(run: RunFolder, lines: str, state: str) -> None:
    attempt = add_attempt(run, 0)
    (attempt.logs / "101_0_log.out").write_text(f"training\n{lines}\n")
    assert said(run, Word("GONE")) == state


def test_a_log_that_goes_on_after_a_requeue_is_read_by_attempt(run: RunFolder) -> None:
    first = add_attempt(run, 0)
    log = first.logs / "101_0_log.out"
    log.write_text("srun: error: Node failure on n2\n")
    second = claim(run, 2, "101", {"log": "../0001/logs/101_0_log.out", "log_start": log.stat().st_size})
    with log.open("a") as f:
        f.write("srun: error: n1: task 0: Killed\n")
    kinds = [v.kind for a in (first, second) if (v := verdict_of(Attempt(a.path)))]
    assert kinds == ["node failed", "killed"]


def test_a_job_that_died_before_python_started_says_so(run: RunFolder) -> None:
    attempt = new_attempt(run)
    write_json(attempt.path / "submitted.json", {"executor": "slurm", "job": "101", "time": time.time()})
    (attempt.logs / "101_0_log.out").write_text("slurm_script: line 9: conda: command not found\n")
    state, note = state_of(run, Words({"101": Word("FAILED")}))
    assert state == "crashed" and "conda: command not found" in note and "before its worker began" in note


def test_a_job_killed_for_memory_before_its_worker_began_says_so(run: RunFolder) -> None:
    """On a slow file system importing torch takes longer than Slurm takes to see how much memory it needs."""
    attempt = new_attempt(run)
    write_json(attempt.path / "submitted.json", {"executor": "slurm", "job": "101", "time": time.time()})
    said = (
        "slurmstepd-n1: error: StepId=101.0 exceeded memory limit (457072640 > 375390208), being killed\n"
        "slurmstepd-n1: error: *** STEP 101.0 ON n1 CANCELLED AT 2026-11-27T11:43:32 ***\n"
        "srun: error: n2: task 1: Killed\n"
    )
    (attempt.logs / "101_0_log.out").write_text(said)
    state, note = state_of(run, Words({"101": Word("FAILED")}))
    assert state == "out of memory" and "457072640 > 375390208" in note and "before its worker began" in note


def test_a_job_that_dies_at_import_is_left_to_a_person(run: RunFolder) -> None:
    """Not "killed", from which submit goes on by itself: it would die the same way, and no progress could end that."""
    attempt = new_attempt(run)
    write_json(attempt.path / "submitted.json", {"executor": "slurm", "job": "101", "time": time.time()})
    (attempt.logs / "101_0_log.out").write_text("srun: error: n2: task 1: Segmentation fault\n")
    state, note = state_of(run, Words({"101": Word("FAILED")}))
    assert state == "crashed" and "before its worker began: srun: error: n2: task 1: Segmentation fault" in note


# ---- whether a run goes on -----------------------------------------------------------------------------------------


def failed(run: RunFolder, kind: str, samples: int, resumed: int = 0, submitted: bool = False) -> None:
    number = len(attempts_of(run)) + 1
    attempt = add_attempt(run, number) if submitted else claim(run, number, "101", {})
    attempt.begin(resumed)
    if kind in INFRASTRUCTURE:
        attempt.end(kind, samples)
    else:
        attempt.fail(1, kind, samples, "boom", "Traceback")


@pytest.mark.parametrize(
    ("history", "goes_on"),
    [
        ([("crashed", 100, 0)], True),
        ([("crashed", 100, 0), ("crashed", 100, 0)], False),
        ([("crashed", 100, 0), ("crashed", 200, 0)], True),
        ([("crashed", 100, 0), ("preempted", 150, 0), ("crashed", 100, 0)], True),
        ([("preempted", 100, 0)] * 9, True),
        ([("node failed", 100, 0)] * 9, True),
        ([("out of memory", 100, 0), ("hung", 100, 0)], False),
        ([("crashed", 120, 100), ("crashed", 130, 100), ("crashed", 110, 100)], False),
        ([("crashed", 120, 100), ("crashed", 230, 200), ("crashed", 310, 300)], True),
        ([("diverged", 100, 0)], False),
        ([("bad input", 0, 0)], False),
        ([("no space", 100, 0)], False),
    ],
)
def test_own_failures_are_bounded_by_progress(
    run: RunFolder, history: list[tuple[str, int, int]], goes_on: bool
) -> None:
    for i, (kind, samples, resumed) in enumerate(history):
        failed(run, kind, samples, resumed, submitted=i == 0)
    assert (stays(run) is None) is goes_on
    failed(run, "crashed", history[-1][1], submitted=True)
    assert stays(run) is None, "a person who submits again begins the count anew"


@pytest.mark.parametrize(
    ("nodes", "begun", "goes_on"),
    [
        ([["n1"], ["n2"]], False, True),
        ([["n1"], ["n2"], ["n3"]], False, False),
        ([["n1"], ["n2"], ["n3"]], True, True),
        ([["n1", "n2"], ["n1", "n3"], ["n1", "n4"]], False, True),
    ],
)
def test_node_after_node_is_not_to_blame(run: RunFolder, nodes: list[list[str]], begun: bool, goes_on: bool) -> None:
    """A Python without CUDA sees no GPU on any node; with one node a run, no other is there to compare with."""
    for i, names in enumerate(nodes):
        attempt = claim(run, add_attempt(run, 0).number + 1 if i == 0 else i + 2, "101", {"nodes": names})
        if i == 0:
            end(Attempt(run.attempts / "0001"), "preempted", 0, START)
        if begun:
            attempt.begin(0)
        attempt.fail(0, "node failed", 0, f"node {names[0]} failed its preflight: 0 of 4 GPUs are to be seen", "")
    why = stays(run)
    assert (why is None) is goes_on, why
    if why:
        assert "3 nodes in a row failed the preflight" in why and "0 of 4 GPUs" in why
        assert said(run, Word("FAILED")) == "no progress"


def test_the_clock_knows_how_long_saves_take(monkeypatch: pytest.MonkeyPatch) -> None:
    """Slurm's signal has the lead of a first life, two minutes; a save of a minute asks for four."""
    now = time.time()
    monkeypatch.setenv("SUBMITIT_EXECUTOR", "slurm")
    monkeypatch.delenv("SLURM_JOB_END_TIME", raising=False)
    limit = restart.TimeLimit(240, now - 240 * 60 + 200, None)
    assert not limit.is_near() and limit.left == pytest.approx(200, abs=5)
    limit.saved(60)
    limit.saved(1)
    assert limit.lead == 240 and limit.is_near()
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(int(now + 3600)))
    assert not restart.TimeLimit(240, now, 60).is_near() and restart.TimeLimit(240, now, 2000).is_near()
    monkeypatch.delenv("SUBMITIT_EXECUTOR")
    assert not restart.TimeLimit(240, now, 2000).is_near(), "here there is none"


def test_the_first_rank_that_failed_is_blamed(run: RunFolder) -> None:
    attempt = add_attempt(run, 0)
    attempt.fail(1, "crashed", 100, "ValueError: the culprit", "")
    attempt.fail(0, "crashed", 100, "RuntimeError: Connection closed by peer", "")
    verdict = verdict_of(Attempt(attempt.path))
    assert verdict is not None and "rank 1" in verdict.message and "the culprit" in verdict.message


def test_an_attempt_in_sbatch_s_hands_is_not_submitted_again(run: RunFolder) -> None:
    attempt = new_attempt(run)
    write_json(attempt.path / "submitted.json", {"executor": "slurm", "job": None, "time": time.time()})
    assert state_of(run, Words()) == ("queued", "being submitted")
    write_json(attempt.path / "submitted.json", {"executor": "slurm", "job": None, "time": time.time() - 3600})
    assert state_of(run, Words()) == ("lost", "was never queued")


def test_a_late_job_of_an_older_attempt_is_fenced_off(run: RunFolder) -> None:
    first, second = new_attempt(run), new_attempt(run)
    claim(run, second.number, "102", {})
    with pytest.raises(Superseded):
        claim(run, first.number, "101", {})
    with pytest.raises(Superseded):
        first.fence()
    second.fence()


def test_a_requeued_job_gets_an_attempt_of_its_own(run: RunFolder) -> None:
    first = new_attempt(run)
    assert claim(run, first.number, "101", {}).number == 1
    assert claim(run, first.number, "101", {}).number == 2


def test_brackets_in_an_error_do_not_break_the_table(run: RunFolder) -> None:
    """gloo says '[/__w/pytorch/pair.cc:553] Connection closed by peer', which Rich would take for markup."""
    end(add_attempt(run, 0), "crashed", 100, START + 5, "RuntimeError: [/__w/pytorch/pair.cc:553] closed by peer [red]")
    text = io.StringIO()
    Console(file=text, width=300).print(screen.status_table([run]))
    assert "[/__w/pytorch/pair.cc:553] closed by peer [red]" in text.getvalue()


def test_a_process_on_another_machine_is_not_touched(run: RunFolder) -> None:
    attempt = add_attempt(run, 0)
    record = read_json(attempt.path / "submitted.json")
    write_json(attempt.path / "submitted.json", {**record, "executor": "local", "host": "elsewhere", "job": "1"})
    ((status,), _) = statuses([run])
    assert status.state == "unknown" and "elsewhere" in status.note
    with pytest.raises(SiteError, match="nothing was cancelled"):
        cancel_runs([run])
    assert not (attempt.path / "cancelled.json").exists()


def test_what_saved_on_another_machine_goes_on_here(run: RunFolder) -> None:
    """``srun longclip train`` ends with "saved; the same command goes on", and the next job has another node."""
    attempt = add_attempt(run, 0)
    record = read_json(attempt.path / "submitted.json")
    write_json(attempt.path / "submitted.json", {**record, "executor": "local", "host": "elsewhere", "job": "1"})
    end(attempt, "interrupted", 100, START + 5)
    ((status,), _) = statuses([run])
    assert status.state == "interrupted"


def test_two_sweeps_may_hold_the_same_run(tmp_path: Path) -> None:
    runs = [make_run(tmp_path, experiment(), sweep) for sweep in ("a", "b")]
    for run in runs:
        end(add_attempt(run, 0), "finished", 1000, START + 5)
    assert [s.state for s in statuses(runs)[0]] == ["finished", "finished"]
    with pytest.raises(UserError, match="more than one run"):
        find_runs(tmp_path, runs[0].name)
    assert [r.sweep for r in find_runs(tmp_path, f"b/{runs[0].name}")] == ["b"]


@pytest.mark.parametrize("target", ["/no/such/path", "tiny**", "[", "nothing", ""])
def test_odd_targets_are_a_user_s_mistake(run: RunFolder, target: str) -> None:
    with pytest.raises(UserError):
        find_runs(run.path.parents[1], target)


def test_torn_records_are_no_tracebacks(run: RunFolder) -> None:
    attempt = add_attempt(run, 0)
    (attempt.path / "ended.json").write_text('{"verdict": "fini')
    (attempt.path / "journal.jsonl").write_text(
        '{"t": 1, "step": 1, "samples": 100, "metrics": {"train/loss": 2}}\n{"t"'
    )
    write_json(attempt.path / "resumed.json", {"samples": 0})
    ((status,), _) = statuses([RunFolder(run.path)])
    assert status.samples == 100
    assert len(attempts_of(run)) == 1


def test_ranks_of_a_restarted_job_that_do_not_meet(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counts as a failure of its own, so that the job is started again, but not for ever."""
    for name, value in (("EXECUTOR", "slurm"), ("FOLDER", str(run.attempts / "0001/logs"))):
        monkeypatch.setenv(f"SUBMITIT_{name}", value)
    for name, value in (("JOB_ID", "101"), ("PROCID", "0"), ("RESTART_COUNT", "1")):
        monkeypatch.setenv(f"SLURM_{name}", value)
    monkeypatch.setattr(worker, "_attempt", None)
    claim(run, new_attempt(run).number, "101", {"nodes": ["n1"]})
    (run.attempts / ".requeued-101").touch()  # our own script did it
    attempts_of(run)[0].end("timed out", 500)
    mark = run.attempts / ".again-101"
    for tries, goes_on in ((2, True), (3, False)):
        worker.note_failure(run, 1, TimeoutError("only 1 of 2 ranks came"))
        monkeypatch.setattr(worker, "_attempt", None)
        assert len(attempts_of(run)) == tries and mark.exists() is goes_on
        assert (verdict := verdict_of(attempts_of(run)[-1])) is not None
        assert verdict.kind == "crashed" and "only 1 of 2 ranks came" in verdict.message
        (run.attempts / ".requeued-101").touch()
    assert "crashed twice" in str(stays(run))
    monkeypatch.setenv("SLURM_PROCID", "1")
    worker.note_failure(run, 1, TimeoutError("only 1 of 2 ranks came"))
    assert len(attempts_of(run)) == 3, "rank 0 says it for all"


def test_ranks_that_do_not_meet_are_tried_again(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a job's first life as in a later one; but what the user must mend is not."""
    for name, value in (("EXECUTOR", "slurm"), ("FOLDER", str(run.attempts / "0001/logs"))):
        monkeypatch.setenv(f"SUBMITIT_{name}", value)
    monkeypatch.setenv("SLURM_JOB_ID", "101")
    monkeypatch.setenv("SLURM_PROCID", "0")
    monkeypatch.setattr(worker, "_attempt", None)
    mark = run.attempts / ".again-101"
    new_attempt(run)
    worker.note_failure(run, 1, UserError("no tokenizer"))
    monkeypatch.setenv("SLURM_PROCID", "1")
    worker.note_failure(run, 1, SiteError("local rank 1 has no GPU"))
    assert not mark.exists() and (verdict := verdict_of(attempts_of(run)[0])) is not None, "told by the rank that knows"
    monkeypatch.setenv("SLURM_PROCID", "0")
    worker.note_failure(run, 1, TimeoutError("only 1 of 2 ranks came"))
    (attempt,) = attempts_of(run)
    assert mark.exists() and attempt.started is not None
    assert (verdict := verdict_of(attempt)) is not None and verdict.kind == "crashed"
