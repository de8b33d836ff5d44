"""What is shipped: the front alone, installed from the wheel without extras, checks and dry-runs on a login node."""

from __future__ import annotations

import os
import subprocess
import sys
import venv
from pathlib import Path

from tests.launch.small import make_sweep

ROOT = Path(__file__).parents[1]


def test_the_wheel_without_extras_checks_and_dry_runs(tmp_path: Path) -> None:
    pip = [sys.executable, "-m", "pip"]
    build = [*pip, "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(tmp_path / "dist"), str(ROOT)]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv" / "bin" / "python"
    install = [str(python), "-m", "pip", "install", "-q", "-c", str(ROOT / "constraints.txt"), str(wheel)]
    subprocess.run(install, check=True, capture_output=True)
    sweep = make_sweep(tmp_path / "work", (4, 9))
    plain = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "SLURM_CONF")}

    def longclip(*words: str) -> subprocess.CompletedProcess[str]:
        command = [str(tmp_path / "venv" / "bin" / "longclip"), *words]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=plain)

    checked = longclip("check", str(sweep))
    assert checked.returncode == 0 and checked.stdout.count("ok  small/ctx") == 2, checked
    dry = longclip("submit", str(sweep), "--dry-run")
    assert dry.stdout.count("#!/bin/bash") == 2 and "dry run: nothing was queued" in dry.stdout, dry
    heavy = "import importlib.util as u; assert not any(map(u.find_spec, ['torch', 'transformers', 'deepspeed']))"
    subprocess.run([str(python), "-c", heavy], check=True)
