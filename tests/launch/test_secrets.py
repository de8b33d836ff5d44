"""What a user keeps in the environment reaches the job, and nothing that others can read or that is kept."""

from __future__ import annotations

import secrets
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from longclip.run.attempts import attempts_of
from longclip.run.folder import read_json
from tests.conftest import Cluster
from tests.faults.trial import until
from tests.launch.small import longclip, make_sweep, the_run

NAMES = ("MLFLOW_TRACKING_TOKEN", "HF_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY")
SHORT = ("--set", "train.samples=480", "--set", "slurm.tasks_per_node=1")


class Onlooker:
    """What ``ps`` shows to everybody on this machine while the block runs, ten times a second."""

    def __init__(self, values: list[str]) -> None:
        self.lines: set[str] = set()
        self.told = False
        """whether a worker had one of ``values`` in its environment"""
        self._values = [v.encode() for v in values]
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look)

    def __enter__(self) -> Onlooker:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._over.wait(0.1):
            for entry in Path("/proc").glob("[0-9]*"):
                try:
                    line = (entry / "cmdline").read_bytes()
                    if b"submitit.core._submit" in line and not self.told:
                        self.told = any(v in (entry / "environ").read_bytes() for v in self._values)
                except OSError:  # it has ended
                    continue
                self.lines.add(line.replace(b"\0", b" ").decode(errors="replace"))


@pytest.fixture
def values(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """One secret in each variable of NAMES, unlike anything else there is."""
    made = [secrets.token_hex(16) for _ in NAMES]
    for name, value in zip(NAMES, made, strict=True):
        monkeypatch.setenv(name, value)
    return made


def assert_nowhere(values: list[str], folder: Path, *texts: str) -> None:
    files = [p for p in folder.rglob("*") if p.is_file()]
    assert files
    for value in values:
        assert not [p for p in files if value.encode() in p.read_bytes()]
        assert not [text for text in texts if value in text]


def test_a_local_run_keeps_no_secret(tmp_path: Path, values: list[str]) -> None:
    """Of a run that ends and one that crashes: records, logs, pickles, the MLflow database, tables, command lines."""
    sweep = make_sweep(tmp_path, (4, 5))
    runs = tmp_path / "runs"
    words = ("--on", "local", "--runs", runs)
    crash = "engine.deepspeed={zero_optimization: {no_such_option: 1}}"
    with Onlooker(values) as seen:
        said = longclip("submit", sweep / "ctx4.yaml", *SHORT, *words, cwd=tmp_path)
        said += longclip("submit", sweep / "ctx5.yaml", *SHORT, "--set", crash, *words, cwd=tmp_path, code=1)
        said += longclip("collect", "small", "--runs", runs, "--out", runs / "tables", cwd=tmp_path)
        said += longclip("logs", "ctx5", "--runs", runs, cwd=tmp_path)
    assert (runs / "mlflow.db").is_file() and "no_such_option" in said
    assert seen.told, "the worker had them, so that it can reach what they are for"
    assert_nowhere(values, runs, said, *seen.lines)


@pytest.fixture
def empty_queue(cluster: Cluster) -> Iterator[None]:
    yield
    subprocess.run("squeue -h -o %A | xargs -r scancel", shell=True, check=False)


def test_a_slurm_job_keeps_no_secret(empty_queue: None, tmp_path: Path, values: list[str]) -> None:
    """The same for a job that streams to a server, and for the batch script as Slurm has it."""
    sweep = make_sweep(tmp_path, (4,))
    runs = tmp_path / "runs"
    (tmp_path / "site.yaml").write_text("tracking: http://127.0.0.1:9\n")  # nobody answers there
    words = ("submit", sweep, *SHORT, "--site", tmp_path / "site.yaml", "--runs", runs)
    with Onlooker(values) as seen:
        said = longclip(*words, "--dry-run", cwd=tmp_path) + longclip(*words, cwd=tmp_path)
        (attempt,) = attempts_of(the_run(runs, "ctx4"))
        script = subprocess.check_output(["scontrol", "write", "batch_script", str(attempt.job), "-"], text=True)
        until(lambda: not subprocess.check_output(["squeue", "--noheader"]), 120, "the job has left")
    assert "#SBATCH" in said and "srun" in script and read_json(attempt.path / "ended.json")["verdict"] == "finished"
    assert seen.told and any("longclip.track.stream" in line for line in seen.lines)
    assert_nowhere(values, runs, said, script, *seen.lines)


def test_a_password_in_the_tracking_address_stays_in_the_site_profile(
    empty_queue: None, tmp_path: Path, values: list[str]
) -> None:
    sweep = make_sweep(tmp_path, (4,))
    runs = tmp_path / "runs"
    (tmp_path / "site.yaml").write_text(f"tracking: https://me:{values[0]}@mlflow.example.org\npartition: pretend\n")
    words = ("submit", sweep, "--site", tmp_path / "site.yaml", "--runs", runs)
    said = longclip(*words, "--dry-run", cwd=tmp_path) + longclip(*words, cwd=tmp_path)
    assert "jobs do not stream to the tracking server" in said
    assert_nowhere(values, runs, said)
