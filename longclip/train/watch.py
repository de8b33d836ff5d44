"""The watch: notices that training hangs, finds out who hangs, and ends the process, so that the run can go on.

One rank that stops holds all others in their next collective, and each of those notices by itself: nothing has beaten
for far longer than ever before. It then leaves the stacks of its threads in the attempt's folder. That is its answer;
who leaves none is the one to blame. Files carry the answers, since a process that hangs may be the one that serves
torch.distributed's store. The lowest rank that answers gives the verdict, and all that answer leave.

Rank 0's watch also writes ``heartbeat.json``, by which status sees that a run is alive between two points of its
journal.
"""

from __future__ import annotations

import faulthandler
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from types import FrameType, TracebackType
from typing import NamedTuple, NoReturn

from longclip.run.folder import write_json

HUNG_EXIT_CODE = 86
"""of the ranks that answered; one that did not is killed by the launcher, so a job may well show another code"""
FACTOR = 20.0
"""a hang is this many times the longest interval between two beats so far"""
LONGEST_LIMIT = 3600.0
"""seconds; above it only the floor can lift the limit. torch.distributed's own timeout must be longer still"""
STARTING_BEATS = 2
STARTING_FACTOR = 3.0
"""times the floor until the first beats have come: the first step compiles, and its interval is no measure"""
HEARTBEAT_SECONDS = 15.0
LAST_RESORT_SECONDS = 120.0
"""by when the process ends, even if the folder that the answer is for hangs as well"""
SHOWN = 8
"""ranks that a message names one by one"""


class Who(NamedTuple):
    """One process of the run, as people find it."""

    rank: int
    node: str
    """what Slurm calls the node, else the host's name"""
    pid: int

    @classmethod
    def here(cls, rank: int) -> Who:
        """This process."""
        return cls(rank, os.environ.get("SLURMD_NODENAME") or socket.gethostname(), os.getpid())

    def __str__(self) -> str:
        return f"{self.rank} ({self.node}, pid {self.pid})"


class Watch:
    """Watches over one rank while the ``with`` block runs, from a thread of its own.

    Args:
        attempt: the attempt's folder, where ``stacks-<rank>.txt`` and ``heartbeat.json`` go.
        who: all ranks, in order.
        floor_seconds: no shorter silence is a hang.
        on_hang: is told what was found, on one rank; it records the verdict. The process ends right after it.
    """

    def __init__(
        self, attempt: Path, rank: int, who: Sequence[Who], floor_seconds: float, on_hang: Callable[[str], None]
    ) -> None:
        self._attempt, self._rank, self._who, self._on_hang = attempt, rank, who, on_hang
        self._floor = floor_seconds
        self._tick = min(1.0, floor_seconds / 20)
        self._beats = 0
        self._samples = 0
        self._over = threading.Event()
        self._main = threading.get_ident()
        self._thread = threading.Thread(target=self._run, name="longclip-watch", daemon=True)

    def beat(self, samples: int) -> None:
        """A sign of life, at a point that every rank passes: a step's end, a batch of an evaluation, a checkpoint.

        Costs two assignments: the thread does the counting.
        """
        self._samples = samples
        self._beats += 1

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if kind is None:
            self._beats += 1
        self._over.set()
        # Once the others leave, this rank's collective fails. That error must not end the attempt as a crash while the
        # thread is about to end it as a hang: it then ends the process, and join does not return.
        self._thread.join()

    def _run(self) -> None:
        beats, silent, longest = 0, 0.0, 0.0
        woke = time.monotonic()
        written = -HEARTBEAT_SECONDS
        while not self._over.wait(self._tick):
            now = time.monotonic()
            if self._beats != beats:
                if beats >= STARTING_BEATS:
                    longest = max(longest, silent)
                beats, silent = self._beats, 0.0
            else:
                # Time in which this process did not run (SIGSTOP, scontrol suspend) is nobody's silence: a rank that
                # is continued finds hours gone, and must not blame those that waited for it.
                silent += min(now - woke, 2 * self._tick)
            woke = now
            if self._rank == 0 and now - written >= HEARTBEAT_SECONDS:
                written = now
                self._write_heartbeat()
            limit = max(self._floor, min(FACTOR * longest, LONGEST_LIMIT))
            if beats < STARTING_BEATS:
                limit = STARTING_FACTOR * self._floor
            # Limits differ by rank, so one that is not at its own yet answers those that are. Not one that has just
            # beaten, though: it and its like were freed in the same moment, and would call each other up for ever.
            # Nor one that was continued after the verdict: what it would answer has been decided without it.
            if silent > limit or (silent > self._floor / 2 and not self._ended() and self._answers()):
                self._answer(beats, silent)
                silent = 0.0

    def _answer(self, beats: int, silent: float) -> None:
        """Leaves the stacks, hears the others, and ends the process; returns only if a beat has come after all."""
        faulthandler.dump_traceback_later(LAST_RESORT_SECONDS, exit=True)
        mine = _where(self._main)
        try:
            stacks = self._dump_stacks(mine)
        except OSError as problem:  # no answer can be given or heard: blame nobody
            faulthandler.dump_traceback(sys.stderr)
            self._leave(f"no sign of life for {silent:.0f} s; stacks are in the log of each rank ({problem.strerror})")
        if not self._beaten(beats):
            answers = {**self._answers(), self._rank: mine}
            if min(answers) == self._rank and not self._ended():
                self._leave(self._verdict(answers, silent))
            # The launcher kills all when one has left, so those that leave wait for the one that writes the verdict.
            if not self._beaten(beats, unless_ended=True):
                os._exit(HUNG_EXIT_CODE)
        stacks.unlink(missing_ok=True)
        faulthandler.cancel_dump_traceback_later()

    def _leave(self, verdict: str) -> NoReturn:
        try:
            print(verdict, file=sys.stderr, flush=True)
            self._on_hang(verdict)
        finally:
            os._exit(HUNG_EXIT_CODE)

    def _dump_stacks(self, place: str) -> Path:
        path = self._attempt / f"stacks-{self._rank:04d}.txt"
        aside = path.with_name(f".{path.name}.tmp")
        with aside.open("w", encoding="utf-8") as f:
            f.write(f"rank {self._who[self._rank]} after {self._samples:,} samples waits in {place}\n\n")
            f.flush()
            faulthandler.dump_traceback(f)  # reads no source files, which may lie on the disk that hangs
        aside.replace(path)
        return path

    def _answers(self) -> dict[int, str]:
        """Ranks that have left their stacks, and what each waits in."""
        found = {}
        for name in self._names():
            if name.startswith("stacks-"):
                with suppress(OSError), (self._attempt / name).open(encoding="utf-8") as f:  # called off in this moment
                    found[int(Path(name).stem[7:])] = f.readline().partition(" waits in ")[2].strip()
        return found

    def _beaten(self, beats: int, unless_ended: bool = False) -> bool:
        """Whether a beat comes within the time that others are given to answer, or before the verdict."""
        for _ in range(round(min(10.0, self._floor) / self._tick)):  # counted in waking time, as silence is
            time.sleep(self._tick)
            if self._beats != beats:
                return True
            if unless_ended and self._ended():
                break
        return False

    def _ended(self) -> bool:
        """Whether someone has given the verdict already."""
        return "ended.json" in self._names()

    def _names(self) -> list[str]:
        # Listing the folder makes an NFS client ask the server again; opening a name that was absent may not.
        with suppress(OSError):
            return os.listdir(self._attempt)
        return []

    def _verdict(self, answers: dict[int, str], silent: float) -> str:
        missing = [str(w) for w in self._who if w.rank not in answers]
        if missing:
            verb = "does not answer" if len(missing) == 1 else "do not answer"
            found = f"{_ranks(missing)} {verb}"
        else:
            places: dict[str, list[str]] = {}
            for rank, place in sorted(answers.items()):
                places.setdefault(place, []).append(str(rank))
            odd_first = sorted(places.items(), key=lambda item: len(item[1]))
            found = f"no step for {silent:.0f} s; all ranks answer; they wait in: " + "; ".join(
                f"{place} ({_ranks(ranks)})" for place, ranks in odd_first
            )
        folder = f"{self._attempt.parent.name}/{self._attempt.name}"
        return f"{found}; last step at {self._samples:,} samples; stacks: {folder}/stacks-*.txt"

    def _write_heartbeat(self) -> None:
        with suppress(OSError):  # a full disk is the business of those who write what matters
            write_json(self._attempt / "heartbeat.json", {"time": time.time(), "samples": self._samples})


def _ranks(names: Sequence[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return f"rank{'s' if len(names) > 1 else ''} {', '.join(names[:SHOWN])}{more}"


def _where(thread: int) -> str:
    """What ``thread`` is in: its innermost line of longclip, and the torch function that was called there."""
    frame: FrameType | None = sys._current_frames().get(thread)
    torch, innermost = "", "unknown"
    while frame is not None:
        module = str(frame.f_globals.get("__name__", "?"))
        place = f"{module}.{frame.f_code.co_name}"
        if innermost == "unknown":
            innermost = f"{place}:{frame.f_lineno}"
        if module.split(".")[0] == "longclip":
            return f"{place}:{frame.f_lineno}" + (f" > {torch}" if torch else "")
        if module.split(".")[0] == "torch" and not torch:
            torch = place
        frame = frame.f_back
    return innermost
