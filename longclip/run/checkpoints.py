"""The folder of a run's checkpoints: which of them may be continued from, which may go.

    checkpoints/step-00000123/weights.safetensors      fp32, by parameter name
                              exp_avg.safetensors      Adam's first moment, same names
                              exp_avg_sq.safetensors   Adam's second moment, same names
                              state.json               step, samples, the best checkpoint so far, ...
                              manifest.json            size and sha256 of each file above, written last
                              validated.json           goes over state.json: of a validation made up for later
                              pinned                   made by a user (touch): this checkpoint stays
    checkpoints/latest        {"checkpoint": "step-00000123"}, moved last of all
    checkpoints/broken-*      set aside: its files were not those of its manifest
    checkpoints/.*.tmp        being written or removed, or left so by an attempt that was killed

``latest`` is written into the checkpoint's folder and moved out of it: a folder that still has it was never published.
So a lost ``latest`` loses nothing. (Writing and reading tensors is in train/checkpoint.py.)
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import uuid
from pathlib import Path
from typing import Any

from longclip.errors import LongclipError, UserError
from longclip.run.folder import read_json, write_json

MOMENTS = ("exp_avg", "exp_avg_sq")
WEIGHTS = "weights"
STATE = "state.json"
MANIFEST = "manifest.json"
VALIDATED = "validated.json"
LATEST = "latest"
PINNED = "pinned"


def latest(folder: Path) -> Path | None:
    """The newest intact checkpoint that was published; None where none ever was. Reads all of it.

    A broken one is set aside as ``broken-<name>`` and the one before it is taken; what was done is printed, for the
    run's log. An unreadable or missing ``latest`` is no obstacle.

    Raises LongclipError where checkpoints were published and none is intact: a run that has lost its work must not
    silently begin again.
    """
    found = published(folder)
    for path in reversed(found):
        try:
            verify(path)
        except LongclipError as error:
            broken = folder / f"broken-{path.name}"
            remove(broken)
            path.rename(broken)
            print(f"{error.message}; set aside as {broken.name}", flush=True)
        else:
            if path.name != (named := pointer(folder)):
                print(f"{folder / LATEST} names {named or 'nothing readable'}; continuing from {path.name}", flush=True)
            return path
    if (folder / LATEST).exists() or any(folder.glob("broken-*")):
        raise LongclipError(
            f"{folder}: no checkpoint is intact",
            f"restore one from a backup; or, to begin at the first sample: mv {folder} {folder}.broken, "
            f"then longclip retry {folder.parent.name}",
        )
    return None


def published(folder: Path) -> list[Path]:
    """Checkpoints that ``latest`` has named, oldest first, broken or not. What is newer than ``latest`` is not."""
    newest = pointer(folder)
    return [p for p in _steps(folder) if (newest is None or p.name <= newest) and not (p / LATEST).exists()]


def pointer(folder: Path) -> str | None:
    """The name in ``latest``; None where the file is missing or was not written to its end."""
    try:
        return str(json.loads((folder / LATEST).read_text())["checkpoint"])
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None


def last(folder: Path) -> Path:
    """The newest checkpoint that was published. Raises UserError where it is gone: one before it is another model."""
    found, named = published(folder), pointer(folder)
    if not found or named not in (None, found[-1].name):
        there = ", ".join(path.name for path in found) or "none"
        raise UserError(f"{folder}: the last checkpoint, {named}, is gone (pruned, or set aside); there is {there}")
    return found[-1]


def state_of(path: Path) -> dict[str, Any]:
    """The state that a checkpoint was saved with, and what :func:`amend` has added to it.

    Raises LongclipError where ``state.json`` is missing or broken.
    """
    try:
        state = dict(json.loads((path / STATE).read_text()))
        return state | (read_json(path / VALIDATED) if (path / VALIDATED).exists() else {})
    except (FileNotFoundError, ValueError, TypeError) as error:
        raise LongclipError(f"{path / STATE} is broken: {error!r}") from error


def amend(path: Path, found: dict[str, Any]) -> None:
    """Adds to a checkpoint's state what was found out after it was saved. Its other files stay as they are."""
    write_json(path / VALIDATED, found)


def verify(path: Path) -> None:
    """Raises LongclipError unless the files of a checkpoint are all there, and those that were written.

    An I/O error is no proof that a file is broken, and is raised as it is.
    """
    try:
        listed = json.loads((path / MANIFEST).read_text())["files"]
        for name in (*(f"{kind}.safetensors" for kind in (WEIGHTS, *MOMENTS)), STATE):
            with open(path / name, "rb") as file:
                same = os.fstat(file.fileno()).st_size == listed[name]["size"]
                if not same or hashlib.file_digest(file, "sha256").hexdigest() != listed[name]["sha256"]:
                    raise LongclipError(f"{path / name} is broken: its content is not what {MANIFEST} says")
    except (FileNotFoundError, ValueError, KeyError, TypeError) as error:
        raise LongclipError(f"{path} is broken: {error!r}") from error


def retain(folder: Path, last: int, best: str | None) -> None:
    """Removes all checkpoints but the ``last`` newest, ``best``, and those that are pinned.

    Also removes what killed attempts left half-written. Broken checkpoints that were set aside stay. Only for rank 0
    of the attempt that owns the run. What cannot be removed now (NFS, a reader has it open) is left for next time.
    """
    found = published(folder)
    kept = {p.name for p in found[-last:]} | {best}
    with contextlib.suppress(OSError):
        for path in _steps(folder):
            # A newer one may be a successor's, about to be published.
            newer = not found or path.name > found[-1].name
            if path.name not in kept and not newer and not (path / PINNED).exists():
                remove(path)
        for path in half_written(folder):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def half_written(folder: Path) -> list[Path]:
    """What is being written or removed at this moment, or was when its attempt was killed."""
    return sorted(folder.glob(".*.tmp"))


def aside(path: Path) -> Path:
    """A new name beside ``path`` for what is not, or no longer, to be seen under that name."""
    return path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")


def remove(path: Path) -> None:
    """Removes a folder if it is there; it loses its name first, so that none is ever seen half removed."""
    if path.exists():
        going = aside(path)
        path.rename(going)
        shutil.rmtree(going, ignore_errors=True)


def unpublished(folder: Path) -> list[Path]:
    """Checkpoints that ``latest`` never named: their attempt was killed, or superseded, just before."""
    known = published(folder)
    return [p for p in _steps(folder) if p not in known]


def _steps(folder: Path) -> list[Path]:
    return sorted(folder.glob("step-*"))
