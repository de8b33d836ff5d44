"""A lock file: one writer at a time, also on shared file systems, where flock may not hold."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
import uuid
from datetime import datetime
from pathlib import Path
from typing import Any

from longclip.errors import SiteError
from longclip.run.folder import read_json

WAIT = 60.0
"""seconds to wait for another writer"""
STALE = 600.0
"""seconds after which a lease that nobody renews counts as abandoned"""


class Lease:
    """Held inside ``with``: a file that one process creates (O_EXCL), with its host, process id and time.

    It is taken over when that process is gone from this host, when it was not renewed for ``STALE`` seconds by the
    clocks, or, where ``quiet`` is given, when this process has seen it for so many seconds without being renewed
    (clocks of hosts differ). Entering raises SiteError, naming the holder, when it is not free within ``WAIT`` seconds.
    """

    def __init__(self, file: Path, quiet: float | None = None) -> None:
        self.file = file
        self._quiet = quiet
        self._token = uuid.uuid4().hex

    def __enter__(self) -> Lease:
        seen, unchanged = self._sign(), time.monotonic()
        deadline = unchanged + WAIT
        while not self._take(seen[0] if self._quiet and time.monotonic() - unchanged > self._quiet else None):
            if seen != (seen := self._sign()):
                unchanged = time.monotonic()
            if time.monotonic() > deadline:
                holder = self._holder()
                since = datetime.fromtimestamp(holder.get("time", 0)).isoformat(" ", "seconds")
                raise SiteError(
                    f"{self.file}: held by process {holder.get('pid')} on {holder.get('host')} since {since}",
                    "wait for it to end; delete the file if it has",
                )
            time.sleep(0.1)
        return self

    def __exit__(self, *error: object) -> None:
        if self._holder().get("token") == self._token:
            self.file.unlink(missing_ok=True)

    def renew(self) -> None:
        """Still at work. To be called more often than every ``STALE`` seconds."""
        with contextlib.suppress(FileNotFoundError):
            os.utime(self.file)

    def _take(self, abandoned: str | None) -> bool:
        try:
            handle = os.open(self.file, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
        except FileExistsError:
            self._clear(abandoned)
            return False
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as f:
                me = {"host": socket.gethostname(), "pid": os.getpid(), "time": time.time(), "token": self._token}
                json.dump(me, f)
        except OSError:  # a full disk: an empty file would hold up all others
            self.file.unlink(missing_ok=True)
            raise
        return True

    def _holder(self) -> dict[str, Any]:
        try:
            return read_json(self.file)
        except (FileNotFoundError, ValueError):  # let go, or not written yet
            return {}

    def _sign(self) -> tuple[str | None, float | None]:
        """What changes whenever the lease is taken or renewed."""
        token = self._holder().get("token")  # opening the file makes an NFS client ask for its times again
        try:
            return token, self.file.stat().st_mtime
        except FileNotFoundError:
            return None, None

    def _clear(self, abandoned: str | None) -> None:
        """Removes the lock file if its holder is gone, or has the token ``abandoned``."""
        holder = self._holder()
        try:
            old = time.time() - self.file.stat().st_mtime > STALE
        except FileNotFoundError:
            return
        here = holder.get("host") == socket.gethostname()
        given_up = abandoned is not None and holder.get("token") == abandoned
        if not given_up and not old and not (here and not _alive(holder["pid"])):
            return
        # Two may find it abandoned. Whoever makes this marker removes it, if it is still the same: it must not be the
        # next one's fresh lock.
        marker = self.file.with_name(f"{self.file.name}.{holder.get('token', 'torn')}")
        try:
            marker.touch(exist_ok=False)
        except FileExistsError:
            return
        try:
            if self._holder() == holder:
                self.file.unlink(missing_ok=True)
        finally:
            marker.unlink()


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
