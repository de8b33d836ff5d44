"""``longclip sync``: the status in MLflow is the scheduler's and the records', and --watch goes on until runs end."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from longclip.errors import SiteError
from longclip.launch import tracking
from longclip.launch.tracking import keep_synced, sync_runs
from longclip.run.attempts import Attempt
from longclip.run.folder import RunFolder, read_json, write_json
from longclip.track import lease as leases
from tests.helpers import add_attempt, end, experiment, make_run, train
from tests.launch.small import environment
from tests.track.test_mlflow import client, history


@contextmanager
def at_work(run: RunFolder) -> Iterator[tuple[Attempt, subprocess.Popen[bytes]]]:
    """An attempt whose job is a process of this machine."""
    attempt = add_attempt(run, 0)
    with subprocess.Popen([sys.executable, "-c", "input()", "longclip"], stdin=subprocess.PIPE) as job:
        record = {"executor": "local", "job": str(job.pid), "host": socket.gethostname(), "samples": 1000}
        write_json(attempt.path / "submitted.json", record)
        try:
            yield attempt, job
        finally:
            job.kill()


def write_lock(folder: Path) -> Path:
    """The lease of a database beside it, held by somebody else."""
    file = folder / "mlflow.db.lock"
    write_json(file, {"host": "r7i4", "pid": 4711, "time": time.time(), "token": "t"})
    return file


def status(uri: str, run: RunFolder) -> str:
    return str(client(uri).get_run(read_json(run.path / "mlflow.json")["run_id"]).info.status)


def test_after_kill_9_mlflow_says_so(tmp_path: Path) -> None:
    run = make_run(tmp_path, experiment())
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    with at_work(run) as (attempt, job):
        train(attempt, 0, 300, 60)
        sync_runs([run], uri)
        assert status(uri, run) == "RUNNING"
        job.kill()
        job.wait()
        sync_runs([run], uri)
        assert status(uri, run) == "KILLED"


def test_it_goes_on_until_the_run_ends_whatever_the_store_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracking, "EVERY", 0.1)
    run = make_run(tmp_path, experiment())
    monkeypatch.setattr(leases, "WAIT", 0.3)
    database = tmp_path / "mlflow.db"
    held = write_lock(tmp_path)
    said: list[str] = []
    with at_work(run) as (attempt, _):
        watch = threading.Thread(target=keep_synced, args=([run], f"sqlite:///{database}", said.append))
        watch.start()
        deadline = time.monotonic() + 60
        while not said and time.monotonic() < deadline:
            time.sleep(0.1)
        assert "held by process 4711 on r7i4" in said[0] and said[0].endswith("; trying again")
        held.unlink()
        train(attempt, 0, 1000, 60)
        end(attempt, "finished", 1000, 200)
        watch.join(60)
    assert not watch.is_alive()
    assert said[-1].startswith("tiny (1 run synced): ")
    assert status(f"sqlite:///{database}", run) == "FINISHED"
    run_id = read_json(run.path / "mlflow.json")["run_id"]
    assert len(history(f"sqlite:///{database}", run_id, "train/loss")) == 10


def test_the_last_sync_must_not_fail_in_silence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leases, "WAIT", 0.3)
    run = make_run(tmp_path, experiment())
    end(add_attempt(run, 0), "finished", 0, 10)
    write_lock(tmp_path)
    with pytest.raises(SiteError, match="held by process 4711 on r7i4"):
        keep_synced([run], f"sqlite:///{tmp_path}/mlflow.db", print)


def test_ctrl_c_ends_the_watching_quietly(tmp_path: Path) -> None:
    run = make_run(tmp_path, experiment())
    with at_work(run):
        command = [sys.executable, "-m", "longclip.cli", "sync", "--watch", "--runs", str(tmp_path)]
        front = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment()
        )
        assert front.stdout is not None
        assert "tiny (1 run synced)" in front.stdout.readline()
        front.send_signal(signal.SIGINT)
        assert front.communicate(timeout=60)[0] == ""
    assert front.returncode == 0
