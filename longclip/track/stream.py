"""A run's journal to an MLflow server while it trains, from a child process of rank 0.

Whatever happens to the server or the child, training does not notice: the child has its own time-outs, writes its
troubles into ``logs/stream.log`` of the attempt, and what it could not send the next ``sync`` sends. As in all syncs,
only points up to the newest checkpoint are sent; the live curve is the journal's.

    python -m longclip.track.stream ATTEMPT URI PARENT_PID SECONDS
"""

from __future__ import annotations

import contextlib
import http.client
import os
import select
import signal
import ssl
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

from longclip.run.attempts import Attempt, attempts_of
from longclip.run.folder import RunFolder
from longclip.track.mlflow import sync

EVERY = 15.0
"""seconds from the end of one sync to the next"""
PROBE = 5.0
"""seconds in which a server must answer to count as reachable"""
DEAF_TO = (signal.SIGUSR2, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def streamable(uri: str | None) -> str | None:
    """``uri`` if a job may stream to it, else None: a server, and no password in what run folders would record.

    MLflow takes credentials from MLFLOW_TRACKING_TOKEN, or _USERNAME and _PASSWORD, which reach a job through its
    environment only.
    """
    return uri if uri and uri.startswith(("http://", "https://")) and not {"@", "?"} & set(uri) else None


class Stream:
    """The child, as its parent holds it."""

    def __init__(self, child: subprocess.Popen[bytes] | None) -> None:
        self._child = child

    @property
    def pid(self) -> int | None:
        return None if self._child is None else self._child.pid

    def stop(self, timeout: float = 10.0) -> None:
        """Lets it send what is there, for at most ``timeout`` seconds. To be called after the verdict is written."""
        if self._child is None or self._child.returncode is not None:
            return
        assert self._child.stdin is not None
        with contextlib.suppress(OSError):  # it may have ended
            # Not only closed: processes forked since then (loaders) hold the pipe open, too.
            self._child.stdin.write(b"\n")
            self._child.stdin.close()
        try:
            self._child.wait(timeout)
        except subprocess.TimeoutExpired:
            self._child.kill()
            self._child.wait()


def start_stream(attempt: Attempt, uri: str, every: float = EVERY) -> Stream:
    """Starts the child; never raises and never waits for the server."""
    command = [sys.executable, "-m", "longclip.track.stream", str(attempt.path), uri, str(os.getpid()), str(every)]
    # Slurm may send a job's signals to all of its processes (proctrack/linuxproc), also before Python has started in
    # the child. A blocked signal is inherited as such; one that comes for this process meanwhile waits.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, DEAF_TO)
    try:
        with (attempt.logs / "stream.log").open("ab") as log:
            return Stream(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=log, stderr=log, bufsize=0))
    except OSError as error:
        print(f"no streaming to MLflow: {error}; longclip sync sends it later", flush=True)
        return Stream(None)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


# ---- the child ---------------------------------------------------------------------------------------------------


def main(attempt: Attempt, uri: str, parent: int, every: float) -> None:
    """Syncs until the attempt has ended, its process is gone, or it is told to stop; then once more."""
    os.nice(10)  # the CPU is for training
    said = ""
    while True:
        # Asked before sending: what was written until then is sent.
        alive = os.getppid() == parent
        over = not alive or _told(0) or _ended(attempt)
        news = _send(attempt, uri, alive)
        if news != said:
            print(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {news}", flush=True)
            said = news
        if over:
            return
        wake = time.monotonic() + every
        while time.monotonic() < wake and os.getppid() == parent and not _told(min(1.0, every)):
            pass


def _send(attempt: Attempt, uri: str, alive: bool) -> str:
    """One sync; what came of it, in words."""
    if not reachable(uri):
        return f"{uri} does not answer; trying on"
    run = RunFolder(attempt.path.parent.parent)
    try:
        # Killed, and no successor has begun, so this process is the only one to know.
        killed = not alive and not _ended(attempt) and attempts_of(run)[-1].number == attempt.number
        report = sync([run], uri, {run.path: "lost"} if killed else None)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "; ".join(f"{one.status}, sent up to {one.samples:,} samples" for one in report.runs)


def reachable(uri: str) -> bool:
    """Whether an HTTP server answers at ``uri`` (through the environment's proxy), whatever it says."""
    try:
        urllib.request.urlopen(f"{uri.rstrip('/')}/health", timeout=PROBE).close()
    except urllib.error.HTTPError:
        return True
    except urllib.error.URLError as error:
        return isinstance(error.reason, ssl.SSLError)  # MLflow has its own say on certificates
    except (OSError, http.client.HTTPException):
        return False
    return True


def _told(seconds: float) -> bool:
    """Whether the parent has said something, or closed the pipe; waits at most so long."""
    return bool(select.select([sys.stdin], [], [], seconds)[0])


def _ended(attempt: Attempt) -> bool:
    return (attempt.path / "ended.json").exists()


if __name__ == "__main__":
    main(Attempt(Path(sys.argv[1])), sys.argv[2], int(sys.argv[3]), float(sys.argv[4]))
