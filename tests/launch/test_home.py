"""A worker writes nothing under $HOME: it may be read-only, full, or not there at all."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import pytest

from tests.launch.small import longclip, make_sweep

CACHES = ("XDG_CACHE_HOME", "TRITON_CACHE_DIR", "CUDA_CACHE_PATH")


@contextmanager
def read_only(folder: Path) -> Iterator[None]:
    """Permissions do not bind root; a mount does."""
    if os.getuid() != 0:
        folder.chmod(0o555)
        yield
        folder.chmod(0o755)
        return
    subprocess.run(["mount", "--bind", folder, folder], check=True)
    try:
        subprocess.run(["mount", "-o", "remount,bind,ro", folder], check=True)
        yield
    finally:
        subprocess.run(["umount", folder], check=True)


@pytest.mark.parametrize("home", ["read-only", "empty", "absent"])
def test_home_stays_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, home: str) -> None:
    place = tmp_path / "home"
    if home != "absent":
        place.mkdir()
    for name in CACHES:
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "site.yaml").write_text(f"env: {{HOME: {place}}}\n")
    sweep = make_sweep(tmp_path / "work", (4,))
    words = ("--on", "local", "--site", tmp_path / "site.yaml", "--set", "train.samples=240", "--runs", "runs")
    with read_only(place) if home == "read-only" else nullcontext():
        if home == "read-only":
            with pytest.raises(OSError):
                (place / "a").write_text("")
        assert "all finished" in longclip("submit", sweep, *words, cwd=tmp_path)
    assert place.exists() is (home != "absent") and (home == "absent" or not list(place.iterdir()))


def worker(tmp_path: Path, more: str = "", **env: str) -> str:
    """What ``more`` prints in a worker of this temporary folder."""
    program = f"import os\nfrom longclip.launch.environment import before_torch\nbefore_torch()\n{more}"
    plain = {k: v for k, v in os.environ.items() if k not in CACHES}
    command = [sys.executable, "-c", program]
    return subprocess.run(
        command, env={**plain, "TMPDIR": str(tmp_path), **env}, capture_output=True, text=True, check=True
    ).stdout.strip()


def test_compiled_code_goes_to_the_node(tmp_path: Path) -> None:
    """DeepSpeed's optimizers are compiled where torch puts extensions."""
    where = "from torch.utils.cpp_extension import get_default_build_root as root\nprint(root())"
    assert Path(worker(tmp_path, where)).is_relative_to(tmp_path / f"longclip-{os.getuid()}")


def test_the_user_s_word_stands(tmp_path: Path) -> None:
    assert worker(tmp_path, "print(os.environ['TRITON_CACHE_DIR'])", TRITON_CACHE_DIR="/mine") == "/mine"


def test_a_folder_that_others_can_write_is_not_trusted(tmp_path: Path) -> None:
    """Compiled code is loaded from the caches."""
    planted = tmp_path / f"longclip-{os.getuid()}"
    planted.mkdir()
    planted.chmod(0o777)
    used = Path(worker(tmp_path, "print(os.environ['TRITON_CACHE_DIR'])")).parent
    assert used != planted and used.stat().st_mode & 0o077 == 0
