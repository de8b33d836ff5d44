"""Every exception that a user can see, in one tree, each with the exit code that the command line returns.

    LongclipError            1   something failed: a run, an evaluation, a check of exactness
    ├── UserError            2   the user's input: an experiment file, an argument, a dataset
    │   └── ExperimentError  2   ... in an experiment file, with file, line and key
    └── SiteError            3   the environment: Slurm, MLflow, the disk, the model hub
        └── NoSpace          3   ... a disk is full, or a quota is reached

A message says what is wrong and where, what would be valid, and (``hint``) what to do next.
"""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

FULL = (errno.ENOSPC, errno.EDQUOT)
"""What the system says of a full disk, or of a quota that is reached"""


class LongclipError(Exception):
    """Base of all errors that are shown as one line instead of a traceback."""

    exit_code = 1

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return self.message if self.hint is None else f"{self.message}\n  next: {self.hint}"


class UserError(LongclipError):
    """The input is wrong: nothing was queued and nothing was changed."""

    exit_code = 2


class SiteError(LongclipError):
    """The surroundings do not allow it: no Slurm, a full disk, an unreachable hub."""

    exit_code = 3


class NoSpace(SiteError):
    """The disk is full, or over quota. What had been published before is whole, and the run continues from there."""


@contextlib.contextmanager
def told_as_no_space(
    path: Path, hint: str = "make room (longclip prune shows what can go), then longclip retry: the run continues"
) -> Iterator[None]:
    """Raises NoSpace in place of the OSError of a full disk; other errors pass."""
    try:
        yield
    except OSError as error:
        if error.errno not in FULL:
            raise
        raise NoSpace(f"no room left: {path}: {error.strerror}", hint) from error


@dataclass(frozen=True)
class Mistake:
    """One thing wrong in an experiment file."""

    where: str
    """``file:line`` or ``--set``"""
    key: str
    """dotted path of the key, empty for the file as a whole"""
    what: str
    """what is wrong and what would be valid"""

    def __str__(self) -> str:
        return ": ".join(part for part in (self.where, self.key, self.what) if part)


class ExperimentError(UserError):
    """One or more mistakes in experiment files, one line each."""

    def __init__(self, mistakes: list[Mistake], hint: str | None = None) -> None:
        super().__init__("\n".join(str(m) for m in mistakes), hint)
        self.mistakes = mistakes
