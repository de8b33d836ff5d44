"""Records of evaluations: found by what was scored on what, and whole or absent."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from longclip.evaluate.conventions import lines
from longclip.run import evaluations

RECORD = {
    "suite": "some",
    "suite_hash": "aa",
    "weights": "bb",
    "checkpoint": "step-00000010",
    "tasks": {"pairs": {"kind": "retrieval"}},
}


def test_a_record_and_its_arrays(tmp_path: Path) -> None:
    file = evaluations.place(tmp_path, "some", "step-00000010")
    ranks = np.arange(5, dtype=np.int32)
    evaluations.write(file, RECORD, {"pairs/i2t": ranks, "pairs/w77/t2i": ranks[::-1]})
    assert file == tmp_path / "some" / "step-00000010.json"
    assert list(evaluations.records(tmp_path)) == [(file, RECORD)]
    arrays = evaluations.read_arrays(file)
    assert {name: a.tolist() for name, a in arrays.items()} == {
        "pairs/i2t": [0, 1, 2, 3, 4],
        "pairs/w77/t2i": [4, 3, 2, 1, 0],
    }
    assert arrays["pairs/i2t"].dtype == np.int32
    assert sorted(path.name for path in file.parent.iterdir()) == ["step-00000010.json", "step-00000010.npz"]


def test_found_by_weights_and_suite_whatever_they_were_called(tmp_path: Path) -> None:
    file = evaluations.place(tmp_path, "some", "step-00000010")
    evaluations.write(file, RECORD, {})
    other = evaluations.place(tmp_path, "other", "step-00000020")
    evaluations.write(other, {**RECORD, "suite_hash": "cc"}, {})
    assert evaluations.cached(tmp_path, "bb", "aa") == file
    assert evaluations.cached(tmp_path, "bb", "cc") == other
    assert evaluations.cached(tmp_path, "aa", "bb") is None
    assert [path for path, _ in evaluations.records(tmp_path, "other")] == [other]


def test_what_is_torn_or_something_else_is_no_record(tmp_path: Path) -> None:
    (tmp_path / "some").mkdir()
    (tmp_path / "some" / "torn.json").write_text('{"suite": "some", "ta')
    (tmp_path / "some" / "list.json").write_text("[1]")
    (tmp_path / "test.json").write_text('{"metrics": {}}')
    assert list(evaluations.records(tmp_path)) == []
    assert evaluations.read_arrays(tmp_path / "test.json") == {}


def test_arrays_that_cannot_be_written_leave_no_record(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="pickle"):
        evaluations.write(tmp_path / "some" / "a.json", RECORD, {"pairs/i2t": np.array([object()])})
    assert list(evaluations.records(tmp_path)) == []


def test_every_recall_is_said_with_its_convention() -> None:
    retrieval = {
        "kind": "retrieval",
        "images": 1000,
        "captions": 2000,
        "convention": "open_clip",
        "metrics": {"i2t_recall_at_1": 0.5, "t2i_recall_at_1": 0.25},
        "skipped": {"w512": "the text tower has 77 positions"},
    }
    classes = {"kind": "classification", "images": 20, "metrics": {"accuracy": 0.75}}
    assert lines({"suite": "s", "checkpoint": "model", "tasks": {"a": retrieval, "b": classes}}) == [
        "s/a at model: n = 1,000 images, 2,000 captions, open_clip's convention: an image's first caption, ties by "
        "index: R@1 i2t 50.0 t2i 25.0; w512 skipped: the text tower has 77 positions",
        "s/b at model: n = 20: accuracy 75.0",
    ]
    of_shards = {"suite": "s", "checkpoint": "model", "tasks": {"a": {**retrieval, "text": "long_caption"}}}
    assert "2,000 captions (long_caption), open_clip's" in lines(of_shards)[0]


def test_the_front_s_side_needs_no_torch() -> None:
    import subprocess

    modules = "evaluate.suite, evaluate.gallery, launch.evaluation_jobs, launch.suites, launch.models, run.evaluations"
    imports = "; ".join(f"import longclip.{name}" for name in modules.split(", "))
    code = f"{imports}; import sys; sys.exit(any(m in sys.modules for m in ('torch', 'transformers', 'deepspeed')))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
