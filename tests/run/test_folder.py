"""What the user may call a run: a name, the start of one, sweep/name, a path, a job id."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from longclip.errors import UserError
from longclip.run.attempts import claim
from longclip.run.folder import RunFolder, find_runs, job_ids
from tests.helpers import add_attempt, end, experiment, make_run


@pytest.fixture
def runs(tmp_path: Path) -> list[RunFolder]:
    """``tiny/ctx77-*`` and ``tiny/ctx512-*``, the second with two attempts (jobs 101 and 102)."""
    made = [make_run(tmp_path / "runs", experiment(window)) for window in (77, 512)]
    end(add_attempt(made[1], 0), "interrupted", 400, 60)
    add_attempt(made[1], 100)
    return made


def found(runs: list[RunFolder], target: str | Path) -> list[tuple[str, str, Path]]:
    root = runs[0].path.parents[1]
    return [(r.sweep, r.name, r.path.resolve()) for r in find_runs(root, str(target))]


def the(run: RunFolder) -> list[tuple[str, str, Path]]:
    return [("tiny", run.name, run.path.resolve())]


def test_names(runs: list[RunFolder]) -> None:
    _, run = runs
    for target in (run.name, "ctx512", "ctx5", f"tiny/{run.name}", "tiny/ctx512", "tiny/ctx5", "tiny/ctx512/"):
        assert found(runs, target) == the(run), target
    assert found(runs, "tiny") == found(runs, "tiny/") == the(runs[0]) + the(runs[1])


def test_a_job_of_any_attempt(runs: list[RunFolder]) -> None:
    assert found(runs, "101") == found(runs, "102") == the(runs[1])
    with pytest.raises(UserError, match="no such run"):
        find_runs(runs[0].path.parents[1], "10")  # an id is whole or nothing


def test_a_requeued_job_is_named_by_its_claim_only(runs: list[RunFolder]) -> None:
    claim(runs[1], 2, "777", {})
    assert job_ids(runs[1]) == ["101", "102", "777"]
    assert found(runs, "777") == the(runs[1])


def test_a_torn_record_does_not_hide_the_others(runs: list[RunFolder]) -> None:
    (runs[1].attempts / "0001" / "submitted.json").write_text('{"job": "10')
    assert found(runs, "102") == the(runs[1])


def test_paths_from_anywhere(runs: list[RunFolder], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    _, run = runs
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    for target in (run.path, f"{run.path}/", os.path.relpath(run.path), f"../runs/tiny/{run.name}/"):
        assert [r.path for r in find_runs(Path("no-such-root"), str(target))] == [run.path.resolve()]
    assert [r.sweep for r in find_runs(Path("no-such-root"), "../runs/tiny/")] == ["tiny", "tiny"]
    monkeypatch.chdir(run.path)
    assert found(runs, ".") == the(run)
    assert len(found(runs, "..")) == 2 and {sweep for sweep, *_ in found(runs, "..")} == {"tiny"}
    monkeypatch.chdir(run.path.parent)
    assert {sweep for sweep, *_ in found(runs, ".")} == {"tiny"}


def test_the_root_comes_before_the_current_folder(runs: list[RunFolder], monkeypatch: pytest.MonkeyPatch) -> None:
    """In a folder of runs, --runs ANOTHER means those of the other."""
    _, run = runs
    other = make_run(run.path.parents[2] / "moved", experiment(512))
    monkeypatch.chdir(run.path.parents[1])
    for target in ("tiny", f"tiny/{run.name}", run.name):
        assert [r.path for r in find_runs(other.path.parents[1], target)] == [other.path], target


def test_an_ambiguous_start_names_those_that_have_it(runs: list[RunFolder]) -> None:
    with pytest.raises(UserError) as error:
        find_runs(runs[0].path.parents[1], "ctx")
    assert "more than one run" in str(error.value)
    assert all(f"tiny/{run.name}" in str(error.value) for run in runs)
