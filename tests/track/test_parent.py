"""A sweep as one parent run in a real SQLite store: made once, with its children, their status and the results."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest

from longclip.run.folder import RunFolder, read_json, write_json
from longclip.track.mlflow import sync
from longclip.track.parent import log_results, shared, together
from tests.helpers import add_attempt, end, experiment, finished_run, make_run, save_checkpoint, save_test, train
from tests.launch.small import longclip
from tests.track.test_mlflow import client, history

PARENT = "mlflow.parentRunId"


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"sqlite:///{tmp_path_factory.mktemp('store') / 'mlflow.db'}"


def arm(runs: Path, window: int, sweep: str, lr: float = 1e-3) -> RunFolder:
    asked = experiment(window, name=f"ctx{window}_lr{lr:g}", lr=lr)
    axes = {"model.context_length": window, "train.lr": lr}
    return finished_run(
        runs, asked, {1000: window / 1000}, i2t=window / 1000, t2i=window / 1000, sweep=sweep, axes=axes
    )


def parent_of(uri: str, runs: Path, sweep: str) -> Any:
    (record,) = read_json(runs / sweep / "mlflow.json")["parents"]
    return client(uri).get_run(record["run_id"])


def all_of(uri: str, experiment_name: str) -> list[Any]:
    found = client(uri).get_experiment_by_name(experiment_name)
    return list(client(uri).search_runs([found.experiment_id]))


def test_one_parent_however_often_and_in_what_order(tmp_path: Path, store: str) -> None:
    runs = [arm(tmp_path, w, "family") for w in (77, 512)]
    sync(runs[1:], store)
    sync(runs, store)
    sync(runs[:1], store)
    parent = parent_of(store, tmp_path, "family")
    found = all_of(store, "family")
    assert len(found) == 3
    assert {r.info.run_name for r in found if r.data.tags.get(PARENT) == parent.info.run_id} == {r.name for r in runs}
    assert (parent.info.run_name, parent.info.status) == ("family", "FINISHED")
    assert parent.data.tags["longclip.kind"] == "sweep" and "longclip.uid" not in parent.data.tags
    assert parent.info.end_time == max(r.info.end_time for r in found)


def compared(found: list[Any]) -> tuple[list[str], list[str], str, str]:
    """What MLflow 3.17's page for comparing runs begins with: three parameters and a metric in the parallel
    coordinates, a parameter and a metric in the scatter plot (its CompareRunView)."""
    params, metrics = [r.data.params for r in found], [r.data.metrics for r in found]
    names = sorted({k for p in params for k in p})
    differing = [k for k in names if len({p.get(k) for p in params}) > 1]
    common = [k for k in metrics[0] if all(k in m for m in metrics)]
    return differing[:3], common[:1], names[0], min({k for m in metrics for k in m})


@pytest.mark.parametrize("ticked", ["the runs", "all"])
def test_comparing_shows_the_window_against_recall(tmp_path: Path, store: str, ticked: str) -> None:
    sweep = f"compare {ticked}"
    sync([arm(tmp_path, w, sweep, lr) for w in (77, 512) for lr in (1e-3, 3e-3)], store)
    found = all_of(store, sweep)
    chosen = [r for r in found if ticked == "all" or PARENT in r.data.tags]
    assert len(chosen) == (5 if ticked == "all" else 4)
    first, metric, x, y = compared(chosen)
    assert first[:2] == ["Window", "axis.train.lr"]
    assert metric == ["Recall at 1"]
    assert (x, y) == ("Window", "Recall at 1")
    assert sorted(r.data.metrics["Recall at 1"] for r in chosen if PARENT in r.data.tags) == [0.077] * 2 + [0.512] * 2


def test_a_run_that_streamed_before_it_was_tested_compares_the_same(tmp_path: Path, store: str) -> None:
    run = make_run(tmp_path, experiment(), "streamed")
    attempt = add_attempt(run, 0)
    train(attempt, 0, 500, 60)
    save_checkpoint(run, 500)
    (one,) = sync([run], store).runs
    assert parent_of(store, tmp_path, "streamed").info.status == "RUNNING"
    assert math.isnan(client(store).get_run(one.run_id).data.metrics["Recall at 1"])
    train(attempt, 500, 1000, 110)
    save_test(run, 0.4, 0.2, 1000)
    end(attempt, "finished", 1000, 200)
    for _ in range(2):
        sync([run], store)
        assert compared([client(store).get_run(one.run_id)])[1] == ["Recall at 1"], "stored before the curves"
        points = history(store, one.run_id, "Recall at 1")
        assert [step for step, _, _ in points] == [0, 0]
        assert client(store).get_run(one.run_id).data.metrics["Recall at 1"] == pytest.approx(0.3)
    assert parent_of(store, tmp_path, "streamed").info.status == "FINISHED"


def test_a_parent_that_was_deleted_is_made_anew(tmp_path: Path, store: str) -> None:
    runs = [arm(tmp_path, w, "orphans") for w in (77, 512)]
    sync(runs, store)
    before = parent_of(store, tmp_path, "orphans").info.run_id
    client(store).delete_run(before)
    sync(runs, store)
    after = parent_of(store, tmp_path, "orphans")
    assert after.info.run_id != before and after.info.status == "FINISHED"
    assert {r.data.tags.get(PARENT) for r in all_of(store, "orphans")} == {None, after.info.run_id}


@pytest.mark.parametrize(
    ("statuses", "status"),
    [
        (["FINISHED", "FINISHED"], "FINISHED"),
        (["FINISHED", "RUNNING", "FAILED"], "RUNNING"),
        (["SCHEDULED", "FAILED"], "SCHEDULED"),
        (["KILLED", "FAILED", "FINISHED"], "FAILED"),
        (["KILLED", "FINISHED"], "KILLED"),
        ([], "RUNNING"),
    ],
)
def test_status(statuses: list[str], status: str) -> None:
    assert together(statuses) == status


def test_what_tells_runs_apart_is_not_the_parents() -> None:
    params = {"Window": "77", "model.context_length": "77", "name": "a", "axis.train.lr": "1", "train.lr": "1"}
    params |= {"model.text.tower": "x", "model.text.pool": "mean", "train.seed": "0"}
    assert shared(params, ["train.lr", "model.text"]) == {"train.seed": "0"}


def test_results_are_under_the_parent_and_replaced(tmp_path: Path, store: str) -> None:
    runs = [arm(tmp_path / "runs", w, "results") for w in (77, 512)]
    sync(runs, store)
    files = [tmp_path / "table.md", tmp_path / "report.html"]
    for round_, value in ((1, 0.5), (2, 0.5), (3, 0.6)):
        for file in files:
            file.write_text(f"round {round_}")
        assert log_results(runs, files, f"table {round_}", {"results": {"Recall at 1/77": value}}, store) == ["results"]
    parent = parent_of(store, tmp_path / "runs", "results")
    (folder,) = client(store).list_artifacts(parent.info.run_id)
    assert folder.path == "results"
    there = Path(client(store).download_artifacts(parent.info.run_id, "results", str(tmp_path)))
    assert {f.name: f.read_text() for f in there.iterdir()} == {"table.md": "round 3", "report.html": "round 3"}
    assert parent.data.tags["mlflow.note.content"] == "table 3"
    assert [v for _, v, _ in history(store, parent.info.run_id, "Recall at 1/77")] == [0.5, 0.6], "sent when it changed"
    assert log_results(runs[:1], files, "half", {}, store) == [], "a part of a sweep is not the sweep's result"
    long = "\n".join(["| a | table |"] * 2000)
    log_results(runs, files, long, {}, store)
    note = parent_of(store, tmp_path / "runs", "results").data.tags["mlflow.note.content"]
    assert len(note) <= 8000 and re.search(r"\| a \| table \|\n\n\.\.\. the rest is in results/table.md", note)


def test_collect_says_where_its_results_are(tmp_path: Path, store: str) -> None:
    for window in (77, 512):
        arm(tmp_path / "runs", window, "shown")
    site = tmp_path / "site.yaml"
    site.write_text(f"name: here\nruns: {tmp_path / 'runs'}\ntracking: {store}\n")
    said = longclip("collect", "shown", "--site", str(site), cwd=tmp_path)
    assert "MLflow: shown (2 runs synced)" in said and "MLflow: results under shown" in said
    parent = parent_of(store, tmp_path / "runs", "shown")
    files = {f.path for f in client(store).list_artifacts(parent.info.run_id, "results")}
    assert {"results/report.html", "results/table.md", "results/curves.png"} <= files
    assert parent.data.metrics["sweep/Recall at 1/train.lr 0.001/512"] == 0.512
    assert "ctx512" in parent.data.tags["mlflow.note.content"]


def test_suites_of_the_chosen_checkpoint_are_metrics(tmp_path: Path, store: str) -> None:
    run = arm(tmp_path, 77, "suites")
    for checkpoint, accuracy in (("step-00000005", 0.1), ("step-00000010", 0.7)):
        record = {
            "suite": "public",
            "suite_hash": "ab",
            "weights": "cd",
            "checkpoint": checkpoint,
            "samples": 1000,
            "context_length": 77,
            "time": 1_700_000_500.0,
            "tasks": {
                "stain": {"kind": "classification", "metrics": {"accuracy": accuracy, "auc": float("nan")}},
                "long": {"kind": "retrieval", "metrics": {"w512/i2t_recall_at_1": 0.4, "len77-154/pairs": 3}},
            },
        }
        (run.evaluations / "public").mkdir(exist_ok=True)
        write_json(run.evaluations / "public" / f"{checkpoint}.json", record)
    (one,) = sync([run], store).runs
    found = client(store).get_run(one.run_id).data.metrics
    ours = {k: v for k, v in found.items() if k.startswith("public/")}
    assert math.isnan(ours.pop("public/stain/auc"))
    assert ours == {
        "public/stain/accuracy": 0.7,
        "public/long/w512/i2t_recall_at_1": 0.4,
        "public/long/len77-154/pairs": 3.0,
    }
