"""What a run is said to be, from its record and the scheduler's word; and that reading it never fails."""

from __future__ import annotations

import io
import time
from pathlib import Path

import pytest
from rich.console import Console

from longclip import screen
from longclip.errors import SiteError, UserError
from longclip.launch.cancel import cancel_runs
from longclip.launch.scheduler import Word, Words
from longclip.launch.status import state_of, statuses
from longclip.run.attempts import Superseded, attempts_of, claim, new_attempt
from longclip.run.folder import RunFolder, find_runs, read_json, write_json
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
        (Word("FAILED"), "lost"),
        (Word("NODE_FAIL"), "lost"),
        (Word("GONE"), "lost"),
        (Word("CANCELLED", "by 0"), "cancelled"),
        (Word("UNKNOWN"), "unknown"),
    ],
)
def test_without_a_verdict_the_scheduler_is_believed(run: RunFolder, word: Word, state: str) -> None:
    add_attempt(run, 0)
    assert said(run, word) == state


@pytest.mark.parametrize("verdict", ["finished", "interrupted", "crashed", "diverged"])
def test_a_verdict_comes_first(run: RunFolder, verdict: str) -> None:
    end(add_attempt(run, 0), verdict, 100, START + 5)
    assert said(run, Word("RUNNING")) == verdict


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
