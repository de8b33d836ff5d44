"""Freeing disk: which checkpoints of runs nobody will ask for again."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from longclip.errors import LongclipError, SiteError
from longclip.launch.status import UNDER_WAY, Status, statuses
from longclip.run import checkpoints
from longclip.run.folder import RunFolder, read_json

BUSY = (*UNDER_WAY, "waiting")
"""States in which a job may be using the checkpoints, or is about to"""
ABANDONED = 3600.0
"""Seconds after which what is half-written counts as left behind by a killed attempt, clocks being what they are"""


@dataclass(frozen=True)
class Removal:
    """One folder that can go."""

    path: Path
    bytes: int
    why: str


@dataclass(frozen=True)
class Pruning:
    """What can go of one run, and what stays."""

    run: RunFolder
    state: str
    removals: tuple[Removal, ...]
    kept: dict[str, str]
    """checkpoint -> why it stays"""
    note: str = ""
    """why the run is left alone"""

    @property
    def bytes(self) -> int:
        return sum(r.bytes for r in self.removals)


def plan(runs: Sequence[RunFolder], keep_last: int = 1) -> list[Pruning]:
    """What could be freed of each run; changes nothing. A run that is queued or running is left alone.

    Of a run that may go on, the ``keep_last`` newest checkpoints stay; of any run the best one on validation, those
    that an evaluation names, and those in which a user has put a file ``pinned``.

    Raises:
        SiteError: a folder cannot be read.
    """
    return [_plan(status, keep_last) for status in statuses(runs)[0]]


def free(pruning: Pruning) -> None:
    """Removes what ``pruning`` lists, after reading to the end the checkpoints that the run then relies on.

    Raises:
        LongclipError: one of those is broken, or a job of the run has appeared; nothing was removed.
        SiteError: something cannot be read or removed.
    """
    run = pruning.run
    state = statuses([run])[0][0].state
    if state in BUSY:
        raise LongclipError(f"{run.name}: is {state} now; nothing of it was removed")
    try:
        for name, why in pruning.kept.items():
            if why in ("best", "latest"):
                checkpoints.verify(run.checkpoints / name)
        for removal in pruning.removals:
            if removal.path.is_dir():
                checkpoints.remove(removal.path)
            else:
                removal.path.unlink(missing_ok=True)
    except OSError as error:
        raise SiteError(f"{error.filename or run.checkpoints}: {error.strerror}") from None


def _plan(status: Status, keep_last: int) -> Pruning:
    run = status.run
    if status.state in BUSY:
        return Pruning(run, status.state, (), {}, status.state)
    try:
        kept = _kept(run, status.state == "finished", keep_last)
        removals = tuple(Removal(path, _size(path), why) for path, why in _candidates(run, kept))
    except (LongclipError, ValueError) as error:  # what is best, or was evaluated, is not known
        return Pruning(run, status.state, (), {}, str(error))
    except OSError as error:
        raise SiteError(f"{run.checkpoints}: cannot be read: {error.strerror}") from None
    return Pruning(run, status.state, removals, kept)


def _kept(run: RunFolder, finished: bool, keep_last: int) -> dict[str, str]:
    found = checkpoints.published(run.checkpoints)
    if not found:
        return {}
    kept = {p.name: "pinned" for p in found if (p / checkpoints.PINNED).exists()}
    for file in sorted(run.evaluations.glob("*.json")):
        kept[str(read_json(file).get("checkpoint"))] = f"evaluations/{file.name}"
    best = checkpoints.state_of(found[-1]).get("best")
    if not finished or not best:
        kept |= {p.name: "latest" for p in found[-keep_last:]}
    if best:
        kept[str(best["checkpoint"])] = "best"
    return {p.name: kept[p.name] for p in found if p.name in kept}


def _candidates(run: RunFolder, kept: dict[str, str]) -> Iterator[tuple[Path, str]]:
    for path in checkpoints.published(run.checkpoints):
        if path.name not in kept:
            yield path, "older, not best"
    for path in sorted(run.checkpoints.glob("broken-*")):
        yield path, "broken"
    for path in checkpoints.unpublished(run.checkpoints):
        if _untouched(path) and not (path / checkpoints.PINNED).exists():
            yield path, "never published"
    for path in checkpoints.half_written(run.checkpoints):
        if _untouched(path):
            yield path, "half-written"


def _untouched(path: Path) -> bool:
    newest = max(p.lstat().st_mtime for p in (path, *path.rglob("*")))
    return time.time() - newest > ABANDONED


def _size(path: Path) -> int:
    """Bytes on disk."""
    return sum(p.lstat().st_blocks * 512 for p in (path, *path.rglob("*")))
