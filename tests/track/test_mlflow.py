"""Journals into a real SQLite store, and read back."""

from __future__ import annotations

import json
import math
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from longclip.errors import SiteError, UserError
from longclip.run.folder import RunFolder, read_json, write_json
from longclip.track import lease as leases
from longclip.track.lease import Lease
from longclip.track.mlflow import sync
from tests.helpers import START, add_attempt, end, experiment, finished_run, make_run, save_checkpoint, save_test, train


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    """One store for the module: making its tables takes seconds. Tests use sweeps of their own."""
    return f"sqlite:///{tmp_path_factory.mktemp('store') / 'mlflow.db'}"


def client(uri: str) -> Any:
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=uri)


def history(uri: str, run_id: str, metric: str) -> list[tuple[int, float, int]]:
    points = client(uri).get_metric_history(run_id, metric)
    return sorted((p.step, p.value, p.timestamp) for p in points)


def interrupted_run(runs: Path, sweep: str) -> RunFolder:
    """Killed at 700, checkpoint at 500; continued from there, now at 800, checkpoint at 700."""
    run = make_run(runs, experiment(), sweep)
    train(add_attempt(run, 0), 0, 700, 60, losses={300: math.nan})
    save_checkpoint(run, 500)
    train(add_attempt(run, 1000), 500, 800, 1060)
    save_checkpoint(run, 700)
    return run


def test_two_overlapping_attempts_are_one_curve(tmp_path: Path, store: str) -> None:
    run = interrupted_run(tmp_path, "overlap")
    first = sync([run], store)
    (one,) = first.runs
    curve = history(store, one.run_id, "train/loss")
    # 500 is where the second attempt resumed; 800 is beyond the newest checkpoint.
    assert [step for step, _, _ in curve] == [100, 200, 300, 400, 500, 600, 700]
    assert curve[5][2] == round((START + 1060) * 1000), "600 is the second attempt's, with its time"
    assert math.isnan(curve[2][1])
    assert (one.status, one.samples) == ("RUNNING", 700)
    assert str(first) == "overlap (1 run synced)"

    again = sync([run], store)
    assert again.runs[0].run_id == one.run_id
    assert [p[0] for p in history(store, one.run_id, "train/loss")] == [p[0] for p in curve]

    third = add_attempt(run, 2000)
    train(third, 700, 1000, 2060, val={1000: 0.5})
    save_test(run, 0.4, 0.3, 1000, ceiling=0.8)
    end(third, "finished", 1000, 2100)
    (done,) = sync([run], store).runs
    assert (done.run_id, done.status, done.samples) == (one.run_id, "FINISHED", 1000)
    whole = history(store, one.run_id, "train/loss")
    assert [step for step, _, _ in whole] == list(range(100, 1001, 100))
    assert whole[7][2] == round((START + 2060) * 1000), "the lost 800 never reached the store"
    sync([run], store)
    assert len(history(store, one.run_id, "train/loss")) == 10
    for name, value, step in (
        ("test/i2t_recall_at_1", 0.4, 1000),
        ("test/ceiling_t2i", 0.8, 1000),
        ("text/waste", 0.4, 1000),
        ("text/padding_avoided_overall", 1 - 60 / 77, 1000),
        ("val/mean_recall_at_1", 0.5, 1000),
    ):
        ((at, found, _),) = history(store, one.run_id, name)
        assert (at, found) == (step, pytest.approx(value)), name


def test_what_mlflow_shows_of_a_run(tmp_path: Path, store: str) -> None:
    long = {"model_type": "modernbert", "notes": "x" * 7000, "odd@key": 1}
    asked = experiment(name="shown")
    asked = asked.model_copy(
        update={"model": asked.model.model_copy(update={"text": asked.model.text.model_copy(update={"config": long})})}
    )
    run = make_run(tmp_path, asked, "shown")
    attempt = add_attempt(run, 0)
    train(attempt, 0, 1000, 60)
    save_checkpoint(run, 1000)
    save_test(run, 0.1, 0.1, 500)
    end(attempt, "finished", 1000, 200)
    sync([run], store)
    run_id = sync([run], store).runs[0].run_id
    shown = client(store).get_run(run_id)
    assert shown.info.run_name == run.name
    assert (shown.info.start_time, shown.info.end_time) == (round(START * 1000), round((START + 200) * 1000))
    params = shown.data.params
    assert (params["train.lr"], params["model.context_length"], params["data.train"]) == ("0.001", "77", "tiny-train")
    assert len(params["model.text.config.notes"]) == 6000
    assert params["model.text.config.odd_key"] == "1"
    assert not [k for k in params if k.startswith("slurm")]
    tags = {k.removeprefix("longclip."): v for k, v in shown.data.tags.items() if k.startswith("longclip.")}
    tags = {k: v for k, v in tags.items() if not k.startswith("summary")}
    assert tags == {
        "context_length": "77",
        "sweep": "shown",
        "uid": run.uid,
        "attempts": "1",
        "jobs": "101",
        "hosts": "n1,n2",
        "code": "c0dec0de",
        "commit": "9f31c02",
    }
    inputs = {i.dataset.name: (i.dataset.source, i.dataset.digest) for i in shown.inputs.dataset_inputs}
    assert len(shown.inputs.dataset_inputs) == 3
    assert inputs["data.val"] == ("tiny-val", "1" * 36)
    assert inputs["data.test"] == ("tiny-test", "7" * 36)
    place = client(store).get_experiment(shown.info.experiment_id).artifact_location
    assert place == (Path(store.removeprefix("sqlite:///")).parent / "mlartifacts").as_uri()


@pytest.mark.parametrize(
    ("verdict", "cancelled", "state", "status"),
    [
        ("finished", False, None, "FINISHED"),
        ("crashed", False, None, "FAILED"),
        ("diverged", True, None, "FAILED"),
        ("interrupted", False, None, "SCHEDULED"),
        ("interrupted", True, None, "KILLED"),
        (None, True, None, "KILLED"),
        (None, False, None, "RUNNING"),
        # The scheduler has been asked, too.
        (None, False, "lost", "KILLED"),
        (None, False, "running", "RUNNING"),
        (None, False, "queued", "SCHEDULED"),
        (None, False, "unknown", "RUNNING"),
        ("interrupted", False, "interrupted", "KILLED"),
        ("interrupted", False, "queued", "SCHEDULED"),
        ("hung", False, "hung", "FAILED"),
    ],
)
def test_status(
    tmp_path: Path, store: str, verdict: str | None, cancelled: bool, state: str | None, status: str
) -> None:
    run = make_run(tmp_path, experiment(), "status")
    attempt = add_attempt(run, 0)
    train(attempt, 0, 300, 60)
    if verdict:
        end(attempt, verdict, 300, 100)
    if cancelled:
        write_json(attempt.path / "cancelled.json", {})
    (one,) = sync([run], store, {run.path: state} if state else None).runs
    shown = client(store).get_run(one.run_id).info
    assert one.status == shown.status == status
    if status in ("KILLED", "FAILED", "FINISHED"):
        assert shown.end_time == round((START + (100 if verdict else 80)) * 1000), "the verdict's, or the last point's"
    # Nothing is durable without a checkpoint.
    assert len(history(store, one.run_id, "train/loss")) == (3 if verdict == "finished" else 0)


def test_a_failed_run_that_goes_on_is_running_again(tmp_path: Path, store: str) -> None:
    run = make_run(tmp_path, experiment(), "retried")
    end(add_attempt(run, 0), "crashed", 0, 10)
    assert sync([run], store).runs[0].status == "FAILED"
    add_attempt(run, 100)
    (one,) = sync([run], store).runs
    assert client(store).get_run(one.run_id).info.status == "RUNNING"


def test_a_run_that_never_started_is_left_out(tmp_path: Path, store: str) -> None:
    report = sync([make_run(tmp_path, experiment(), "waiting")], store)
    assert (report.runs, report.waiting, str(report)) == ((), 1, "nothing to send (0 runs synced, 1 not started)")


def test_a_copied_folder_goes_on_as_the_same_mlflow_run(tmp_path: Path, store: str) -> None:
    run = interrupted_run(tmp_path / "here", "copied")
    before = sync([run], store).runs[0]
    shutil.copytree(tmp_path / "here", tmp_path / "there")
    copy = RunFolder(tmp_path / "there" / "copied" / run.name)
    save_checkpoint(copy, 800)
    after = sync([copy], store).runs[0]
    assert (after.run_id, after.samples) == (before.run_id, 800)
    assert [p[0] for p in history(store, after.run_id, "train/loss")] == list(range(100, 801, 100))


def test_points_that_a_reader_could_not_see_yet_are_sent_later(tmp_path: Path, store: str) -> None:
    run = interrupted_run(tmp_path, "late")
    journal = run.attempts / "0002" / "journal.jsonl"
    text = journal.read_text()
    journal.write_text("")  # NFS: `latest` has moved, but the journal's last block is still on the compute node
    assert sync([run], store).runs[0].samples == 500
    journal.write_text(text)
    (one,) = sync([run], store).runs
    assert [p[0] for p in history(store, one.run_id, "train/loss")] == list(range(100, 701, 100))


def test_another_store_gets_a_run_of_its_own_and_all_points(tmp_path: Path, store: str) -> None:
    run = interrupted_run(tmp_path, "moved")
    before = sync([run], store).runs[0].run_id
    other = f"sqlite:///{tmp_path / 'deep' / 'er' / 'mlflow.db'}"
    after = sync([run], other).runs[0].run_id
    assert after != before
    assert len(history(other, after, "train/loss")) == 7
    assert read_json(run.path / "mlflow.json") == {"run_id": after, "uri": other, "samples": 700, "attempt": 2}


def test_what_a_broken_checkpoint_covered_is_not_sent_twice(tmp_path: Path, store: str) -> None:
    """All up to 700 was durable and sent; then the checkpoint there turned out to be broken, and 600 was taken."""
    run = make_run(tmp_path, experiment(), "broken")
    train(add_attempt(run, 0), 0, 700, 60)
    for samples in (600, 700):
        save_checkpoint(run, samples)
    (before,) = sync([run], store).runs
    (run.checkpoints / "step-00000007").rename(run.checkpoints / "broken-step-00000007")
    second = add_attempt(run, 1000)
    train(second, 600, 600, 1060)
    assert sync([run], store).runs[0].samples == 700, "while it is on its way"
    train(second, 600, 900, 1060)
    save_checkpoint(run, 900)
    for _ in range(2):
        assert sync([run], store).runs[0].samples == 900
        assert [p[0] for p in history(store, before.run_id, "train/loss")] == list(range(100, 901, 100))


def test_an_mlflow_run_that_was_deleted_is_made_anew(tmp_path: Path, store: str) -> None:
    run = interrupted_run(tmp_path, "deleted")
    before = sync([run], store).runs[0].run_id
    client(store).delete_run(before)
    after = sync([run], store).runs[0].run_id
    assert after != before
    assert len(history(store, after, "train/loss")) == 7


SYNC = """
import sys
from pathlib import Path
from longclip.run.folder import RunFolder
from longclip.track.mlflow import sync
print(sync([RunFolder(Path(p)) for p in sys.argv[2:]], sys.argv[1]).runs[0].run_id)
"""


def test_four_at_once_on_a_fresh_store(tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    runs = [interrupted_run(tmp_path, "shared"), finished_run(tmp_path, experiment(512), {1000: 0.5}, sweep="shared")]
    paths = [str(r.path) for r in runs]
    jobs = [
        subprocess.Popen(
            [sys.executable, "-c", SYNC, uri, *paths], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for _ in range(4)
    ]
    ends = [(*job.communicate(timeout=120), job.returncode) for job in jobs]
    assert [code for _, _, code in ends] == [0] * 4, ends
    assert len({out for out, _, _ in ends}) == 1, "all four found, or made, the same MLflow run"
    assert not [err for _, err, _ in ends if err], "and said nothing else"
    assert len(history(uri, ends[0][0].strip(), "train/loss")) == 7
    assert not list(tmp_path.glob("*.lock*"))
    found = client(uri).search_runs([client(uri).get_experiment_by_name("shared").experiment_id])
    (parent,) = [r.info.run_id for r in found if "mlflow.parentRunId" not in r.data.tags]
    assert [r.data.tags["mlflow.parentRunId"] for r in found if r.info.run_id != parent] == [parent] * 2


def _lock(file: Path, **holder: Any) -> None:
    file.write_text(
        json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "time": START, "token": "t", **holder})
    )


def test_a_lease_whose_process_is_gone_is_taken_over_at_once(tmp_path: Path) -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    file = tmp_path / "db.lock"
    _lock(file, pid=gone.pid)
    with Lease(file):
        assert read_json(file)["pid"] == os.getpid()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("content", [None, "", '{"host": "els'])
def test_a_lease_that_nobody_renews_is_taken_over(tmp_path: Path, content: str | None) -> None:
    file = tmp_path / "db.lock"
    _lock(file, host="elsewhere")
    if content is not None:
        file.write_text(content)  # killed in the act
    old = time.time() - leases.STALE - 1
    os.utime(file, (old, old))
    with Lease(file):
        assert read_json(file)["pid"] == os.getpid()
    assert not list(tmp_path.iterdir())


def test_a_lease_that_is_held_is_waited_for_and_then_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leases, "WAIT", 0.3)
    _lock(tmp_path / "mlflow.db.lock", host="r7i4", pid=4711)
    with pytest.raises(SiteError, match=r"held by process 4711 on r7i4 since 2023"):
        sync([], f"sqlite:///{tmp_path / 'mlflow.db'}")
    assert read_json(tmp_path / "mlflow.db.lock")["host"] == "r7i4"


def test_a_lease_of_another_host_that_falls_silent_is_taken_over(tmp_path: Path) -> None:
    """Its node was killed in the middle of a sync; that clocks differ does not matter."""
    file = tmp_path / "run.lock"
    _lock(file, host="n1")
    os.utime(file, (time.time() + 3600, time.time() + 3600))
    with Lease(file, quiet=0.5):
        assert read_json(file)["pid"] == os.getpid()


def test_a_lease_that_is_renewed_is_not_taken_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leases, "WAIT", 2.0)
    file = tmp_path / "run.lock"
    _lock(file, host="n1")
    done = threading.Event()

    def renew() -> None:
        while not done.wait(0.1):
            os.utime(file)

    other = threading.Thread(target=renew)
    other.start()
    try:
        with pytest.raises(SiteError, match="held by process"), Lease(file, quiet=1.0):
            pass
    finally:
        done.set()
        other.join()
    assert read_json(file)["host"] == "n1"


def test_many_find_an_abandoned_lease_and_one_at_a_time_has_it(tmp_path: Path) -> None:
    file = tmp_path / "db.lock"
    _lock(file, host="elsewhere")
    os.utime(file, (START, START))
    inside, most = [], []

    def work() -> None:
        for _ in range(3):
            with Lease(file):
                inside.append(1)
                most.append(len(inside))
                time.sleep(0.005)
                inside.pop()

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(most), max(most)) == (24, 1)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("uri", ["file:///tmp/mlruns", "mlruns", "sqlite://", "postgresql://me:secret@db/x"])
def test_a_uri_that_is_neither_a_server_nor_sqlite(uri: str) -> None:
    with pytest.raises(UserError, match=r"valid is http://HOST:PORT, https://HOST, or sqlite:///PATH") as caught:
        sync([], uri)
    assert "secret" not in str(caught.value)


def test_a_server_that_is_not_there(tmp_path: Path) -> None:
    run = interrupted_run(tmp_path, "unreachable")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with pytest.raises(SiteError, match=f"MLflow at http://127.0.0.1:{port}") as caught:
        sync([run], f"http://me:secret@127.0.0.1:{port}")
    assert "secret" not in str(caught.value)
    assert not (run.path / "mlflow.json").exists()
    assert not (run.path / ".mlflow.lock").exists()
    assert "MLFLOW_HTTP_REQUEST_TIMEOUT" not in os.environ


def test_it_does_not_need_torch() -> None:
    check = (
        "import sys, longclip.track.stream, longclip.launch.tracking, longclip.launch.prune;"
        "assert 'mlflow' not in sys.modules; import mlflow;"
        "assert not {'torch', 'transformers', 'deepspeed'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", check], check=True)
