"""What a run said: the last lines of a rank's log, the first failure, the stacks of a hang, the points before a NaN.

Plain text, line by line, for terminals and pipes alike. Reading changes nothing.
"""

from __future__ import annotations

import math
import re
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from longclip.errors import UserError
from longclip.launch.status import UNDER_WAY, Status, statuses
from longclip.run.attempts import FINISHED, Attempt, attempts_of
from longclip.run.folder import RunFolder
from longclip.run.journal import Point, read_points
from longclip.run.verdicts import first_failure, log_of, verdict_of

POLL_SECONDS, ASK_SECONDS = 1.0, 15.0
"""While following: time between two looks at the log, and between two questions to the scheduler"""
POINTS_BEFORE, POINTS_AFTER = 10, 5
COLUMNS = ("train/loss", "train/grad_norm", "train/lr", "train/scale")
"""Metrics of a step that show how it went wrong"""

_NOT_A_NUMBER = re.compile(r"\b(nan|inf|infinity)\b", re.IGNORECASE)  # not "finance"


def tail(run: RunFolder, rank: int, attempt: int | None, lines: int) -> Iterator[str]:
    """The last ``lines`` lines of a rank's log of one attempt (by default the newest), and what went wrong in it.

    Raises:
        UserError: there is no such attempt, or nothing of this rank.
    """
    one = _attempt(run, attempt)
    part = _part(run, one, rank)
    wrong = list(_what_went_wrong(one, rank))
    if part is None and not wrong:
        raise _no_log(run, one, rank)
    yield f"==> {_heading(run, one)}"
    if part is not None:
        yield f"==> {part.file}"
        yield from part.last_lines(lines)[0]
    yield from wrong


def follow(run: RunFolder, rank: int, lines: int) -> Iterator[str]:
    """As :func:`tail`, then what is added, from attempt to attempt, until the run has ended."""
    shown: Attempt | None = None
    positions: dict[Path, int] = {}
    over = ended = 0
    due, state = -math.inf, ""
    while True:
        attempts = attempts_of(run)
        shown = None if shown is None else Attempt(shown.path)  # a record, once read, is not read again
        for attempt in attempts[-1:] if shown is None else [a for a in attempts if a.number > shown.number]:
            if shown is not None:
                yield from _added(run, shown, rank, positions, whole=True)
            yield f"==> {_heading(run, attempt)}"
            shown = attempt
        if shown is not None:
            if not positions and (part := _part(run, shown, rank)) is not None:
                yield f"==> {part.file}"
                said, positions[part.file] = part.last_lines(lines, whole=False)
                yield from said
            yield from _added(run, shown, rank, positions)
        if shown is not None and shown.ended and shown.number != ended:
            ended, due = shown.number, -math.inf  # a verdict is news: ask at once
        if time.monotonic() >= due:
            (status,) = statuses([run])[0]
            # Between two attempts a job is nowhere for a moment; only what is over twice is over.
            over = 0 if status.state in UNDER_WAY else over + 1
            if over > 1 or status.state == FINISHED:
                break
            if not over and status.state != state:
                state = status.state
                yield f"==> {_standing(status)}"
            due = time.monotonic() + (POLL_SECONDS if over else ASK_SECONDS)
        time.sleep(POLL_SECONDS)
    if shown is None:
        raise _not_submitted(run)
    yield from _added(run, shown, rank, positions, whole=True)
    yield from _what_went_wrong(shown, rank)
    yield f"==> {_standing(status)}"


def around(run: RunFolder, rank: int, attempt: int | None, lines: int, text: str) -> Iterator[str]:
    """The journal's points and the log's lines around the first that has ``text``, in the newest attempt that has it.

    A point has ``text`` in the name of a metric; of a number of samples, it is the first at or after it. ``nan`` means
    every value of a step that is not a finite number. Case does not count.

    Raises:
        UserError: neither journal nor log has it.
    """
    nan = bool(_NOT_A_NUMBER.fullmatch(text))
    samples = int(digits) if (digits := text.replace(",", "")).isdecimal() else math.inf

    def point_has(point: Point) -> bool:
        if nan:
            return not all(math.isfinite(v) for k, v in point.metrics.items() if k in COLUMNS)
        return point.samples >= samples or any(text.lower() in k.lower() for k in point.metrics)

    def line_has(line: str) -> bool:
        return bool(_NOT_A_NUMBER.search(line)) if nan else text.lower() in line.lower()

    candidates = attempts_of(run)[::-1] if attempt is None else [_attempt(run, attempt)]
    for one in candidates:
        part = _part(run, one, rank)
        extra = [] if nan else [text.lower()]
        table = list(_points_around(read_points(one.journal), point_has, extra))
        said = [] if part is None else list(_lines_around(part.lines(), lines, line_has))
        if not table and not said:
            continue
        yield f"==> {_heading(run, one)}"
        if table:
            yield f"==> {one.journal}"
            yield from table
        if part is not None and said:
            yield f"==> {part.file}"
            yield from said
        if nan:
            yield f"next: longclip retry {run.name} (from its newest checkpoint), or submit another recipe (a new run)"
        return
    where = "any attempt" if attempt is None else f"attempt {attempt}"
    raise UserError(f"{run.name}: neither the journal nor the log of rank {rank} has {text!r} in {where}")


# ---- parts of it -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Part:
    """An attempt's own part of a log file, in bytes; ``end`` is None where nobody wrote after it."""

    file: Path
    start: int = 0
    end: int | None = None

    def lines(self) -> Iterator[bytes]:
        with self.file.open("rb") as f:
            f.seek(self.start)
            while (self.end is None or f.tell() < self.end) and (line := f.readline()):
                yield line

    def last_lines(self, count: int, whole: bool = True) -> tuple[list[str], int]:
        """The last lines and the position behind them; without ``whole``, up to the last line that is complete."""
        last: deque[bytes] = deque(maxlen=count + 1)
        position = self.start
        for line in self.lines():
            last.append(line)
            position += len(line)
        if not whole and last and not last[-1].endswith(b"\n"):
            position -= len(last.pop())
        return [_text(line) for line in list(last)[-count:]], position


def _part(run: RunFolder, attempt: Attempt, rank: int) -> _Part | None:
    """The output of ``rank``. A requeued job goes on in the log where it began; where each attempt begins in it is
    known of rank 0 only, so of the others it is the whole file."""
    found = log_of(attempt)
    if found is None:
        return None
    file, start = found[0].resolve(), found[1]
    if rank:
        file, start = file.with_name(file.name.replace("_0_log.out", f"_{rank}_log.out")), 0
    if not file.exists():
        return None
    later = [place for a in attempts_of(run) if a.number > attempt.number and (place := log_of(a))]
    ends = [begin for other, begin in later if other.resolve() == file]
    return _Part(file, start, ends[0] if ends else None)


def _attempt(run: RunFolder, number: int | None) -> Attempt:
    attempts = attempts_of(run)
    if not attempts:
        raise _not_submitted(run)
    if number is None:
        return attempts[-1]
    for attempt in attempts:
        if attempt.number == number:
            return attempt
    raise UserError(f"{run.name}: has no attempt {number}; it has {attempts[0].number} to {attempts[-1].number}")


def _not_submitted(run: RunFolder) -> UserError:
    return UserError(f"{run.name}: has not been submitted yet")


def _no_log(run: RunFolder, attempt: Attempt, rank: int) -> UserError:
    found = sorted(int(p.name.split("_")[-2]) for p in attempt.logs.glob("*_[0-9]*_log.out"))
    if found:
        return UserError(f"{run.name}: attempt {attempt.number} has no log of rank {rank}; it has {found}")
    before = [a.number for a in attempts_of(run) if a.number < attempt.number]
    older = f"; --attempt {before[-1]} shows the one before" if before else ""
    return UserError(
        f"{run.name}: attempt {attempt.number} has no log of rank {rank} yet ({attempt.logs})",
        f"longclip logs {run.name} -f waits for it{older}",
    )


def _heading(run: RunFolder, attempt: Attempt) -> str:
    words = [f"{run.name}: attempt {attempt.number}"]
    words += [f"job {attempt.job}"] if attempt.job else []
    if started := attempt.started:
        words.append(f"{started.get('ranks', '?')} ranks on {','.join(started.get('nodes', []))}")
    if attempt.resumed_at:
        words.append(f"from sample {attempt.resumed_at:,}")
    if verdict := verdict_of(attempt):
        words.append(": ".join(filter(None, [verdict.kind, verdict.message])))
    return ", ".join(words)


def _standing(status: Status) -> str:
    return ": ".join(filter(None, [status.run.name, status.state, status.note]))


def _what_went_wrong(attempt: Attempt, rank: int) -> Iterator[str]:
    if failure := first_failure(attempt):
        yield f"==> first to fail: rank {failure['rank']} on {failure['host']}"
        yield from str(failure["traceback"]).rstrip().splitlines()
    stacks = sorted(attempt.path.glob("stacks-*.txt"))
    if stacks:
        mine = next((p for p in stacks if int(p.stem.rpartition("-")[2]) == rank), stacks[0])
        yield f"==> where it hung: {mine}"
        yield from mine.read_text(encoding="utf-8", errors="replace").rstrip().splitlines()
        if others := [p.name for p in stacks if p != mine]:
            yield f"==> and beside it: {', '.join(others)}"


def _added(
    run: RunFolder, attempt: Attempt, rank: int, positions: dict[Path, int], whole: bool = False
) -> Iterator[str]:
    """Lines that the log of an attempt has gained; with ``whole`` also a last one that has no end yet."""
    part = _part(run, attempt, rank)
    if part is None:
        return
    if part.file not in positions:
        yield f"==> {part.file}"
        positions[part.file] = part.start
    with part.file.open("rb") as f:  # opened anew each time: an NFS client asks the server what is new only then
        f.seek(positions[part.file])
        data = f.read()
    if not whole:
        data = data[: data.rfind(b"\n") + 1]
    positions[part.file] += len(data)
    yield from (_text(line) for line in data.splitlines())


def _lines_around(log: Iterator[bytes], lines: int, has: Callable[[str], bool]) -> Iterator[str]:
    before: deque[str] = deque(maxlen=lines // 2)
    for raw in log:
        line = _text(raw)
        if has(line):
            yield from (f"  {one}" for one in before)
            yield f"> {line}"
            yield from (f"  {_text(one)}" for one in islice(log, lines - lines // 2))
            return
        before.append(line)


def _text(line: bytes) -> str:
    return line.decode("utf-8", "replace").rstrip("\r\n")


def _points_around(points: Sequence[Point], has: Callable[[Point], bool], extra: Sequence[str]) -> Iterator[str]:
    """A small table of the points about the first that ``has`` it."""
    first = next((i for i, p in enumerate(points) if has(p)), None)
    if first is None:
        return
    asked = [k for k in points[first].metrics if k not in COLUMNS and any(text in k.lower() for text in extra)]
    columns = [*COLUMNS, *asked]
    # Validation has points of its own, which say nothing of these columns.
    before = [p for p in points[:first] if set(columns) & set(p.metrics)][-POINTS_BEFORE:]
    after = [p for p in points[first + 1 :] if set(columns) & set(p.metrics)][:POINTS_AFTER]
    yield "  ".join(["  time    ", f"{'step':>8}", f"{'samples':>12}", *(f"{c:>16}" for c in columns)])
    for point in [*before, points[first], *after]:
        mark = ">" if point is points[first] else " "
        when = time.strftime("%H:%M:%S", time.localtime(point.time))
        values = (f"{point.metrics[c]:>16.6g}" if c in point.metrics else f"{'-':>16}" for c in columns)
        yield "  ".join([f"{mark} {when}", f"{point.step:>8,}", f"{point.samples:>12,}", *values])
