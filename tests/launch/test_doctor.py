"""``doctor`` on a machine without Slurm: what it says of folders, datasets, the worker and MLflow."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from longclip.launch import disk, doctor
from longclip.launch.cluster import gpus_of
from longclip.launch.site import Site
from tests.data.test_loader import make_shards
from tests.launch.small import environment


def one(site: Site, what: str) -> doctor.Check:
    (check,) = [c for c in doctor.examine(site) if c.what == what]
    return check


@pytest.fixture(autouse=True)
def no_slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "bash").symlink_to("/bin/bash")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))


def test_no_slurm_is_a_failure_and_exit_code_3(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "longclip.cli", "doctor", "--runs", "runs"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment())
    assert done.returncode == 3 and "fail  Slurm: sbatch, srun" in done.stdout, done
    assert not (tmp_path / "runs").exists(), "doctor leaves nothing behind"
    done = subprocess.run([*command, "--json"], cwd=tmp_path, capture_output=True, text=True, env=environment())
    levels = {c["what"]: c["level"] for c in json.loads(done.stdout)}
    assert levels["Slurm"] == "fail" and levels["worker"] == "ok" and levels["MLflow"] == "ok", levels


def test_folders(tmp_path: Path) -> None:
    assert one(Site(runs=tmp_path / "runs"), "runs").level in ("ok", "warn")
    assert one(Site(runs=Path("/dev/shm/runs")), "runs").said.endswith("looks local to this node (tmpfs)")
    assert one(Site(runs=Path("/proc/runs")), "runs").level == "fail"
    assert one(Site(runs=Path("/proc/runs")), "MLflow").level == "fail"
    (tmp_path / "file").touch()
    assert one(Site(cache=tmp_path / "file"), "cache").level == "fail"
    assert disk.disk_of(tmp_path / "a" / "b").folder == tmp_path


def test_datasets(tmp_path: Path) -> None:
    make_shards(tmp_path / "good", [3, 4])
    (tmp_path / "bare").mkdir()
    site = Site(datasets={"good": str(tmp_path / "good"), "bare": str(tmp_path / "bare")})
    assert one(site, "dataset good").said == "7 samples in 2 shards"
    bare = one(site, "dataset bare")
    assert bare.level == "fail" and "longclip data index" in bare.next


@pytest.mark.parametrize(
    ("site", "level", "said"),
    [
        ({"python": "/no/such/python"}, "fail", "No such file"),
        ({"python": f"{sys.executable} -S"}, "fail", "has no submitit, torch"),
        ({"python": "/no/apptainer exec IMAGE python"}, "warn", "No such file"),
        ({"python": "/bin/true"}, "fail", "is no Python"),
        ({"setup": ["exit 7"]}, "warn", "exit code 7"),
        ({"setup": ["echo hello"]}, "ok", "longclip[train]"),
        ({"srun": ["--container-image=x"]}, "warn", "which only a job can try"),
    ],
)
def test_worker(site: dict[str, object], level: str, said: str) -> None:
    found = one(Site.model_validate(site), "worker")
    assert found.level == level and said in found.said, found


def test_a_worker_of_another_version_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "__version__", "9.9.9")
    assert one(Site(), "worker").level == "fail" and "this is 9.9.9" in one(Site(), "worker").said


def test_tracking_server() -> None:
    class Health(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200 if self.path == "/health" else 404)
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Health)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    uri = f"http://me:secret@127.0.0.1:{server.server_port}/"
    try:
        found = one(Site(tracking=uri), "MLflow")
        assert found.level == "ok" and "secret" not in str(found)
    finally:
        server.shutdown()
        server.server_close()
    assert one(Site(tracking=uri), "MLflow").level == "warn"


@pytest.mark.parametrize(
    ("gres", "gpus"),
    [
        ("(null)", {}),
        ("gpu:2", {"": 2}),
        ("gpu:h100:4(S:0,1),tmp:100", {"h100": 4}),
        ("gpu:a100:4,gpu:1g.10gb:7", {"a100": 4, "1g.10gb": 7}),
    ],
)
def test_gpus_of_a_node(gres: str, gpus: dict[str, int]) -> None:
    assert gpus_of(gres) == gpus
