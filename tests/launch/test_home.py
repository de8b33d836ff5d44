"""A worker writes nothing under $HOME: it may be read-only, full, or not there at all."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest

from longclip.launch import caches
from tests.launch.small import longclip, make_sweep


@pytest.mark.parametrize("there", [True, False])
def test_home_stays_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, there: bool) -> None:
    """Permissions do not bind root, so the folder is looked at instead: it stays empty, or stays away."""
    home = tmp_path / "home"
    if there:
        home.mkdir()
    for name in ("XDG_CACHE_HOME", "TRITON_CACHE_DIR", "CUDA_CACHE_PATH"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "site.yaml").write_text(f"env: {{HOME: {home}}}\n")
    sweep = make_sweep(tmp_path / "work", (4,))
    words = ("--on", "local", "--site", tmp_path / "site.yaml", "--set", "train.samples=240", "--runs", "runs")
    assert "all finished" in longclip("submit", sweep, *words, cwd=tmp_path)
    assert home.exists() is there and (not there or not list(home.iterdir()))


def test_caches_go_to_the_node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", "/mine")
    monkeypatch.setenv("TRITON_CACHE_DIR", "/gone")
    monkeypatch.delenv("TRITON_CACHE_DIR")
    caches.leave_home_alone()
    try:
        assert os.environ["XDG_CACHE_HOME"] == "/mine", "the user's word stands"
        assert Path(os.environ["TRITON_CACHE_DIR"]).parent == tmp_path / f"longclip-{os.getuid()}"
    finally:
        os.environ.pop("CUDA_CACHE_PATH", None)


def test_a_folder_that_others_can_write_is_not_trusted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled code is loaded from the caches."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    for name in ("XDG_CACHE_HOME", "TRITON_CACHE_DIR", "CUDA_CACHE_PATH"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    planted = tmp_path / f"longclip-{os.getuid()}"
    planted.mkdir()
    planted.chmod(0o777)
    caches.leave_home_alone()
    used = Path(os.environ["TRITON_CACHE_DIR"]).parent
    assert used != planted and used.stat().st_mode & 0o077 == 0
