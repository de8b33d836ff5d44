"""What ``longclip logs`` shows of records that runs have left, and of a run that goes on while it is looked at."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from longclip.errors import UserError
from longclip.launch import logs
from longclip.run.attempts import Attempt, claim
from longclip.run.folder import RunFolder, read_json, write_json
from tests.helpers import START, add_attempt, end, experiment, make_run, train
from tests.launch.small import environment, longclip


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return make_run(tmp_path / "runs", experiment())


def say(attempt: Attempt, rank: int, *lines: str) -> None:
    with (attempt.logs / f"{attempt.job}_{rank}_log.out").open("a") as f:
        f.writelines(f"{line}\n" for line in lines)


def tail(run: RunFolder, rank: int = 0, attempt: int | None = None, lines: int = 40) -> str:
    return "\n".join(logs.tail(run, rank, attempt, lines))


def test_the_newest_attempt_s_last_lines_unless_told_otherwise(run: RunFolder) -> None:
    first = add_attempt(run, 0)
    say(first, 0, *(f"first {i}" for i in range(100)))
    say(first, 1, "another rank")
    end(first, "interrupted", 400, 60)
    say(add_attempt(run, 100), 0, "second")
    assert "second" in tail(run) and "first" not in tail(run)
    said = tail(run, attempt=1, lines=3)
    assert "first 99" in said and "first 97" in said and "first 96" not in said and "interrupted" in said
    assert "another rank" in tail(run, rank=1, attempt=1)


def test_what_is_not_there_is_a_user_s_mistake(run: RunFolder) -> None:
    with pytest.raises(UserError, match="has not been submitted yet"):
        tail(run)
    first = add_attempt(run, 0)
    say(first, 0, "a line")
    with pytest.raises(UserError, match=r"no log of rank 7; it has \[0\]"):
        tail(run, rank=7)
    with pytest.raises(UserError, match="has no attempt 9; it has 1 to 1"):
        tail(run, attempt=9)
    add_attempt(run, 100)
    with pytest.raises(UserError, match="--attempt 1 shows the one before"):
        tail(run)


def test_the_rank_that_failed_first_is_blamed(run: RunFolder) -> None:
    attempt = add_attempt(run, 0)
    for rank, when, what in ((0, 30.0, "connection closed by peer"), (3, 20.0, "CUDA error"), (1, 25.0, "closed too")):
        record = {"rank": rank, "host": f"n{rank}", "kind": "crashed", "samples": 100, "time": START + when}
        write_json(
            attempt.path / f"failed-{rank:04d}.json",
            {**record, "message": what, "traceback": f"Traceback ...\n{what}\n"},
        )
    (attempt.path / "failed-0002.json").write_text('{"rank": 2, "ti')  # killed as it wrote
    said = tail(run)
    assert "first to fail: rank 3 on n3" in said and "CUDA error" in said and "closed" not in said


def test_the_stacks_of_a_hang(run: RunFolder) -> None:
    attempt = add_attempt(run, 0)
    for rank in (0, 2):
        (attempt.path / f"stacks-{rank:04d}.txt").write_text(f"File loop.py of rank {rank}\n")
    assert "of rank 0" in tail(run) and "stacks-0002.txt" in tail(run) and "of rank 2" not in tail(run)
    assert "of rank 2" in tail(run, rank=2)


def test_a_requeued_job_writes_where_it_began(run: RunFolder) -> None:
    first = add_attempt(run, 0)
    say(first, 0, "before the requeue")
    log = first.logs / "101_0_log.out"
    place = {"log": f"../0001/logs/{log.name}", "log_start": log.stat().st_size}
    claim(run, first.number, str(first.job), {"nodes": ["n3"], "ranks": 2, **place})
    say(first, 0, "after the requeue")
    assert "after the requeue" in tail(run) and "before" not in tail(run)
    assert "before the requeue" in tail(run, attempt=1) and "after" not in tail(run, attempt=1)
    assert "attempt 1" in next(logs.around(run, 0, None, 4, "before the"))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_the_points_before_a_loss_that_is_no_number(run: RunFolder, bad: float) -> None:
    attempt = add_attempt(run, 0)
    train(attempt, 0, 2000, 60, losses={2000: bad}, val={1900: 0.2})
    say(attempt, 0, "finance is not a number either", "2000: loss nan", "and then")
    end(attempt, "diverged", 2000, 300)
    end(add_attempt(run, 400), "crashed", 0, 500)  # newer, and without it
    said = list(logs.around(run, 0, None, 40, "nan"))
    table = [line for line in said if ":" in line and line.split()[-1] == "-" and "==>" not in line]
    samples = [int(line.lstrip("> ").split()[2].replace(",", "")) for line in table]
    assert samples == list(range(1000, 2001, 100)), "ten points and the one"
    assert table[-1].startswith(">") and str(bad) in table[-1]
    assert "> 2000: loss nan" in said and "  finance is not a number either" in said
    assert said[-1].startswith("next: longclip retry")


def test_around_other_things(run: RunFolder) -> None:
    attempt = add_attempt(run, 0)
    train(attempt, 0, 1000, 60)
    say(attempt, 0, *(f"line {i}" for i in range(50)))
    said = "\n".join(logs.around(run, 0, None, 4, "LINE 20"))
    assert "> line 20" in said and "line 18" in said and "line 22" in said and "line 17" not in said
    assert any(line.startswith(">") and " 600 " in line for line in logs.around(run, 0, None, 4, "550"))
    with pytest.raises(UserError, match="neither the journal nor the log of rank 0 has 'nan'"):
        list(logs.around(run, 0, None, 4, "nan"))
    with pytest.raises(UserError, match="in attempt 1"):
        list(logs.around(run, 0, 1, 4, "no such thing"))


# ---- following ---------------------------------------------------------------------------------------------------


@pytest.fixture
def running(run: RunFolder) -> Iterator[tuple[Attempt, subprocess.Popen[bytes]]]:
    """An attempt whose job is a process of this machine that lives until it is told to end."""
    attempt = add_attempt(run, 0)
    program = "import sys; sys.stdin.read()  # longclip"
    with subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE) as job:
        local(attempt, job)
        yield Attempt(attempt.path), job
        job.kill()


def local(attempt: Attempt, job: subprocess.Popen[bytes]) -> None:
    record = read_json(attempt.path / "submitted.json")
    record |= {"executor": "local", "host": socket.gethostname(), "job": str(job.pid)}
    write_json(attempt.path / "submitted.json", record)


class Following:
    """``longclip logs RUN -f`` in a process of its own; ``until`` waits for a line."""

    def __init__(self, run: RunFolder) -> None:
        words = [sys.executable, "-u", "-m", "longclip.cli", "logs", str(run.path), "-f"]
        self.out = run.path.parents[1] / "followed"
        with self.out.open("w") as out:
            self.process = subprocess.Popen(words, stdout=out, stderr=subprocess.STDOUT, env=environment())

    def until(self, text: str) -> None:
        deadline = time.monotonic() + 30
        while text not in self.out.read_text():
            assert time.monotonic() < deadline and self.process.poll() is None, self.out.read_text()
            time.sleep(0.05)

    def end(self) -> tuple[int, str]:
        return self.process.wait(30), self.out.read_text()


def test_follows_from_attempt_to_attempt_until_the_end(
    run: RunFolder, running: tuple[Attempt, subprocess.Popen[bytes]]
) -> None:
    first, job = running
    say(first, 0, "an old line")
    following = Following(run)
    following.until("an old line")
    say(first, 0, "a new line")
    following.until("a new line")
    say(first, 0, "its last line")
    second = add_attempt(run, 100)
    local(second, job)
    end(first, "interrupted", 400, 60)
    following.until("attempt 2")
    assert "running" in following.out.read_text(), "changes of state are told"
    second = Attempt(second.path)
    say(second, 0, "goes on")
    following.until("goes on")
    with (second.logs / f"{second.job}_0_log.out").open("a") as f:
        f.write("no newline at the end")
    end(second, "finished", 1000, 160)
    code, said = following.end()
    assert code == 0, said
    order = ["an old line", "a new line", "its last line", "attempt 2", "goes on", "no newline at the end", "finished"]
    places = [said.index(word) for word in order]
    assert places == sorted(places) and all(said.count(word) == 1 for word in order[:-1]), said


def test_following_ends_with_a_run_that_crashed(
    run: RunFolder, running: tuple[Attempt, subprocess.Popen[bytes]]
) -> None:
    first, job = running
    following = Following(run)
    following.until("attempt 1")
    end(first, "crashed", 400, 60, "CUDA error")
    job.kill()
    code, said = following.end()
    assert code == 0 and "crashed" in said.splitlines()[-1] and "CUDA error" in said, said


def test_ctrl_c_is_quiet(run: RunFolder, running: tuple[Attempt, subprocess.Popen[bytes]]) -> None:
    say(running[0], 0, "a line")
    following = Following(run)
    following.until("a line")
    following.process.send_signal(signal.SIGINT)
    code, said = following.end()
    assert code == 130 and all(line == "a line" or line.startswith("==> ") for line in said.splitlines()), said


def test_in_a_pipe(run: RunFolder) -> None:
    attempt = add_attempt(run, 0)
    say(attempt, 0, *("x" * 200 for _ in range(5000)))
    command = f"{sys.executable} -m longclip.cli logs {run.path} -n 5000 | head -n 3"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, env=environment())
    assert len(done.stdout.splitlines()) == 3 and done.stderr == ""
    assert done.stdout.splitlines()[2] == "x" * 200, "no wrapping"


def test_options_that_contradict_each_other(run: RunFolder) -> None:
    add_attempt(run, 0)
    said = longclip("logs", run.path, "-f", "--attempt", "1", cwd=run.path, code=2)
    assert "-f follows the newest attempt" in said
