"""Run folders that were copied elsewhere go on there; those of another user are read, and not touched."""

from __future__ import annotations

import hashlib
import os
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from longclip.experiment.load import load
from longclip.launch.plan import plan
from longclip.launch.site import Site
from longclip.launch.submit import submit
from longclip.run.attempts import attempts_of
from longclip.run.folder import RunFolder, read_json, runs_of
from tests.helpers import add_attempt, end, experiment, finished_run, make_run, save_checkpoint, train
from tests.launch.small import curve, environment, kill_after_checkpoint, longclip, make_sweep, the_run

# ---- moved -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def moved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another root: experiments, data, runs and MLflow store of a run that was killed half-way. The old one is gone."""
    old = tmp_path_factory.mktemp("old")
    sweep = make_sweep(old, (5,))
    kill_after_checkpoint(["submit", sweep, "--on", "local", "--runs", old / "runs"], old, old / "runs", sample=600)
    longclip("sync", "--runs", old / "runs", cwd=old)
    new = tmp_path_factory.mktemp("new") / "root"
    shutil.copytree(old, new)  # times are of the copy, as with most tools
    shutil.rmtree(old)
    return new


def test_a_copied_run_goes_on_under_another_root(moved: Path) -> None:
    """Same uid, same MLflow run, and a curve that is bit for bit that of a run never moved or killed."""
    runs = moved / "runs"
    run = the_run(runs, "ctx5")
    before = read_json(run.path / "mlflow.json")
    name, killed_at = run.name, curve(run)[-1][0]
    assert "killed" in longclip("status", "small", "--runs", runs, cwd=moved)

    said = longclip("submit", "small", "--on", "local", "--runs", runs, cwd=moved)
    assert "resume" in said and "all finished" in said, said
    assert [r.name for r in runs_of(runs)] == [name], "the same run"
    _, second = attempts_of(run)
    assert second.resumed_at is not None and 360 <= second.resumed_at <= killed_at, "at the checkpoint, not at zero"

    site = Site(runs=moved / "whole")
    for _, _, job in submit(plan(load([moved / "small"]), site), site, "local"):
        job.wait()
    whole = the_run(site.runs, "ctx5")
    assert whole.name == name
    for metric in ("train/loss", "train/grad_norm", "val/mean_recall_at_1"):
        assert curve(run, metric) == curve(whole, metric)
    scores = [read_json(r.evaluations / "test.json")["metrics"] for r in (run, whole)]
    assert scores[0] == scores[1]

    after = read_json(run.path / "mlflow.json")
    assert after["run_id"] == before["run_id"] and str(moved) in after["uri"]
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{runs}/mlflow.db")
    history = client.get_metric_history(after["run_id"], "train/loss")
    assert sorted((m.step, m.value) for m in history) == curve(run), "no gap, no double"
    assert client.get_run(after["run_id"]).info.status == "FINISHED"


# ---- of another user ---------------------------------------------------------------------------------------------

NOBODY = 65534


@pytest.fixture
def shared() -> Iterator[Path]:
    """A folder that every user can reach (pytest's own are the user's), with ``runs/tiny/ctx77-*`` (finished),
    ``ctx154-*`` (crashed) and ``ctx256-*`` (not started) in it, which everybody may read and nobody may write."""
    root = Path(tempfile.mkdtemp(prefix="longclip-shared-"))
    finished_run(root / "runs", experiment(77), {500: 0.2, 1000: 0.3})
    crashed = make_run(root / "runs", experiment(154))
    attempt = add_attempt(crashed, 0)
    train(attempt, 0, 600, 60)
    save_checkpoint(crashed, 400)
    (attempt.logs / "101_0_log.out").write_text("a line of the log\n")
    attempt.fail(1, "crashed", 600, "out of memory", "Traceback ... out of memory")
    end(attempt, "crashed", 600, 200, "out of memory")
    make_run(root / "runs", experiment(256))
    root.chmod(0o755)
    for path in (root / "runs", *(root / "runs").rglob("*")):
        path.chmod(0o555 if path.is_dir() else 0o444)
    yield root
    for path in (root / "runs", *(root / "runs").rglob("*")):
        if path.is_dir():
            path.chmod(0o755)
    shutil.rmtree(root)


@pytest.fixture
def other_user(shared: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs ``longclip`` as nobody, whom permissions bind (root they do not); as ourselves where we are not root,
    and where ``owner`` is asked for."""
    home = shared / "home"
    home.mkdir()
    home.chmod(0o777)
    become = ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups"] if os.getuid() == 0 else []
    if become and shutil.which("setpriv") is None:
        pytest.skip("no setpriv (util-linux) to become another user with")
    env = {**environment(), "HOME": str(home), "PYTHONDONTWRITEBYTECODE": "1"}

    def longclip(*words: str | Path, owner: bool = False) -> subprocess.CompletedProcess[str]:
        command = [*([] if owner else become), sys.executable, "-m", "longclip.cli", *map(str, words)]
        return subprocess.run(command, cwd=home, capture_output=True, text=True, timeout=120, env=env)

    if longclip("--version").returncode != 0:
        pytest.skip("this Python cannot be run by another user")
    return longclip


def content(folder: Path) -> dict[str, tuple[int, int, str]]:
    """Mode, time and hash of everything below ``folder``."""
    found = {}
    for path in (folder, *sorted(folder.rglob("*"))):
        facts = path.lstat()
        digest = hashlib.sha256(path.read_bytes()).hexdigest() if stat.S_ISREG(facts.st_mode) else ""
        found[str(path)] = (facts.st_mode, facts.st_mtime_ns, digest)
    return found


def test_another_user_reads_and_changes_nothing(
    shared: Path, other_user: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    runs, out = shared / "runs", shared / "home" / "out"
    before = content(runs)
    crashed = next(r for r in runs_of(runs) if r.label == "ctx154")
    commands: list[tuple[list[str | Path], str]] = [
        (["status", "--runs", runs], "finished"),
        (["status", "tiny", "--json", "--runs", runs], '"state": "crashed"'),
        (["logs", "ctx154", "--runs", runs], "out of memory"),
        (["logs", crashed.path, "-f"], "a line of the log"),
        (["logs", crashed.path, "--around", "400"], ">"),
        (["show", "ctx77", "--runs", runs], "next: longclip collect tiny"),
        (["show", "ctx154", "--json", "--runs", runs], '"verdict": "crashed"'),
        (["diff", "ctx77", "ctx256", "--runs", runs], "different runs: 1 key"),
        (["collect", runs / "tiny", "--out", out, "--no-sync"], "wrote"),
    ]
    # The owner too: what could be written then is not written either.
    for words, expected, owner in [(*command, owner) for owner in (False, True) for command in commands]:
        done = other_user(*words, owner=owner)
        assert done.returncode == 0 and expected in done.stdout, (words, done.stdout, done.stderr)
        assert "Traceback" not in done.stderr, done.stderr
        assert content(runs) == before, words
    assert (out / "table.md").is_file()


def test_what_another_user_may_not_do_is_one_line(
    shared: Path, other_user: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    runs = shared / "runs"
    before = content(runs)
    run = next(r for r in runs_of(runs) if r.label == "ctx77")
    done = other_user("sync", run.path, "--runs", runs)
    assert done.returncode == 3 and "Traceback" not in done.stderr, done.stderr
    assert content(runs) == before
    if os.getuid() == 0:
        run.path.chmod(0o700)  # now it may not even be read
        done = other_user("show", run.path)
        assert done.returncode == 3 and "Permission denied" in done.stderr, done.stderr
        assert str(run.path) in done.stderr and "Traceback" not in done.stderr


def test_the_name_of_a_moved_run_is_where_it_lies(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a", experiment())
    shutil.copytree(tmp_path / "a" / "tiny", tmp_path / "b" / "renamed")
    copied = RunFolder(tmp_path / "b" / "renamed" / run.name)
    assert (copied.uid, copied.sweep, copied.identity()) == (run.uid, "renamed", run.identity())
