"""Frozen code: what is in a snapshot, that jobs run it whatever happens to the source, and that they stop if not."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import pytest

from longclip.collect.checks import differences
from longclip.collect.gather import gather
from longclip.errors import SiteError, UserError
from longclip.launch.snapshot import PACKAGE, code_hash, freeze
from longclip.run.attempts import attempts_of
from longclip.run.folder import RunFolder, read_json, runs_of, write_json
from longclip.run.verdicts import verdict_of
from tests.helpers import add_attempt, end, experiment, make_run, train
from tests.launch.small import environment, longclip, make_sweep, the_run

SHORT = ("--on", "local", "--set", "train.samples=48", "--set", "slurm.tasks_per_node=1")


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout of the package with an edited, an untracked, a removed and two ignored files; first on PYTHONPATH."""
    root = tmp_path / "checkout"
    shutil.copytree(PACKAGE, root / "longclip", ignore=shutil.ignore_patterns("__pycache__"))
    (root / "longclip" / "track" / "removed.py").write_text("")
    (root / ".gitignore").write_text("__pycache__/\nscratch*\n/runs/\n")
    git = ("git", "-C", str(root), "-c", "user.name=t", "-c", "user.email=t@example.org")
    for words in (("init", "--quiet"), ("add", "."), ("commit", "--quiet", "--message", "a state of the code")):
        subprocess.run([*git, *words], check=True)
    with (root / "longclip" / "errors.py").open("a") as f:
        f.write("# edited\n")
    (root / "longclip" / "data" / "untracked.py").write_text("NEW = 1\n")
    (root / "longclip" / "scratch.py").write_text("IGNORED = 1\n")
    (root / "longclip" / "scratch.txt").write_text("ignored\n")
    (root / "longclip" / "track" / "removed.py").unlink()
    monkeypatch.setenv("PYTHONPATH", str(root))
    return root


def python(code: str, path: Path) -> str:
    """Output of a Python whose longclip is that below ``path``."""
    command = [sys.executable, "-P", "-c", code]
    env = {**environment(), "PYTHONPATH": str(path)}
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def freeze_in(tree: Path, sweep: Path) -> Path:
    words = "from pathlib import Path; from longclip.launch.snapshot import freeze; print(freeze(Path({!r})).folder)"
    return Path(python(words.format(str(sweep)), tree))


HASH = "from longclip.launch.snapshot import code_hash; print(code_hash())"


def names(package: Path) -> set[str]:
    return {p.relative_to(package).as_posix() for p in package.rglob("*") if p.is_file() and p.suffix != ".pyc"}


def test_edited_and_untracked_files_are_in_it_ignored_ones_are_not(tree: Path) -> None:
    frozen = freeze_in(tree, tree / "runs" / "small")
    package = frozen / "longclip"
    assert names(package) == names(PACKAGE) | {"data/untracked.py"}
    assert package.joinpath("errors.py").read_text().endswith("# edited\n")
    assert package.joinpath("py.typed").is_file()
    assert [p.name for p in frozen.iterdir()] == ["longclip"]
    assert [p.name for p in frozen.parent.iterdir()] == [frozen.name], "nothing is left beside it"
    # The front that copied it, and a worker that imports the copy, say the same; so does a worker that has compiled it.
    assert python(HASH, tree) == python(HASH, frozen) == python(HASH, frozen) == frozen.name


def test_the_same_code_makes_one_snapshot_and_an_edit_another(tree: Path) -> None:
    sweep = tree.parent / "sweep"
    first = freeze_in(tree, sweep)
    made = (first / "longclip" / "cli.py").stat().st_mtime_ns
    assert freeze_in(tree, sweep) == first
    assert (first / "longclip" / "cli.py").stat().st_mtime_ns == made
    (tree / "longclip" / "scratch.py").write_text("IGNORED = 2\n")
    assert freeze_in(tree, sweep) == first
    (tree / "longclip" / "errors.py").rename(tree / "longclip" / "mistakes.py")
    (tree / "longclip" / "errors.py").write_text("from longclip.mistakes import *\n")
    assert freeze_in(tree, sweep) != first


def test_an_installed_package_is_copied_as_it_is(tree: Path, tmp_path: Path) -> None:
    """As a wheel lies in the ``.venv/`` of a checkout: git tracks nothing there, and its rules are not about it."""
    installed = tree / "scratch-venv" / "site-packages"
    shutil.copytree(tree / "longclip", installed / "longclip")
    (installed / "longclip" / "__pycache__").mkdir(exist_ok=True)
    (installed / "longclip" / "__pycache__" / "old.pyc").write_bytes(b"")
    (installed / "longclip" / ".nfs0001").write_bytes(b"")
    frozen = freeze_in(installed, tmp_path / "sweep")
    assert names(frozen / "longclip") == names(installed / "longclip") - {".nfs0001"}
    assert {"scratch.py", "scratch.txt"} <= names(frozen / "longclip")


def test_many_submits_at_once_share_one(tmp_path: Path) -> None:
    together = Barrier(8)

    def submit(_: int) -> Path:
        together.wait()
        return freeze(tmp_path / "sweep").folder

    with ThreadPoolExecutor(8) as pool:
        folders = set(pool.map(submit, range(8)))
    assert folders == {tmp_path / "sweep" / "code" / code_hash()}
    assert list((tmp_path / "sweep" / "code").iterdir()) == list(folders)


def test_a_snapshot_that_was_edited_is_not_used(tmp_path: Path) -> None:
    folder = freeze(tmp_path).folder
    (folder / "longclip" / "cli.py").write_text("print('edited')\n")
    with pytest.raises(SiteError, match="changed after it was made"):
        freeze(tmp_path)


def test_a_path_that_python_cannot_import_from_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot import from a path with ':'"):
        freeze(tmp_path / "lr:1e-3")
    assert not (tmp_path / "lr:1e-3").exists()


def test_the_source_is_edited_while_runs_wait(tree: Path) -> None:
    """Two runs, one after the other, submitted from inside the checkout, which is broken before the second starts."""
    sweep = make_sweep(tree.parent, (4, 5))
    (tree / "longclip" / "train" / "loop.py").open("a").write(f"print({'as submitted'!r})\n")
    expected = python(HASH, tree)
    command = [sys.executable, "-m", "longclip.cli", "submit", str(sweep), *SHORT]
    front = subprocess.Popen(command, cwd=tree, env=environment(), stdout=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 120
        while not list((tree / "runs").glob("small/ctx4-*/attempts/0001")):
            assert front.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
        (tree / "longclip" / "train" / "loop.py").write_text("raise RuntimeError('edited while queued')\n")
        said = front.communicate(timeout=240)[0]
    finally:
        front.kill()
    assert front.returncode == 0 and "all finished" in said, said
    assert [p.name for p in (tree / "runs" / "small" / "code").iterdir()] == [expected]
    for run in runs_of(tree / "runs"):
        (attempt,) = attempts_of(run)
        assert attempt.submitted is not None and attempt.started is not None
        assert attempt.submitted["code"] == attempt.started["code"] == expected
        assert attempt.submitted["commit"].endswith(" +4"), "edited, edited, removed, untracked"
        snapshot = run.path / attempt.submitted["snapshot"]
        (log,) = attempt.logs.glob("*_0_log.out")
        assert f"code {expected} from {snapshot.resolve()}/longclip\n" in log.read_text()
        assert "as submitted" in log.read_text()


def code_of(attempt: Path) -> str:
    return str(read_json(attempt / "submitted.json")["code"])


def worker(run: RunFolder, path: Path) -> subprocess.CompletedProcess[str]:
    """What a requeue does: attempt 1 again, in a batch script that says where the code is."""
    command = [sys.executable, "-P", "-m", "longclip.launch.worker", str(run.path), "1"]
    env = {**environment(), "PYTHONPATH": str(path)}
    return subprocess.run(command, capture_output=True, text=True, env=env, timeout=120)


def test_a_requeue_keeps_its_code_and_train_takes_today_s(tree: Path) -> None:
    sweep, runs = make_sweep(tree.parent, (4,)), tree.parent / "runs"
    longclip("submit", sweep, "--runs", runs, *SHORT, cwd=tree.parent)
    run = the_run(runs, "ctx4")
    (first,) = attempts_of(run)
    assert first.submitted is not None
    old, snapshot = first.submitted["code"], (run.path / first.submitted["snapshot"]).resolve()
    (tree / "longclip" / "data" / "untracked.py").write_text("NEW = 2\n")

    done = worker(run, tree)
    assert done.returncode == 1 and len(attempts_of(run)) == 1
    assert f"imported code {python(HASH, tree)} from {tree}/longclip, but was submitted with {old}" in done.stderr

    # The same content at another place is not the snapshot: it may be edited while the run goes on.
    shutil.copytree(snapshot, tree.parent / "twin")
    assert "but was submitted with" in worker(run, tree.parent / "twin").stderr

    # A run folder alone at another place has no snapshot; with its sweep's code it goes on there.
    alone = RunFolder(tree.parent / "elsewhere" / "small" / run.name)
    shutil.copytree(run.path, alone.path)
    end(attempts_of(alone)[0], "preempted", 0, 0)
    done = worker(alone, snapshot)
    assert done.returncode == 1 and "not there" in done.stderr and "`longclip submit`" in done.stderr
    shutil.copytree(snapshot.parent, alone.path.parent / "code")
    done = worker(alone, alone.path.parent / "code" / old)
    assert done.returncode == 0, done.stderr
    second = attempts_of(alone)[-1]
    assert second.number == 2 and second.started is not None and second.started["code"] == old

    shutil.rmtree(run.checkpoints)
    run.checkpoints.mkdir()
    end(first, "interrupted", 0, 0)
    longclip("train", sweep / "ctx4.yaml", *SHORT[2:], "--runs", runs, cwd=tree.parent)
    second = attempts_of(run)[-1]
    assert second.started is not None and second.started["code"] == code_of(second.path) == python(HASH, tree) != old
    assert [p.name for p in snapshot.parent.iterdir()] == [old], "what runs at once needs no snapshot"


def test_an_import_hook_before_the_snapshot_is_noticed(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some build backends' editable installs are finders at the head of ``sys.meta_path``."""
    sweep, runs, hooks = make_sweep(tree.parent, (4,)), tree.parent / "runs", tree.parent / "hooks"
    hooks.mkdir()
    (hooks / "sitecustomize.py").write_text(
        "import sys\nfrom importlib.machinery import PathFinder\n"
        "class Finder:\n    @staticmethod\n    def find_spec(name, path=None, target=None):\n"
        f"        return PathFinder.find_spec(name, [{str(tree)!r}]) if name == 'longclip' else None\n"
        "sys.meta_path.insert(0, Finder)\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(hooks))
    said = longclip("submit", sweep, "--runs", runs, *SHORT, cwd=tree.parent, code=1)
    run = the_run(runs, "ctx4")
    (attempt,) = attempts_of(run)
    verdict = verdict_of(attempt)
    assert attempt.started is None and verdict is not None and verdict.kind == "rejected"
    assert f"imported code {code_of(attempt.path)} from {tree}/longclip" in verdict.message
    assert "rejected" in said
    monkeypatch.setenv("PYTHONPATH", str(tree))
    said = longclip("submit", sweep, "--runs", runs, *SHORT, "--dry-run", cwd=tree.parent, code=None)
    assert "resume" in said and f"PYTHONPATH={run.path.parent}/code/{code_of(attempt.path)}$" in said, said


def trained(run: RunFolder, code: str, resumed: int, until: int) -> None:
    attempt = add_attempt(run, 100.0 * len(attempts_of(run)))
    write_json(attempt.path / "started.json", {**read_json(attempt.path / "started.json"), "code": code})
    train(attempt, resumed, until, 60)
    end(attempt, "finished" if until == 1000 else "interrupted", until, 1000)


def test_collect_marks_mixed_code(tmp_path: Path) -> None:
    c77, c154, c512 = (make_run(tmp_path, experiment(w)) for w in (77, 154, 512))
    trained(c77, "aaaa", 0, 1000)
    trained(c154, "bbbb", 0, 200)  # of this nothing was left
    trained(c154, "aaaa", 0, 500)
    trained(c154, "aaaa", 500, 1000)
    assert differences(gather([c77, c154])) == []
    trained(c512, "aaaa", 0, 500)
    trained(c512, "cccc", 400, 1000)
    (warning,) = differences(gather([c77, c154, c512]))
    assert "tiny: trained by more than one state of the code: ctx512 aaaa then cccc, elsewhere aaaa;" in warning
    (warning,) = differences(gather([c512]))
    assert "code: ctx512 aaaa then cccc;" in warning
