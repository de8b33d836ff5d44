"""``site init`` and ``doctor`` against a real cluster."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

from longclip.launch.site import find_site
from tests.conftest import Cluster
from tests.launch.small import environment, longclip


@pytest.fixture(scope="module")
def profile(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    said = longclip("site", "init", "here", "--yes", "--out", folder / "here.yaml", cwd=folder)
    assert f"longclip doctor --site {folder / 'here.yaml'}" in said
    return folder / "here.yaml"


def variant(profile: Path, folder: Path, **values: object) -> Path:
    """The profile with other values for some of its keys."""
    kept = [line for line in profile.read_text().splitlines() if line.partition(":")[0] not in values]
    (folder / "other.yaml").write_text("\n".join([*kept, *(f"{k}: {json.dumps(v)}" for k, v in values.items())]))
    return folder / "other.yaml"


def diagnosis(site: Path, code: int) -> dict[str, dict[str, str]]:
    said = longclip("doctor", "--site", site, "--json", cwd=site.parent, code=code)
    return {check["what"]: check for check in json.loads(said)}


def test_a_profile_from_what_slurm_says(profile: Path) -> None:
    site = find_site(str(profile))
    assert (site.name, site.partition, site.gpus, site.cpus_per_task) == ("here", "batch", "gpus-per-node", 1)
    assert (site.restart, site.grace_s, site.mem_gb) == ("requeue", None, 5)
    lines = dict(line.split(":", 1) for line in profile.read_text().splitlines()[1:])
    assert all("#" in line for line in lines.values()), "every key says where it is from"
    assert "# guessed: one of batch, preempt" in lines["partition"] and "guessed" not in lines["gpus"]


def test_doctor_likes_it(profile: Path) -> None:
    found = diagnosis(profile, 0)
    assert {found[w]["level"] for w in ("Slurm", "accounting", "partition", "GPUs", "a job", "restart")} == {"ok"}
    assert "in partition batch" in found["a job"]["said"]


def test_nothing_is_overwritten_unasked(profile: Path) -> None:
    before = profile.read_text()
    said = longclip("site", "init", "--yes", "--out", profile, cwd=profile.parent, code=2)
    assert "exists, and was left as it is" in said and profile.read_text() == before


def test_answers_on_a_terminal(cluster: Cluster, tmp_path: Path) -> None:
    """Asked for the partition and the runs folder, and, the second time, whether the file may be replaced."""
    assert "Partition (batch, preempt) [batch]" in on_a_terminal(["preempt", str(tmp_path / "mine")], tmp_path)
    site = find_site(str(tmp_path / "p.yaml"))
    assert (site.partition, site.grace_s, site.restart, site.runs) == ("preempt", 10, "requeue", tmp_path / "mine")
    assert "guessed: one" not in (tmp_path / "p.yaml").read_text()
    assert "left as it is" in on_a_terminal(["n"], tmp_path)
    on_a_terminal(["y", "nonsense", "batch", ""], tmp_path)
    assert find_site(str(tmp_path / "p.yaml")).partition == "batch"


def on_a_terminal(answers: list[str], folder: Path) -> str:
    outer, inner = pty.openpty()
    os.write(outer, "".join(f"{a}\n" for a in answers).encode())
    command = [sys.executable, "-m", "longclip.cli", "site", "init", "--out", "p.yaml"]
    done = subprocess.run(
        command, cwd=folder, stdin=inner, capture_output=True, text=True, timeout=60, env=environment()
    )
    os.close(outer)
    os.close(inner)
    return done.stdout + done.stderr


@pytest.mark.parametrize(
    ("values", "what", "level", "said"),
    [
        ({"partition": "gpu"}, "partition", "fail", "no partition 'gpu' on this cluster"),
        ({"partition": "pretend"}, "partition", "fail", "pretend is not up"),
        ({"gpu_type": "h100"}, "GPUs", "fail", "no h100 in batch"),
        ({"mem_gb": 4000}, "a job", "fail", "sbatch --test-only"),
        ({"partition": "preempt", "grace_s": 60}, "restart", "warn", "the site profile says 60 s"),
        ({"partition": "preempt", "grace_s": 10}, "restart", "ok", "preemption REQUEUE after 10 s"),
    ],
)
def test_what_is_amiss(
    profile: Path, tmp_path: Path, values: dict[str, object], what: str, level: str, said: str
) -> None:
    found = diagnosis(variant(profile, tmp_path, **values), 3 if level == "fail" else 0)
    assert found[what]["level"] == level and said in found[what]["said"], found[what]


def test_limits_of_an_account(profile: Path, cluster: Cluster, tmp_path: Path) -> None:
    """MaxSubmitJobs, as sacctmgr says it, is max_jobs; a profile that says nothing of it is told."""
    assert "at most" not in diagnosis(profile, 0)["jobs"]["said"]
    user = subprocess.run(["id", "-un"], capture_output=True, text=True, check=True).stdout.strip()
    for limit in ("7", "-1"):
        change = ["sacctmgr", "-i", "modify", "user", user, "set", f"MaxSubmitJobs={limit}"]
        subprocess.run(change, check=True, capture_output=True)
        if limit == "7":
            assert diagnosis(profile, 0)["jobs"]["next"] == "max_jobs: 7"
            longclip("site", "init", "--yes", "--out", tmp_path / "limited.yaml", cwd=tmp_path)
            assert find_site(str(tmp_path / "limited.yaml")).max_jobs == 7


def test_slurmctld_that_does_not_answer(profile: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    conf = Path(os.environ["SLURM_CONF"])
    for file in conf.parent.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    lines = conf.read_text().splitlines()
    lines = ["SlurmctldPort=9" if line.startswith("SlurmctldPort=") else line for line in lines]
    (tmp_path / "slurm.conf").write_text("\n".join([*lines, "SlurmctldTimeout=1"]))
    monkeypatch.setenv("SLURM_CONF", str(tmp_path / "slurm.conf"))
    found = diagnosis(profile, 3)
    assert found["Slurm"]["level"] == "fail" and found["worker"]["level"] == "ok", found["Slurm"]
