"""Streaming to a real MLflow server, which is killed, comes back, hangs or was never there."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from longclip.run.attempts import Attempt
from longclip.run.folder import RunFolder, read_json
from longclip.track.mlflow import sync
from longclip.track.parent import log_results
from longclip.track.stream import reachable, start_stream, streamable
from tests.helpers import add_attempt, end, experiment, make_run, save_checkpoint, train
from tests.track.test_mlflow import client, history

START_OF_SERVER = 120.0


class Server:
    """``mlflow server`` on SQLite, to be killed and started again on the same port."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.uri = f"http://127.0.0.1:{self.port}"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port)]
        command += ["--workers", "1", "--backend-store-uri", f"sqlite:///{self.folder}/mlflow.db"]
        command += ["--artifacts-destination", str(self.folder / "artifacts")]
        env = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
        with (self.folder / "server.log").open("ab") as log:
            self._process = subprocess.Popen(
                command, cwd=self.folder, env=env, stdout=log, stderr=log, start_new_session=True
            )
        until(lambda: reachable(self.uri), START_OF_SERVER)

    def kill(self) -> None:
        if self._process is not None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None
            until(lambda: not reachable(self.uri))


def until(true: Callable[[], bool], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, "it did not come about in time"
        time.sleep(0.2)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    made = Server(tmp_path_factory.mktemp("server"))
    made.start()
    yield made
    made.kill()


def begun(runs: Path, sweep: str) -> tuple[RunFolder, Attempt]:
    run = make_run(runs, experiment(), sweep)
    return run, add_attempt(run, 0)


def steps(server: Server, run: RunFolder) -> list[int]:
    """Positions of the curve as the server has it, doubles included."""
    file = run.path / "mlflow.json"
    return (
        [step for step, _, _ in history(server.uri, read_json(file)["run_id"], "train/loss")] if file.exists() else []
    )


def status(server: Server, run: RunFolder) -> str:
    return str(client(server.uri).get_run(read_json(run.path / "mlflow.json")["run_id"]).info.status)


def log_of(attempt: Attempt) -> str:
    return (attempt.logs / "stream.log").read_text()


def gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def test_a_server_that_is_killed_and_comes_back_misses_nothing(server: Server, tmp_path: Path) -> None:
    run, attempt = begun(tmp_path, "restarted")
    stream = start_stream(attempt, server.uri, every=0.5)
    assert stream.pid is not None
    for signum in (signal.SIGUSR2, signal.SIGTERM):  # at once: Python may not have started yet
        os.kill(stream.pid, signum)
    try:
        train(attempt, 0, 300, 60)
        save_checkpoint(run, 300)
        until(lambda: steps(server, run) == [100, 200, 300])
        assert status(server, run) == "RUNNING"
        for signum in (signal.SIGUSR2, signal.SIGTERM):
            os.kill(stream.pid, signum)

        server.kill()
        train(attempt, 300, 600, 90)
        save_checkpoint(run, 600)
        until(lambda: "does not answer; trying on" in log_of(attempt) or "Error" in log_of(attempt))
        server.start()
        until(lambda: len(steps(server, run)) >= 6)

        server.kill()
        train(attempt, 600, 1000, 120)
        end(attempt, "finished", 1000, 200)
        stream.stop(timeout=30)
        assert gone(stream.pid)
    finally:
        stream.stop(timeout=0)
    server.start()
    (one,) = sync([run], server.uri).runs
    assert one.status == status(server, run) == "FINISHED"
    assert steps(server, run) == list(range(100, 1001, 100))


def test_the_last_points_are_sent_before_it_stops(server: Server, tmp_path: Path) -> None:
    run, attempt = begun(tmp_path, "stopped")
    stream = start_stream(attempt, server.uri)
    until(lambda: (run.path / "mlflow.json").exists())
    train(attempt, 0, 500, 60)
    end(attempt, "finished", 500, 200)
    stream.stop(timeout=60)
    assert steps(server, run) == [100, 200, 300, 400, 500]
    assert status(server, run) == "FINISHED"
    assert "FINISHED, sent up to 500 samples" in log_of(attempt)


def test_jobs_that_begin_at_once_have_one_parent(server: Server, tmp_path: Path) -> None:
    runs = [make_run(tmp_path, experiment(window), "siblings") for window in (77, 154, 512)]
    attempts = [add_attempt(run, 0) for run in runs]
    streams = [start_stream(attempt, server.uri) for attempt in attempts]
    until(lambda: all((run.path / "mlflow.json").exists() for run in runs))
    for attempt, verdict in zip(attempts, ("finished", "finished", "crashed"), strict=True):
        train(attempt, 0, 1000, 60)
        end(attempt, verdict, 1000, 200)
    for stream in streams:
        stream.stop(timeout=60)
    (record,) = read_json(tmp_path / "siblings" / "mlflow.json")["parents"]
    parent = client(server.uri).get_run(record["run_id"])
    found = client(server.uri).search_runs([parent.info.experiment_id])
    assert [r.data.tags.get("mlflow.parentRunId") for r in found].count(parent.info.run_id) == 3 == len(found) - 1
    assert parent.info.status == "FAILED", "the worst of the three"
    (tmp_path / "report.html").write_text("results")
    assert log_results(runs, [tmp_path / "report.html"], "a table", {}, server.uri) == ["siblings"]
    there = client(server.uri).download_artifacts(parent.info.run_id, "results/report.html", str(tmp_path))
    assert Path(there).read_text() == "results"


PARENT = """
import sys, time
from pathlib import Path
from longclip.run.attempts import Attempt
from longclip.track.stream import start_stream
stream = start_stream(Attempt(Path(sys.argv[1])), sys.argv[2])
print(stream.pid, flush=True)
time.sleep(600)
"""


def test_it_does_not_outlive_its_parent_and_says_that_the_run_was_killed(server: Server, tmp_path: Path) -> None:
    run, attempt = begun(tmp_path, "killed")
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, str(attempt.path), server.uri], stdout=subprocess.PIPE, text=True
    )
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    until(lambda: (run.path / "mlflow.json").exists() and status(server, run) == "RUNNING")
    parent.kill()
    parent.wait()
    until(lambda: gone(child))
    assert status(server, run) == "KILLED"
    add_attempt(run, 1000)
    assert sync([run], server.uri).runs[0].status == status(server, run) == "RUNNING"


def test_a_server_that_accepts_and_never_answers(tmp_path: Path) -> None:
    run, attempt = begun(tmp_path, "hanging")
    with socket.create_server(("127.0.0.1", 0)) as deaf:
        stream = start_stream(attempt, f"http://127.0.0.1:{deaf.getsockname()[1]}")
        with deaf.accept()[0]:
            stream.stop(timeout=1)
        assert stream.pid is not None and gone(stream.pid)
    assert not (run.path / "mlflow.json").exists()


def test_a_server_that_is_not_there_is_told_once(tmp_path: Path) -> None:
    _, attempt = begun(tmp_path, "absent")
    stream = start_stream(attempt, "http://127.0.0.1:9", every=0.2)
    until(lambda: "does not answer" in log_of(attempt))
    time.sleep(1)
    stream.stop(timeout=30)
    assert log_of(attempt).count("\n") == 1


def test_a_child_that_cannot_be_started_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _, attempt = begun(tmp_path, "nochild")
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    monkeypatch.setattr(sys, "executable", str(tmp_path / "no-python"))
    start_stream(attempt, "http://127.0.0.1:9").stop()
    assert "no streaming to MLflow" in capsys.readouterr().out
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == before


@pytest.mark.parametrize(
    ("uri", "streams"),
    [
        ("http://tracking:5000", True),
        ("https://mlflow.example.org/team", True),
        ("https://me:secret@mlflow.example.org", False),
        ("https://mlflow.example.org/?token=secret", False),
        ("sqlite:////runs/mlflow.db", False),
        (None, False),
    ],
)
def test_jobs_stream_to_servers_only_and_record_no_password(uri: str | None, streams: bool) -> None:
    assert streamable(uri) == (uri if streams else None)
