"""A node that is not fit to train is named, recorded and avoided; what is no node's fault excludes nobody."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from longclip.data.loader import AHEAD
from longclip.experiment.load import load
from longclip.launch import node
from longclip.launch.node import check_device, check_folder, ecc_problems
from longclip.launch.preflight import excluded
from longclip.launch.worker import needs_of
from longclip.run.folder import read_json
from tests.launch.small import make_sweep

HERE = Path(__file__).parent
MORE_THAN_THERE_IS = 10**18


Flight = list[dict[str, Any]]
"""what each rank got of a preflight"""
FLIGHTS: dict[str, dict[str, Any]] = {
    "sound": {"nodes": ["n1", "n1", "n2"], "needs": {"memory": 2**20, "shm": 2**20, "disk": 2**20}},
    "memory": {"nodes": ["n1", "n2"], "needs_of": {"1": {"memory": MORE_THAN_THERE_IS}}},
    "gpus": {"nodes": ["n1", "n2", "n2"], "needs": {"gpus": 2}},
    "shm": {"nodes": ["n1", "n2"], "needs": {"shm": MORE_THAN_THERE_IS}},
    "disk": {"nodes": ["n1", "n2"], "needs": {"disk": MORE_THAN_THERE_IS}},
    "allowance": {"nodes": ["n1"], "needs": {"memory": 200 * 2**20}, "env": {"SLURM_MEM_PER_NODE": "100"}},
    "late": {"nodes": ["n1", "n2", "n3"], "late": {"0": 8}, "limit": 3},
    "other first": {"nodes": ["n1", "n2", "n3"], "elsewhere": {"0": "other"}},
    "other last": {"nodes": ["n1", "n2", "n3"], "elsewhere": {"2": "other"}},
    "other of two": {"nodes": ["n1", "n2"], "elsewhere": {"1": "other"}},
    "unwritable": {"nodes": ["n1", "n2"], "elsewhere": {"1": "/proc"}},
    "ahead": {"nodes": ["n1", "n2", "n3"], "clock": {"0": 100}},
    "behind": {"nodes": ["n1", "n2"], "clock": {"1": -100}},
    "a little ahead": {"nodes": ["n1", "n2"], "clock": {"1": 12}},
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's folder for each flight."""
    return tmp_path_factory.mktemp("flights")


@pytest.fixture(scope="module")
def flights(runs: Path) -> dict[str, Flight]:
    """All preflights, from one process: to import torch takes longer than any of them."""
    for label in FLIGHTS:
        for run in (runs / label, runs / label / "other"):
            (run / "attempts" / "0002").mkdir(parents=True)
    asked = json.dumps([{"folder": str(runs / label), **flight} for label, flight in FLIGHTS.items()])
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE.parents[1])}
    command = [sys.executable, str(HERE / "preflight_worker.py"), asked]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return {
        label: [read_json(runs / label / f"{rank}.json") for rank in range(len(flight["nodes"]))]
        for label, flight in FLIGHTS.items()
    }


def records(run: Path) -> list[dict[str, Any]]:
    file = run / "nodes.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def only(flight: Flight, error: str) -> str:
    """The message, which is the same on all ranks."""
    assert {(result["error"], result["code"]) for result in flight} == {(error, 3)}
    (message,) = {result["message"] for result in flight}
    return str(message)


def test_sound_nodes_pass_in_seconds_and_leave_nothing(flights: dict[str, Flight], runs: Path) -> None:
    for result in flights["sound"]:
        assert result["warnings"] == []
        assert result["seconds"] < 30
    assert records(runs / "sound") == []
    assert list((runs / "sound" / "attempts" / "0002").iterdir()) == []


def test_a_sick_node_is_named_to_all_and_excluded_for_a_day(flights: dict[str, Flight], runs: Path) -> None:
    message = only(flights["memory"], "NodeFault")
    assert message.startswith("node n2 failed its preflight: ")
    assert f"GiB of memory left, {MORE_THAN_THERE_IS / 2**30:,.1f} GiB needed" in message
    assert message.endswith("; excluded from this run for 24 h")
    (record,) = records(runs / "memory")
    assert (record["node"], record["attempt"]) == ("n2", 2)
    assert "of memory left" in record["why"]
    assert abs(record["time"] - time.time()) < 300
    assert excluded(runs / "memory", record["time"] + 1) == ["n2"]
    assert excluded(runs / "memory", record["time"] + 24 * 3600) == []


def test_gpus_that_are_not_there(flights: dict[str, Flight]) -> None:
    message = only(flights["gpus"], "SiteError")
    assert message.startswith("no node passed the preflight") and "n2: 0 of 2 GPUs" in message


def test_a_fault_of_all_nodes_excludes_none(flights: dict[str, Flight], runs: Path) -> None:
    message = only(flights["shm"], "SiteError")
    assert "n1: " in message and "n2: " in message and "left in /dev/shm" in message
    assert records(runs / "shm") == []


def test_a_full_disk_is_no_fault_of_a_node(flights: dict[str, Flight], runs: Path) -> None:
    message = only(flights["disk"], "SiteError")
    assert message.startswith(f"{runs / 'disk'}: ") and "two checkpoints take" in message
    assert records(runs / "disk") == []


def test_a_job_that_asked_for_too_little_memory(flights: dict[str, Flight], runs: Path) -> None:
    message = only(flights["allowance"], "SiteError")
    assert message == "the job may use 0.1 GiB of memory on a node, and needs 0.2 GiB; set slurm.mem_gb"
    assert records(runs / "allowance") == []


def test_a_rank_that_does_not_come(flights: dict[str, Flight], runs: Path) -> None:
    late, *others = flights["late"]
    message = only(others, "NodeFault")
    assert message.startswith("node n1 failed its preflight: rank 0 (n1, pid ")
    assert "did not come within 3 s" in message
    assert late["error"] == "SiteError"  # it finds the others gone
    assert [record["node"] for record in records(runs / "late")] == ["n1"]


@pytest.mark.parametrize(("label", "sick"), [("other first", "n1"), ("other last", "n3"), ("other of two", "n2")])
def test_a_folder_that_one_node_does_not_share(flights: dict[str, Flight], label: str, sick: str) -> None:
    message = only(flights[label], "NodeFault")
    assert message.startswith(f"node {sick} failed its preflight: the run's folder is not the one that the other")


def test_a_folder_that_one_node_cannot_write(flights: dict[str, Flight]) -> None:
    message = only(flights["unwritable"], "NodeFault")
    assert message.startswith("node n2 failed its preflight: cannot write to /proc/attempts/0002: ")


@pytest.mark.parametrize(("label", "sick", "told"), [("ahead", "n1", "ahead"), ("behind", "n2", "behind")])
def test_a_clock_far_from_the_others(flights: dict[str, Flight], label: str, sick: str, told: str) -> None:
    message = only(flights[label], "NodeFault")
    assert message.startswith(f"node {sick} failed its preflight: its clock is 100 s {told}; ")


def test_a_clock_a_little_off_is_a_warning(flights: dict[str, Flight]) -> None:
    for result in flights["a little ahead"]:
        assert result["warnings"] == ["node n2: clock is 12 s ahead"]


def test_torn_and_old_records(tmp_path: Path) -> None:
    assert excluded(tmp_path, 0) == []
    lines = [json.dumps({"node": f"n{i}", "time": 3600.0 * i, "why": "?", "attempt": 1}) for i in range(3)]
    (tmp_path / "nodes.jsonl").write_text("\n".join(lines) + '\n{"node": "n9", "ti')
    assert excluded(tmp_path, 3600 * 24.5) == ["n1", "n2"]
    assert excluded(tmp_path, 3600 * 2.5, hours=1) == ["n2"]


def test_room_and_inodes_are_those_of_the_disk(tmp_path: Path) -> None:
    assert check_folder(tmp_path, 0) == []
    assert check_folder(Path("/proc"), 0) == []  # it counts no inodes, and has no room
    assert len(check_folder(Path("/proc"), 1)) == 1


def test_a_device_that_fails_is_reported_and_not_raised() -> None:
    import torch

    assert check_device(torch.device("cpu"), 0) == (None, [])
    _, (problem,) = check_device(torch.device("meta"), 0)  # it computes nothing
    assert " fails: " in problem and "\n" not in problem


def test_what_nvidia_smi_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def smi(script: str) -> None:
        (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / "nvidia-smi").chmod(0o755)

    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    smi('echo "GPU-aa, 0\nGPU-bb, 3\nGPU-cc, [N/A]"')
    assert ecc_problems("aa", "GPU 0") == ecc_problems("cc", "GPU 2") == []
    assert ecc_problems("bb", "GPU 1") == ["GPU 1 has 3 uncorrected memory errors"]
    monkeypatch.setattr(node, "SMI_SECONDS", 0.5)
    smi("exec sleep 20")
    assert ecc_problems("aa", "GPU 0") == ["nvidia-smi does not answer within 0 s"]
    monkeypatch.setenv("PATH", "/nowhere")
    assert ecc_problems("aa", "GPU 0") == []


def test_the_front_reads_exclusions_without_torch() -> None:
    script = "import sys, longclip.launch.preflight; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], check=True)


def test_shared_memory_is_what_the_loader_s_workers_hold(tmp_path: Path) -> None:
    """Bytes of the batches that 3 processes a rank hold ready: 2 ranks of a node, 12 images of 16 x 16 each."""
    sweep = make_sweep(tmp_path, (4,))
    text = (sweep / "_base.yaml").read_text().replace("loader_workers: 0", "loader_workers: 3")
    (sweep / "_base.yaml").write_text(text)
    (asked,) = load([sweep / "ctx4.yaml"])
    needs = needs_of(asked.experiment, {})
    assert needs.shm == 2 * 3 * AHEAD * 12 * (3 * 16 * 16)
