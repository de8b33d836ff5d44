"""Site profiles: what they may say, what is refused and how, and that the ones we ship make valid batch scripts."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from longclip.errors import UserError
from longclip.launch.job import batch_script
from longclip.launch.plan import Plan
from longclip.launch.resolve import Resolved
from longclip.launch.site import Site, find_site
from longclip.run.folder import RunFolder
from tests.helpers import experiment
from tests.launch.small import longclip, make_sweep

SITES = Path(__file__).parents[2] / "slurm" / "sites"


def script(site: Site) -> str:
    asked = experiment()
    asked = asked.model_copy(update={"slurm": asked.slurm.model_copy(update={"gpus_per_node": 4, "nodes": 2})})
    return batch_script(Plan(asked, {}, Resolved(), {}, RunFolder(Path("/runs/tiny/ctx77-0")), "new", ""), site)


def profile(folder: Path, text: str) -> Site:
    (folder / "mine.yaml").write_text(text)
    return find_site(str(folder / "mine.yaml"))


@pytest.mark.parametrize("file", sorted(SITES.glob("*.yaml")), ids=lambda f: f.stem)
def test_shipped_profiles_make_batch_scripts(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SCRATCH", "/scratch/me")
    site = find_site(str(file))
    (tmp_path / "job.sh").write_text(script(site))
    subprocess.run(["bash", "-n", tmp_path / "job.sh"], check=True)
    if shutil.which("shellcheck"):
        checked = subprocess.run(
            ["shellcheck", "--severity=warning", tmp_path / "job.sh"], capture_output=True, text=True
        )
        assert checked.returncode == 0, checked.stdout
    assert f"--partition={site.partition}" in (tmp_path / "job.sh").read_text()


def test_the_example_has_every_key() -> None:
    assert set(yaml.safe_load((SITES / "example.yaml").read_text())) == set(Site.model_fields)


def test_containers_reach_the_command_line() -> None:
    """Submitit puts the profile's Python as it is before its own module; srun's arguments come before that."""
    apptainer, pyxis = script(find_site(str(SITES / "apptainer.yaml"))), script(find_site(str(SITES / "pyxis.yaml")))
    command = "apptainer exec --nv --no-home --bind /scratch /images/longclip.sif python -u -m submitit.core._submit"
    assert command in apptainer
    (line,) = [line for line in pyxis.splitlines() if line.startswith("srun ")]
    assert line.index("--kill-on-bad-exit=1") < line.index("--container-image=") < line.index("python3 -u -m")


def test_mail(tmp_path: Path) -> None:
    text = script(profile(tmp_path, "mail: me@uni.edu\n"))
    assert "#SBATCH --mail-user=me@uni.edu" in text and "#SBATCH --mail-type=FAIL,END" in text
    assert "mail" not in script(profile(tmp_path, ""))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("partition: gpu\nacount: x\n", "mine.yaml:2: acount: unknown key; did you mean account?"),
        ("restart: again\n", "mine.yaml:1: restart: is 'again'"),
        ("links: 0\n", "mine.yaml:1: links: is 0"),
        ("runs: a\nruns: b\n", "mine.yaml:2: runs: given twice; first on line 1"),
        ("sbatch:\n  nodes: 2\n", "mine.yaml:2: sbatch.nodes: is decided by the experiment's slurm.nodes"),
        ("sbatch: {no-requeue: true}\n", "mine.yaml:1: sbatch.no-requeue: is decided by restart"),
        ("sbatch: {ntasks_per_node: 2}\n", "sbatch.ntasks_per_node: is decided by the experiment's slurm.tasks"),
        ("sbatch: {mail-user: me}\n", "sbatch.mail-user: is decided by mail"),
        ("gpus: gres\nsbatch: {gres: 'gpu:1'}\n", "sbatch.gres: is decided by the experiment's slurm.gpus_per_node"),
        ("sbatch: {exclusive: false}\n", "sbatch.exclusive: is False; valid is a text, a number, or true"),
        ("runs: $NO_SUCH_VARIABLE/runs\n", "runs: $NO_SUCH_VARIABLE/runs: $NO_SUCH_VARIABLE is not set here"),
        ("env: {TOKENIZERS_PARALLELISM: x, MLFLOW_TRACKING_PASSWORD: x}\n", "env.MLFLOW_TRACKING_PASSWORD: looks like"),
        ("- a\n", "mine.yaml:1: valid is a mapping of keys to values"),
        ("a: [\n", "mine.yaml:2: not valid YAML"),
    ],
)
def test_refused(tmp_path: Path, text: str, expected: str) -> None:
    with pytest.raises(UserError) as refusal:
        profile(tmp_path, text)
    assert expected in str(refusal.value) and refusal.value.exit_code == 2


def test_what_is_left_to_the_user(tmp_path: Path) -> None:
    site = profile(tmp_path, "env: {NCCL_IB_DISABLE: 1}\nsbatch: {constraint: a100, exclusive: true, gres: tmp:10}\n")
    text = script(site)
    assert "export NCCL_IB_DISABLE=1" in text
    for line in ("--constraint=a100", "--exclusive", "--gres=tmp:10"):
        assert f"#SBATCH {line}\n" in text


def test_minutes_that_look_like_hours(tmp_path: Path) -> None:
    sweep = make_sweep(tmp_path, (4, 5))
    late = ("--set", "slurm.time=24:00")
    warning = "! slurm.time: '24:00' is 24 minutes to Slurm; in hours it is '24:00:00'"
    for words in (("check", sweep, *late), ("submit", sweep, "--dry-run", *late)):
        assert longclip(*words, cwd=tmp_path, code=None).count(warning) == 1
    assert "Slurm;" not in longclip("check", sweep, "--set", "slurm.time=24:00:00", cwd=tmp_path)
