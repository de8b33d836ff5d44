"""Which code this is: the hash of the package's own files, and the commit they came from."""

from __future__ import annotations

import hashlib
import subprocess
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1]


def code_hash() -> str:
    """Eight hex digits over names and contents of the package's Python files, as they are imported from."""
    digest = hashlib.sha256()
    for file in sorted(PACKAGE.rglob("*.py")):
        digest.update(f"{file.relative_to(PACKAGE)}\0".encode())
        digest.update(file.read_bytes())
    return digest.hexdigest()[:8]


def commit() -> str | None:
    """``9f31c02`` or ``9f31c02 +2`` (two edited files), None outside a git checkout."""
    root = PACKAGE.parent
    try:
        head = _git(root, "rev-parse", "--short", "HEAD")
        if not (root / ".git").exists():
            return None
        edited = len(_git(root, "status", "--porcelain").splitlines())
    except (OSError, subprocess.CalledProcessError):
        return None
    return head if not edited else f"{head} +{edited}"


def _git(root: Path, *words: str) -> str:
    command = ["git", "-C", str(root), *words]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
