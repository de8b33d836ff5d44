"""The same table from MLflow as from the run folders."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

from longclip.collect.collect import Options, write
from longclip.collect.gather import gather
from longclip.collect.store import gather_from
from longclip.errors import SiteError, UserError
from longclip.run.folder import RunFolder
from longclip.track.mlflow import sync
from tests.collect.planted import scored_run
from tests.helpers import add_attempt, experiment, finished_run, make_run, save_checkpoint, train
from tests.launch.small import longclip


@pytest.fixture(scope="module")
def synced(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[RunFolder], str]:
    """Two seeds of two windows, one of the runs restarted; and one that goes on."""
    root = tmp_path_factory.mktemp("synced")
    runs = [
        finished_run(
            root, experiment(w, name=f"ctx{w}_s{s}", seed=s), {500: 0.2, 1000: 0.3 + w / 5120}, i2t=0.3, t2i=0.2
        )
        for w in (77, 512)
        for s in (0, 1)
    ]
    going = make_run(root, experiment(154, name="ctx154_s0"))
    train(add_attempt(going, 0), 0, 700, 60, val={300: 0.1, 600: 0.9}, losses={300: math.nan})
    save_checkpoint(going, 500)
    train(add_attempt(going, 1000), 500, 800, 1060, val={600: 0.29})
    save_checkpoint(going, 800)
    runs.append(going)
    uri = f"sqlite:///{root / 'mlflow.db'}"
    sync(runs, uri)
    return runs, uri


@pytest.mark.parametrize("options", [Options(goal=0.25), Options(trim=True)])
def test_the_two_give_the_same_table(synced: tuple[list[RunFolder], str], options: Options, tmp_path: Path) -> None:
    runs, uri = synced
    ours, theirs = gather(runs), gather_from(uri, ["tiny"])
    assert [r.run for r in theirs] == [None] * 5
    files = [write(rows, tmp_path / name, options).files for name, rows in (("a", ours), ("b", theirs))]
    for a, b in zip(*files, strict=True):
        # The report also says what only the folders tell: where they are, their experiments, commits, single queries.
        assert a.suffix == ".html" or a.read_bytes() == b.read_bytes(), a.name


def test_the_command_needs_no_run_folder(synced: tuple[list[RunFolder], str], tmp_path: Path) -> None:
    said = longclip("collect", "tiny", "--mlflow", synced[1], "--out", "table", cwd=tmp_path)
    assert "ctx154_s0" in said and "MLflow:" not in said, "it reads, and sends nothing"
    ours = write(gather(synced[0]), tmp_path / "ours").files[0]
    assert (tmp_path / "table" / "table.csv").read_bytes() == ours.read_bytes()


def test_one_run_of_a_sweep(synced: tuple[list[RunFolder], str]) -> None:
    runs, uri = synced
    assert [r.folder for r in gather_from(uri, ["tiny/ctx512_s1"])] == [runs[3].name]


def test_a_run_that_two_targets_name_is_one(synced: tuple[list[RunFolder], str]) -> None:
    runs, uri = synced
    found = [r.folder for r in gather_from(uri, ["tiny/ctx512_s1", "tiny", "tiny"])]
    assert sorted(found) == sorted(r.name for r in runs)


def test_two_sweeps_of_one_name_are_not_one_table(tmp_path: Path) -> None:
    """On a server that two people use."""
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    for who in ("anna", "ben"):
        ours = [finished_run(tmp_path / who, experiment(w, name=f"ctx{w}_{who}"), {1000: 0.3}) for w in (77, 512)]
        sync(ours, uri)
    with pytest.raises(
        UserError, match=r"tiny: 2 sweeps in .* are called so: \w{32} \(2 runs, experiment tiny, on n1 n2"
    ) as caught:
        gather_from(uri, ["tiny"])
    assert caught.value.hint is not None and caught.value.hint.startswith("longclip collect ID --mlflow sqlite:")
    ids = re.findall(r"\b[0-9a-f]{32}\b", caught.value.message)
    names = [[r.name for r in gather_from(uri, [one])] for one in ids]
    assert sorted(names) == [[f"ctx{w}_{who}" for w in (77, 512)] for who in ("anna", "ben")]
    assert len(gather_from(uri, ids)) == 4


def test_the_ranks_of_single_queries_are_there_too(
    synced: tuple[list[RunFolder], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sent once; where artifacts cannot be read, only what needs them is missing."""
    from mlflow import MlflowClient

    runs = [scored_run(tmp_path / "other", w, 0.4 + w / 5120) for w in (77, 512)]
    # A sweep of another name in the same store: making its tables takes seconds.
    (tmp_path / "other" / "tiny").rename(tmp_path / "other" / "planted")
    runs = [RunFolder(tmp_path / "other" / "planted" / r.name) for r in runs]
    uri = synced[1]
    with monkeypatch.context() as patched:
        patched.setattr(MlflowClient, "log_artifacts", Mock(side_effect=OSError("no bucket")))
        assert str(sync(runs, uri)).endswith("(2 runs synced); evaluations not sent: no bucket")
    without = write(gather_from(uri, ["planted"]), tmp_path / "a").comparison.lines[1]
    assert without.deltas["i2t_recall_at_1"].low is None and without.scores["i2t_recall_at_1"].low is not None
    assert str(sync(runs, uri)) == "planted (2 runs synced)"
    with monkeypatch.context() as patched:
        patched.setattr(MlflowClient, "log_artifacts", Mock(side_effect=AssertionError("sent twice")))
        sync(runs, uri)
    files = [
        write(rows, tmp_path / n).files[0] for n, rows in (("b", gather(runs)), ("c", gather_from(uri, ["planted"])))
    ]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_what_is_not_there(synced: tuple[list[RunFolder], str], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nothing: no such sweep in .*there are: .*tiny"):
        gather_from(synced[1], ["nothing"])
    with pytest.raises(UserError, match="no such database"):
        gather_from(f"sqlite:///{tmp_path}/none.db", ["tiny"])
    with pytest.raises(UserError, match="valid is http"):
        gather_from("file:///tmp/x", ["tiny"])
    (tmp_path / "broken.db").write_bytes(b"not a database, but long enough to be looked at" * 50)
    with pytest.raises(SiteError, match="collect from the run folders"):
        gather_from(f"sqlite:///{tmp_path}/broken.db", ["tiny"])


def test_a_run_that_was_not_written_by_sync_is_none_of_ours(synced: tuple[list[RunFolder], str]) -> None:
    client: Any = __import__("mlflow").MlflowClient(synced[1])
    experiment_id = client.get_experiment_by_name("tiny").experiment_id
    client.create_run(experiment_id, tags={"longclip.sweep": "tiny"}, run_name="a parent")
    assert len(gather_from(synced[1], ["tiny"])) == 5
