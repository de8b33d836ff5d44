"""The folder of checkpoints: what is broken is not continued from, and a full disk harms nothing that was there."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from longclip.errors import LongclipError, NoSpace, SiteError
from longclip.run import checkpoints
from longclip.run.journal import Journal, read_points
from longclip.train import checkpoint, ranks

# -- an engine of stage 0 that is nothing but torch's module and AdamW


@dataclass
class Plain:
    """What of a DeepSpeed engine a save at stage 0 asks for."""

    module: torch.nn.Linear
    basic_optimizer: torch.optim.AdamW

    def zero_optimization_stage(self) -> int:
        return 0


@pytest.fixture(scope="module")
def engine() -> Plain:
    torch.manual_seed(0)
    module = torch.nn.Linear(64, 64)
    optimizer = torch.optim.AdamW(module.parameters())
    module(torch.ones(64)).sum().backward()
    optimizer.step()
    return Plain(module, optimizer)


@pytest.fixture(scope="module")
def alone() -> Iterator[ranks.Ranks]:
    yield ranks.start()
    ranks.stop()


Publish = Callable[..., Path]


@pytest.fixture
def publish(engine: Plain, alone: ranks.Ranks) -> Publish:
    """Saves step ``step`` into a folder; the checkpoint's path."""

    def save(folder: Path, step: int, fence: Callable[[], None] | None = None) -> Path:
        name = f"step-{step:08d}"
        assert checkpoint.save(engine, folder, name, {"step": step}, alone, fence) > 0
        return folder / name

    return save


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("harm", [truncate, flip_a_bit, Path.unlink])
@pytest.mark.parametrize("file", ["weights.safetensors", "exp_avg_sq.safetensors", "state.json", "manifest.json"])
def test_a_broken_checkpoint_is_set_aside(
    publish: Publish, tmp_path: Path, harm: Callable[[Path], None], file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    publish(tmp_path, 10)
    newest = publish(tmp_path, 20)
    assert checkpoints.latest(tmp_path) == newest
    assert capsys.readouterr().out == ""
    harm(newest / file)
    assert checkpoints.latest(tmp_path) == tmp_path / "step-00000010"
    said = capsys.readouterr().out
    assert "set aside as broken-step-00000020" in said and "continuing from step-00000010" in said
    assert checkpoints.latest(tmp_path) == tmp_path / "step-00000010"
    assert names(tmp_path) == ["broken-step-00000020", "latest", "step-00000010"]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_run_that_has_lost_all_checkpoints_does_not_begin_again_by_itself(publish: Publish, tmp_path: Path) -> None:
    assert checkpoints.latest(tmp_path / "absent") is None
    folder = tmp_path / "ctx77-1f2c9a7b" / "checkpoints"
    assert checkpoints.latest(folder) is None
    for step in (10, 20):
        truncate(publish(folder, step) / "state.json")
    for _ in range(2):  # also where all are set aside already
        with pytest.raises(LongclipError, match="no checkpoint is intact") as caught:
            checkpoints.latest(folder)
    assert "longclip retry ctx77-1f2c9a7b" in str(caught.value) and f"mv {folder} " in str(caught.value)
    folder.rename(folder.with_name("checkpoints.broken"))
    assert checkpoints.latest(folder) is None


def test_what_was_not_published_is_not_continued_from(publish: Publish, tmp_path: Path) -> None:
    """A fence that falls between the rename and the moving of ``latest``; then the same step saved by another."""
    asked = []

    def fence() -> None:
        asked.append(None)
        if len(asked) == 2:
            raise LongclipError("superseded")

    publish(tmp_path, 10)
    with pytest.raises(LongclipError, match="superseded"):
        publish(tmp_path, 20, fence)
    assert (tmp_path / "step-00000020").is_dir()
    assert checkpoints.latest(tmp_path) == tmp_path / "step-00000010"
    (tmp_path / "latest").unlink()
    assert checkpoints.latest(tmp_path) == tmp_path / "step-00000010"
    publish(tmp_path, 15)
    checkpoints.retain(tmp_path, last=1, best=None)  # a newer one may be another's, about to be published
    assert names(tmp_path) == ["latest", "step-00000015", "step-00000020"]
    publish(tmp_path, 20)
    assert checkpoints.latest(tmp_path) == tmp_path / "step-00000020"


@pytest.mark.parametrize("content", [None, b"", b"{", b"[1]", b"\xff\xfe", b'{"checkpoint": "step-00000040"}'])
def test_a_latest_that_cannot_be_read_ends_no_run(
    publish: Publish, tmp_path: Path, content: bytes | None, capsys: pytest.CaptureFixture[str]
) -> None:
    for step in (10, 20):
        publish(tmp_path, step)
    (tmp_path / "latest").unlink()
    if content is not None:
        (tmp_path / "latest").write_bytes(content)
    assert checkpoints.latest(tmp_path) == tmp_path / "step-00000020"
    assert capsys.readouterr().out.count("continuing from step-00000020") == 1
    checkpoints.retain(tmp_path, last=1, best=None)
    assert (tmp_path / "step-00000020").is_dir()
    publish(tmp_path, 30)
    assert checkpoints.latest(tmp_path) == tmp_path / "step-00000030"
    assert capsys.readouterr().out == ""


def test_retain(publish: Publish, tmp_path: Path) -> None:
    for step in (10, 20, 30, 40):
        publish(tmp_path, step)
    (tmp_path / ".step-00000050.77.tmp").mkdir()
    (tmp_path / "broken-step-00000005").mkdir()
    checkpoints.retain(tmp_path, last=2, best="step-00000010")
    kept = ["broken-step-00000005", "latest", "step-00000010", "step-00000030", "step-00000040"]
    assert names(tmp_path) == kept
    (tmp_path / "step-00000030" / "pinned").touch()
    checkpoints.retain(tmp_path, last=1, best=None)
    assert names(tmp_path) == ["broken-step-00000005", "latest", "step-00000030", "step-00000040"]


# -- a disk without room


def fails(code: int) -> Callable[..., Any]:
    def act(*args: Any, **kwargs: Any) -> Any:
        raise OSError(code, os.strerror(code))

    return act


@contextmanager
def failing(where: str, code: int) -> Iterator[None]:
    """Errors of a full disk that show late: NFS and quotas tell of them at fsync or close."""

    class FailsToClose(io.FileIO):
        def close(self) -> None:
            was_open = not self.closed
            super().close()
            if was_open:
                fails(code)()

    with pytest.MonkeyPatch.context() as patch:
        if where == "close":
            patch.setattr(checkpoint, "open", lambda path, mode: FailsToClose(path, mode), raising=False)
        elif where == "rename":
            patch.setattr(Path, "rename", fails(code))
        else:
            patch.setattr(os, where, fails(code))
        yield


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize("where", ["mkdir", "fsync", "close", "rename"])
def test_no_room_leaves_the_older_ones_whole(publish: Publish, tmp_path: Path, where: str, code: int) -> None:
    older = publish(tmp_path, 10)
    with failing(where, code), pytest.raises(NoSpace, match=f"no room left: .*{os.strerror(code)}"):
        publish(tmp_path, 20)
    assert names(tmp_path) == ["latest", "step-00000010"]
    assert checkpoints.latest(tmp_path) == older
    assert checkpoints.latest(publish(tmp_path, 20).parent) == tmp_path / "step-00000020"


def test_another_error_of_the_disk_is_not_taken_for_a_full_one(publish: Publish, tmp_path: Path) -> None:
    with failing("fsync", errno.EIO), pytest.raises(SiteError, match="Input/output error") as caught:
        publish(tmp_path, 10)
    assert not isinstance(caught.value, NoSpace)


def test_a_disk_that_is_full(publish: Publish, small_disk: Path) -> None:
    folder = small_disk / "alone"
    publish(folder, 10)
    saved = 0
    with pytest.raises(NoSpace, match="No space left on device"):
        for saved in range(20, 2000):
            publish(folder, saved)
    kept = names(folder)
    assert kept == ["latest", "step-00000010", *(f"step-{step:08d}" for step in range(20, saved))]
    for name in kept[1:]:
        checkpoints.verify(folder / name)
    assert checkpoints.latest(folder) == folder / f"step-{saved - 1:08d}"
    checkpoints.retain(folder, last=1, best=None)  # room is made, and it goes on
    assert checkpoints.latest(publish(folder, saved).parent) == folder / f"step-{saved:08d}"
    shutil.rmtree(folder)


def test_a_journal_on_a_disk_that_is_full(small_disk: Path) -> None:
    file = small_disk / "journal.jsonl"
    journal = Journal(file)
    written = 0
    with pytest.raises(NoSpace, match=r"no room left: .*journal.jsonl"):
        for written in range(10**6):
            journal.write(written, written, {"train/loss": 1.0})
            if written % 100 == 0:
                journal.flush()
    points = [p.samples for p in read_points(file)]
    assert points == list(range(len(points))) and len(points) > 10_000, "what had been written is whole"
    file.unlink()
    with contextlib.suppress(NoSpace):
        journal.close()
