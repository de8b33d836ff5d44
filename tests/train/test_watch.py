"""A rank that stops is found and named by the others; what is only slow, or was only suspended, is left alone."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from longclip.run.folder import read_json
from longclip.train.watch import HUNG_EXIT_CODE

HERE = Path(__file__).parent
FLOOR = 1.5
"""seconds; the limit of a watch that has seen short steps only"""
PATIENCE = 90.0


class Group:
    """Ranks under way in an attempt's folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def until(self, what: Callable[[], bool]) -> None:
        deadline = time.monotonic() + PATIENCE
        while not what():
            assert time.monotonic() < deadline, (self.folder / "log.txt").read_text()
            time.sleep(0.05)

    def who(self) -> list[tuple[int, str, int]]:
        """Rank, node and process id, once all have met."""
        self.until((self.folder / "started.json").exists)
        return [tuple(w) for w in read_json(self.folder / "started.json")["who"]]

    def samples(self) -> int:
        file = self.folder / "heartbeat.json"
        return int(read_json(file)["samples"]) if file.exists() else 0

    def under_way(self) -> None:
        self.who()
        self.until(lambda: self.samples() >= 50)

    def stacks(self) -> set[str]:
        return {path.name for path in self.folder.glob("stacks-*")}

    def ended(self) -> dict[str, Any]:
        self.until((self.folder / "ended.json").exists)
        return read_json(self.folder / "ended.json")

    def codes(self) -> list[int]:
        """Exit codes, once all have left."""
        self.until((self.folder / "codes.json").exists)
        return list(read_json(self.folder / "codes.json")["codes"])

    def finish(self) -> None:
        (self.folder / "enough").touch()
        assert set(self.codes()) == {0}
        assert self.ended()["verdict"] == "finished"


@pytest.fixture(scope="module")
def groups() -> Iterator[subprocess.Popen[str]]:
    """A process that makes groups of ranks; it has imported torch once for all of them."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE.parents[1])}
    command = [sys.executable, str(HERE / "watch_worker.py")]
    process = subprocess.Popen(command, env=env, stdin=subprocess.PIPE, text=True, start_new_session=True)
    yield process
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@pytest.fixture
def start(tmp_path: Path, groups: subprocess.Popen[str]) -> Callable[..., Group]:
    def begin(ranks: int, **asked: Any) -> Group:
        folder = tmp_path / "attempts" / "0002"
        folder.mkdir(parents=True)
        assert groups.stdin is not None
        groups.stdin.write(json.dumps({"folder": str(folder), "ranks": ranks, "floor": FLOOR, **asked}) + "\n")
        groups.stdin.flush()
        return Group(folder)

    return begin


def test_a_stopped_rank_is_named_and_does_no_harm_when_it_wakes(start: Callable[..., Group]) -> None:
    group = start(3)
    group.under_way()
    _, node, pid = group.who()[1]
    os.kill(pid, signal.SIGSTOP)
    ended = group.ended()
    samples = ended["samples"]
    assert ended["verdict"] == "hung"
    assert ended["message"] == (
        f"rank 1 ({node}, pid {pid}) does not answer; last step at {samples:,} samples; "
        "stacks: attempts/0002/stacks-*.txt (says rank 0)"
    )
    assert node == "n2" and samples >= 50
    for rank in (0, 2):
        stacks = (group.folder / f"stacks-{rank:04d}.txt").read_text()
        assert f"rank {rank} (n{rank + 1}, pid {group.who()[rank][2]})" in stacks
        assert "in sum_across" in stacks or "in agree" in stacks

    time.sleep(FLOOR)
    os.kill(pid, signal.SIGCONT)
    codes = group.codes()
    assert codes[0] == codes[2] == HUNG_EXIT_CODE
    assert codes[1] not in (0, HUNG_EXIT_CODE)
    assert group.stacks() == {"stacks-0000.txt", "stacks-0002.txt"}
    assert group.ended() == ended


def test_what_comes_back_after_the_verdict_does_not_answer(tmp_path: Path) -> None:
    """Others' stacks are there, but so is the verdict: half a floor of silence on the way out is no hang."""
    (tmp_path / "stacks-0000.txt").write_text("rank 0 after 50 samples waits in sum_across\n")
    (tmp_path / "ended.json").write_text("{}")
    script = f"""
import time
from pathlib import Path
from longclip.train.watch import STARTING_BEATS, Watch, Who
with Watch(Path({str(tmp_path)!r}), 1, [Who(0, "n1", 1), Who.here(1)], {FLOOR}, print) as watch:
    for beat in range(STARTING_BEATS + 1):
        watch.beat(beat)
        time.sleep(0.2)
    time.sleep(0.8 * {FLOOR})
    raise SystemExit(3)
"""
    assert subprocess.run([sys.executable, "-c", script], timeout=PATIENCE).returncode == 3
    assert not (tmp_path / "stacks-0001.txt").exists()


def test_rank_0_may_be_the_one(start: Callable[..., Group]) -> None:
    group = start(2)
    group.under_way()
    os.kill(group.who()[0][2], signal.SIGSTOP)
    message = group.ended()["message"]
    assert message.startswith(f"rank 0 (n1, pid {group.who()[0][2]}) does not answer; ")
    assert message.endswith("(says rank 1)")


def test_a_collective_that_fails_in_the_end_does_not_hide_the_hang(start: Callable[..., Group]) -> None:
    group = start(2)
    group.under_way()
    pid = group.who()[1][2]
    os.kill(pid, signal.SIGSTOP)
    group.until(lambda: "stacks-0000.txt" in group.stacks())
    os.kill(pid, signal.SIGKILL)
    assert group.codes() == [HUNG_EXIT_CODE, -signal.SIGKILL]
    assert group.ended()["verdict"] == "hung"


def test_a_rank_that_waits_elsewhere_comes_first(start: Callable[..., Group]) -> None:
    group = start(3, stays=[[10, 2, 1000.0]])
    assert group.codes() == [HUNG_EXIT_CODE] * 3
    message = group.ended()["message"]
    assert "all ranks answer; they wait in: __main__.stay:" in message
    first, second = message.partition("they wait in: ")[2].split("; ")[:2]
    assert first.endswith("(rank 2)")
    assert second.startswith("longclip.train.ranks.sum_across:") and second.endswith("(ranks 0, 1)")
    assert "> torch.distributed." in second
    assert "100 samples" in message


def test_slow_is_not_hung(start: Callable[..., Group]) -> None:
    """A first step of more than twice the floor, and a later one of three quarters of it."""
    group = start(2, stays=[[0, 1, 2.6 * FLOOR], [10, 1, 0.75 * FLOOR]])
    group.until(lambda: group.samples() > 200)
    group.finish()
    assert group.stacks() == set()


def test_the_limit_grows_with_what_steps_take(start: Callable[..., Group]) -> None:
    group = start(2, stays=[[10, 1, FLOOR / 2], [20, 1, 4 * FLOOR]])
    group.until(lambda: group.samples() > 220)
    group.finish()
    assert group.stacks() == set()


def test_a_suspended_job_goes_on(start: Callable[..., Group]) -> None:
    """``scontrol suspend`` stops all ranks, not in the same moment; the time that they lose is nobody's silence."""
    group = start(2)
    group.under_way()
    first, second = (pid for _, _, pid in group.who())
    os.kill(second, signal.SIGSTOP)
    time.sleep(FLOOR / 5)
    os.kill(first, signal.SIGSTOP)
    time.sleep(1.5 * FLOOR)
    os.kill(first, signal.SIGCONT)
    time.sleep(FLOOR / 3)
    assert group.stacks() == set()
    os.kill(second, signal.SIGCONT)
    seen = group.samples()
    group.until(lambda: group.samples() > seen + 50)
    group.finish()


def test_a_rank_that_comes_back_in_time_is_forgiven(start: Callable[..., Group]) -> None:
    group = start(2)
    group.under_way()
    pid = group.who()[1][2]
    os.kill(pid, signal.SIGSTOP)
    group.until(lambda: "stacks-0000.txt" in group.stacks())
    os.kill(pid, signal.SIGCONT)
    seen = group.samples()
    group.until(lambda: group.samples() > seen + 50)
    assert group.stacks() == set()
    group.finish()


def test_the_heartbeat_is_fresh_and_a_disk_that_refuses_it_stops_nothing(start: Callable[..., Group]) -> None:
    group = start(1)
    group.under_way()
    file = group.folder / "heartbeat.json"
    assert abs(time.time() - read_json(file)["time"]) < 5
    file.unlink()
    file.mkdir()
    time.sleep(1.5)
    group.finish()
    assert "Traceback" not in (group.folder / "log.txt").read_text()
