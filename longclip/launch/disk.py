"""What lies under a folder that may not exist yet: the file system, its room, and whether other nodes can see it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Disk:
    """The file system below a folder."""

    folder: Path
    """the nearest folder that exists"""
    kind: str
    """ext4, nfs4, lustre, tmpfs, ..."""
    free_gb: float
    free_inodes: int | None
    """None where files are not counted (btrfs)"""

    @property
    def local(self) -> bool:
        """It looks like one that no other node sees."""
        return self.kind in ("tmpfs", "ramfs", "overlay", "squashfs") or self.folder.is_relative_to("/tmp")


def disk_of(path: Path) -> Disk:
    """The disk that ``path`` is on, or would be. Raises OSError where that cannot be asked."""
    path = path.absolute()
    # os.access instead of Path.exists: that one raises where a folder above may not be entered.
    folder = next(p for p in (path, *path.parents) if os.access(p, os.F_OK))
    room = os.statvfs(folder)
    return Disk(
        folder,
        _kind(folder.resolve()),
        room.f_bavail * room.f_frsize / 1e9,
        room.f_favail if room.f_files else None,
    )


def _kind(folder: Path) -> str:
    mounts = [line.split()[1:3] for line in Path("/proc/mounts").read_text(encoding="utf-8").splitlines()]
    # The deepest mount point wins, and of several on one point the last.
    holding = [(len(point), i, kind) for i, (point, kind) in enumerate(mounts) if folder.is_relative_to(point)]
    return max(holding)[2] if holding else "unknown"
