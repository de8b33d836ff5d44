"""Prune shows what would go, frees it when told to, and never what a run still needs."""

from __future__ import annotations

import hashlib
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from longclip.errors import LongclipError, UserError
from longclip.launch.export import choose
from longclip.launch.prune import ABANDONED, free, plan
from longclip.run import checkpoints, lineage
from longclip.run.folder import RunFolder, read_json, write_json
from tests.helpers import add_attempt, end, experiment, make_run, save_test, train
from tests.launch.small import longclip

FILES = ("weights.safetensors", "exp_avg.safetensors", "exp_avg_sq.safetensors")


def save(run: RunFolder, step: int, best: int | None = None) -> Path:
    """A checkpoint as training leaves it, of 3 x 8 KiB; ``best`` is the best so far, by its step."""
    folder = run.checkpoints / f"step-{step:08d}"
    folder.mkdir()
    for name in FILES:
        (folder / name).write_bytes(os.urandom(8192))
    known = None if best is None else {"checkpoint": f"step-{best:08d}", "value": 0.5, "samples": best * 100}
    write_json(folder / "state.json", {"step": step, "samples": step * 100, "best": known})
    manifest = {
        name: {
            "size": (folder / name).stat().st_size,
            "sha256": hashlib.sha256((folder / name).read_bytes()).hexdigest(),
        }
        for name in (*FILES, "state.json")
    }
    write_json(folder / "manifest.json", {"files": manifest})
    write_json(run.checkpoints / "latest", {"checkpoint": folder.name})
    return folder


def make(runs: Path, verdict: str | None, window: int = 77) -> RunFolder:
    """Five checkpoints; the second is the best."""
    run = make_run(runs, experiment(window))
    attempt = add_attempt(run, 0)
    train(attempt, 0, 500, 60)
    for step in range(1, 6):
        save(run, step, best=min(step, 2))
    if verdict:
        # by a process of this machine that is gone; of Slurm's jobs nobody could say that they are
        here = {"executor": "local", "host": socket.gethostname(), "job": str(2**22 + 1)}
        write_json(attempt.path / "submitted.json", {**read_json(attempt.path / "submitted.json"), **here})
        end(attempt, verdict, 500, 200)
    return run


def age(path: Path, seconds: float) -> None:
    for part in (*path.rglob("*"), path):
        os.utime(part, (time.time() - seconds, time.time() - seconds))


def left(run: RunFolder) -> list[str]:
    return sorted(p.name.removeprefix("step-0000000") for p in run.checkpoints.iterdir() if p.name != "latest")


@pytest.mark.parametrize(
    ("verdict", "keep_last", "kept"),
    [
        ("finished", 1, ["2"]),
        ("interrupted", 1, ["2", "5"]),
        ("crashed", 2, ["2", "4", "5"]),
        ("diverged", 9, ["1", "2", "3", "4", "5"]),
    ],
)
def test_what_stays(tmp_path: Path, verdict: str, keep_last: int, kept: list[str]) -> None:
    run = make(tmp_path, verdict)
    for _ in range(2):  # the second time nothing is left to do
        (pruning,) = plan([run], keep_last)
        free(pruning)
        assert left(run) == kept
    assert (pruning.removals, pruning.bytes) == ((), 0)


def test_pinned_and_evaluated_checkpoints_stay(tmp_path: Path) -> None:
    run = make(tmp_path, "finished")
    (run.checkpoints / "step-00000001" / "pinned").touch()
    save_test(run, 0.1, 0.1, samples=300)
    (pruning,) = plan([run])
    assert pruning.kept == {
        "step-00000001": "pinned",
        "step-00000002": "best",
        "step-00000003": "evaluations/test.json",
    }
    free(pruning)
    assert left(run) == ["1", "2", "3"]
    # `latest` names what has gone: a reader finds the newest that is there.
    assert checkpoints.latest(run.checkpoints) == run.checkpoints / "step-00000003"


def test_what_killed_attempts_left_behind_goes_when_it_is_old(tmp_path: Path) -> None:
    run = make(tmp_path, "interrupted")
    (run.checkpoints / "step-00000003").rename(run.checkpoints / "broken-step-00000003")
    never = save(run, 6)
    (run.checkpoints / "latest").rename(never / "latest")
    write_json(run.checkpoints / "latest", {"checkpoint": "step-00000005"})
    half = [run.checkpoints / ".step-00000007.0a1b.tmp", run.checkpoints / ".step-00000008.2c3d.tmp"]
    for folder in half:
        folder.mkdir()
        (folder / FILES[0]).write_bytes(bytes(4096))
    for path in (never, half[0]):
        age(path, ABANDONED + 60)
    (pruning,) = plan([run])
    assert sorted((r.path.name, r.why) for r in pruning.removals) == [
        (".step-00000007.0a1b.tmp", "half-written"),
        ("broken-step-00000003", "broken"),
        ("step-00000001", "older, not best"),
        ("step-00000004", "older, not best"),
        ("step-00000006", "never published"),
    ]
    free(pruning)
    assert left(run) == [".step-00000008.2c3d.tmp", "2", "5"]


@pytest.mark.parametrize(("host", "state"), [(socket.gethostname(), "running"), ("elsewhere", "unknown")])
def test_a_run_at_work_is_left_alone(tmp_path: Path, host: str, state: str) -> None:
    run = make(tmp_path, None)
    with subprocess.Popen([sys.executable, "-c", "input()", "longclip"], stdin=subprocess.PIPE) as job:
        record = {"executor": "local", "job": str(job.pid), "host": host, "samples": 1000}
        write_json(run.attempts / "0001" / "submitted.json", record)
        (pruning,) = plan([run])
        assert (pruning.removals, pruning.state, pruning.note) == ((), state, state)
        job.kill()
    assert len(left(run)) == 5


def test_a_run_that_began_after_the_plan_is_left_alone(tmp_path: Path) -> None:
    run = make(tmp_path, "interrupted")
    (pruning,) = plan([run])
    again = add_attempt(run, 1000)
    write_json(again.path / "submitted.json", {"executor": "local", "job": "1", "host": "elsewhere"})
    with pytest.raises(LongclipError, match="nothing of it was removed"):
        free(pruning)
    assert len(left(run)) == 5


@pytest.mark.parametrize("broken", [2, 5])
def test_nothing_goes_before_what_stays_is_known_to_be_whole(tmp_path: Path, broken: int) -> None:
    """The newest, or the best, has lost a bit on the disk: the older ones may be all that is left."""
    run = make(tmp_path, "interrupted")
    file = run.checkpoints / f"step-0000000{broken}" / FILES[1]
    data = bytearray(file.read_bytes())
    data[0] ^= 1
    file.write_bytes(data)
    (pruning,) = plan([run])
    with pytest.raises(LongclipError, match="is broken"):
        free(pruning)
    assert len(left(run)) == 5


def test_without_knowing_the_best_nothing_goes(tmp_path: Path) -> None:
    run = make(tmp_path, "finished")
    (run.checkpoints / "step-00000005" / "state.json").write_text("{")
    (pruning,) = plan([run])
    assert pruning.removals == () and "state.json is broken" in pruning.note


def test_the_command_shows_before_it_frees(tmp_path: Path) -> None:
    done, on = make(tmp_path, "finished"), make(tmp_path, "interrupted", window=154)
    shown = longclip("prune", "tiny", "--runs", tmp_path, cwd=tmp_path)
    assert "MB can go; nothing was removed; next: the same with --yes" in shown
    assert len(left(done)) == len(left(on)) == 5
    freed = longclip("prune", "tiny", "--yes", "--runs", tmp_path, cwd=tmp_path)
    assert f"{done.name}: freed 0.1 MB" in freed and f"{on.name}: freed 0.1 MB" in freed
    assert (left(done), left(on)) == (["2"], ["2", "5"])
    assert json.loads((on.checkpoints / "latest").read_text()) == {"checkpoint": "step-00000005"}
    assert "nothing can go" in longclip("prune", "--yes", "--runs", tmp_path, cwd=tmp_path)
    assert "Invalid value" in longclip("prune", "--keep-last", "0", "--runs", tmp_path, cwd=tmp_path, code=2)


def test_what_was_pruned_is_not_replaced_by_what_is_left(tmp_path: Path) -> None:
    """ "As the run ended", for a child or an export, is not the best checkpoint, which alone stays."""
    run = make(tmp_path, "finished")
    assert choose(run, "last").name == lineage.origin(run.path, f"run:{run.name}")[0].name == "step-00000005"
    free(plan([run], 1)[0])
    for ask in (lambda: choose(run, "last"), lambda: lineage.origin(run.path, f"run:{run.name}")):
        with pytest.raises(UserError, match=r"last checkpoint, step-00000005, is gone .*; there is step-00000002"):
            ask()
    assert choose(run, "best").name == lineage.origin(run.path, f"run:{run.name}@best")[0].name == "step-00000002"
