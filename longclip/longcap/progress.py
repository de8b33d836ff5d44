"""How far something long has come: a bar on a terminal, a line every 20 seconds in a log."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

PLAIN_SECONDS = 20.0


class Tell(Protocol):
    def __call__(self, done: int, note: str = "") -> None: ...


@contextmanager
def progress(noun: str, total: int | None) -> Iterator[Tell]:
    """Yields what to call with the count that is done so far, and a few words beside it. On stderr."""
    if sys.stderr.isatty():
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        with Progress(*columns, TextColumn("{task.fields[note]}"), console=Console(stderr=True)) as bar:
            task = bar.add_task(noun, total=total, note="")
            yield lambda done, note="": bar.update(task, completed=done, note=note)
        return
    last = time.monotonic()

    def tell(done: int, note: str = "") -> None:
        nonlocal last
        if time.monotonic() - last >= PLAIN_SECONDS:
            last = time.monotonic()
            of = f"/{total:,}" if total is not None else ""
            print(f"{time.strftime('%H:%M:%S')} {noun}: {done:,}{of} {note}".rstrip(), file=sys.stderr, flush=True)

    yield tell
