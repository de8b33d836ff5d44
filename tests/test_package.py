"""What is shipped: the front alone, installed from the wheel without extras, checks and dry-runs on a login node."""

from __future__ import annotations

import os
import site
import subprocess
import sys
import venv
from pathlib import Path

import pytest

from longclip.run.attempts import attempts_of
from tests.launch.small import make_sweep, the_run

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def front(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The ``bin`` of an environment that holds the wheel and what it asks for: no extras, so no torch."""
    made = tmp_path_factory.mktemp("front")
    pip = [sys.executable, "-m", "pip"]
    build = [*pip, "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(made / "dist"), str(ROOT)]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,) = (made / "dist").glob("*.whl")
    venv.create(made / "venv", with_pip=True)
    python = made / "venv" / "bin" / "python"
    install = [str(python), "-m", "pip", "install", "-q", "-c", str(ROOT / "constraints.txt"), str(wheel)]
    subprocess.run(install, check=True, capture_output=True)
    heavy = "import importlib.util as u; assert not any(map(u.find_spec, ['torch', 'transformers', 'deepspeed']))"
    subprocess.run([str(python), "-c", heavy], check=True)
    return python.parent


def longclip(front: Path, cwd: Path, *words: str) -> subprocess.CompletedProcess[str]:
    plain = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "SLURM_CONF")}
    return subprocess.run([str(front / "longclip"), *words], cwd=cwd, capture_output=True, text=True, env=plain)


def test_the_wheel_without_extras_checks_and_dry_runs(front: Path, tmp_path: Path) -> None:
    sweep = make_sweep(tmp_path / "work", (4, 9))
    checked = longclip(front, tmp_path, "check", str(sweep))
    assert checked.returncode == 0 and checked.stdout.count("ok  small/ctx") == 2, checked
    dry = longclip(front, tmp_path, "submit", str(sweep), "--dry-run")
    assert dry.stdout.count("#!/bin/bash") == 2 and "dry run: nothing was queued" in dry.stdout, dry


def test_front_and_worker_share_the_run_folder_only(front: Path, tmp_path: Path) -> None:
    """Another prefix with other packages: what the front cannot import, the site's Python trains with."""
    venv.create(tmp_path / "worker", with_pip=False)
    (packages,) = (tmp_path / "worker" / "lib").glob("python*/site-packages")
    (packages / "training.pth").write_text("\n".join(site.getsitepackages()))
    python = tmp_path / "worker" / "bin" / "python"
    (tmp_path / "two.yaml").write_text(f"python: {python}\nenv: {{PYTHONPATH: {ROOT}}}\nruns: runs\n")
    sweep = make_sweep(tmp_path / "work", (4,))
    words = ("--site", "two.yaml", "--on", "local", "--set", "train.samples=240")
    done = longclip(front, tmp_path, "submit", str(sweep), *words)
    assert done.returncode == 0 and "all finished" in done.stdout, done
    (attempt,) = attempts_of(the_run(tmp_path / "runs", "ctx4"))
    assert attempt.ended is not None and attempt.ended["verdict"] == "finished"
    healthy = longclip(front, tmp_path, "doctor", "--site", "two.yaml")
    assert f"ok    worker: {python}: Python" in healthy.stdout, healthy
    torchless = longclip(front, tmp_path, "doctor")
    assert torchless.returncode == 3 and "has no torch, deepspeed, transformers" in torchless.stdout, torchless
