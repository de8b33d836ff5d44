"""Frozen code: a sweep's jobs import the package as it was when they were submitted, whatever is edited meanwhile.

    <runs>/<sweep>/code/<hash>/longclip/...        shared by the sweep's runs, one for each state of the code

The hash is over names and contents only, so that front and worker, two Pythons perhaps, compute the same. Nothing here
removes a snapshot.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from longclip.errors import LongclipError, SiteError, UserError

PACKAGE = Path(__file__).resolve().parents[1]


class OtherCode(LongclipError):
    """A job imported something else than the snapshot that it was submitted with."""


@dataclass(frozen=True)
class Code:
    """One state of the package's code."""

    hash: str
    """eight hex digits"""
    commit: str | None

    def as_record(self, run: Path) -> dict[str, str | None]:
        """What ``submitted.json`` of the run in the folder ``run`` says of it."""
        return {"code": self.hash, "commit": self.commit}


@dataclass(frozen=True)
class Snapshot(Code):
    """A state of the code that stays as it is."""

    folder: Path
    """absolute; what a worker has first on PYTHONPATH"""

    def as_record(self, run: Path) -> dict[str, str | None]:
        """With the path from the run folder: run folders are moved with their sweep."""
        return {**super().as_record(run), "snapshot": os.path.relpath(self.folder, run.resolve())}


def code_hash() -> str:
    """Of the package as it lies where this process imported it from."""
    return _hash(_contents(PACKAGE))


def todays_code() -> Code:
    """The code as it is now, for training that starts now."""
    return Code(code_hash(), commit())


def place(sweep: Path, code: str) -> Path:
    """Where the snapshot ``code`` of the sweep in the folder ``sweep`` lies."""
    return sweep.resolve() / "code" / code


def freeze(sweep: Path) -> Snapshot:
    """Copies the code as it is now into the folder ``sweep``, unless that was done before.

    What is copied: the package's files, edited and untracked ones too; not those that git ignores, compiled or hidden.
    Any number of processes may do so at once.

    Raises:
        UserError: the path cannot stand in PYTHONPATH.
        SiteError: it cannot be written, or an earlier snapshot is not what its name says.
    """
    contents = _contents(PACKAGE)  # read once: an edit in this moment is in both the hash and the copy, or in neither
    code = _hash(contents)
    folder = place(sweep, code)
    if os.pathsep in str(folder):
        raise UserError(f"{folder}: Python cannot import from a path with {os.pathsep!r} in it", "--runs DIR")
    aside = folder.with_name(f".{code}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        if not folder.exists():
            for name, content in contents.items():
                file = aside / PACKAGE.name / name
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(content)
            _publish(aside, folder)
        intact = _hash(_contents(folder / PACKAGE.name)) == code
    except OSError as error:
        shutil.rmtree(aside, ignore_errors=True)
        raise SiteError(
            f"{folder}: cannot be written: {error.strerror}", "set runs: in the site profile, or --runs DIR"
        ) from None
    if not intact:
        raise SiteError(f"{folder}: this snapshot of the code was changed after it was made", "move it away")
    return Snapshot(code, commit(), folder)


def _publish(aside: Path, folder: Path) -> None:
    try:
        aside.rename(folder)
    except OSError:  # ENOTEMPTY or EEXIST: another submit was first, with the same files
        if not folder.exists():
            raise
        shutil.rmtree(aside)


def check_imported(run: Path, submitted: Mapping[str, Any]) -> None:
    """Prints which code this process imported, and from where: the proof that a job runs what was submitted.

    An import hook, a site profile's own PYTHONPATH or a container can come before the snapshot. Equal content elsewhere
    is not enough: what is imported later, in the middle of the run, would be what lies there by then.

    Raises:
        OtherCode: it is not what the attempt was ``submitted`` with.
    """
    here = code_hash()
    print(f"code {here} from {PACKAGE}", flush=True)
    if not submitted.get("snapshot"):
        return
    snapshot = run / submitted["snapshot"]
    # The debug executor runs in the process that submitted.
    in_place = submitted["executor"] == "debug" or _same(PACKAGE.parent, snapshot)
    if here == submitted["code"] and in_place:
        return
    state = "" if snapshot.is_dir() else ", which is not there (was the run folder moved without its sweep's code/?)"
    raise OtherCode(
        f"this job imported code {here} from {PACKAGE}, but was submitted with {submitted['code']} "
        f"in {snapshot.resolve()}{state}",
        "`longclip submit` the experiment again: a new attempt with today's code",
    )


def commit() -> str | None:
    """``9f31c02`` or ``9f31c02 +2`` (two edited files), None outside a git checkout."""
    root = PACKAGE.parent
    try:
        head = _git(root, "rev-parse", "--short", "HEAD").strip()
        if not (root / ".git").exists():
            return None
        edited = len(_git(root, "status", "--porcelain").splitlines())
    except (OSError, subprocess.CalledProcessError):
        return None
    return head if not edited else f"{head} +{edited}"


def _contents(package: Path) -> dict[str, bytes]:
    """Name (relative, with ``/``) and content of every file that belongs to ``package``.

    Hidden files do not: they cannot be imported, and NFS and editors make them (``.nfs0001``) at any time.
    """
    names = _known_to_git(package) or [p.relative_to(package).as_posix() for p in package.rglob("*")]
    wanted = [n for n in names if not any(p.startswith(".") or p == "__pycache__" for p in n.split("/"))]
    files = {n: package / n for n in sorted(wanted) if not n.endswith(".pyc")}
    return {n: file.read_bytes() for n, file in files.items() if file.is_file()}


def _known_to_git(package: Path) -> list[str]:
    """Names of the tracked, edited and untracked files, without the ignored ones; empty where git tracks none.

    A snapshot, or an installed package, may itself lie in some checkout (``runs/``, ``.venv/``), whose rules on what to
    ignore are not about it.
    """
    try:
        tracked = _git(package, "ls-files", "-z").split("\0")
        if "__init__.py" not in tracked:
            return []
        return [*tracked, *_git(package, "ls-files", "-z", "--others", "--exclude-standard").split("\0")]
    except (OSError, subprocess.CalledProcessError):
        return []


def _hash(contents: Mapping[str, bytes]) -> str:
    digest = hashlib.sha256()
    for name, content in contents.items():
        digest.update(f"{name}\0{len(content)}\0".encode())
        digest.update(content)
    return digest.hexdigest()[:8]


def _same(one: Path, other: Path) -> bool:
    try:
        return one.samefile(other)
    except OSError:
        return False


def _git(root: Path, *words: str) -> str:
    command = ["git", "-C", str(root), *words]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout
