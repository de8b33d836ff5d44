"""The same work on many things, several at a time, by threads that nobody has to wait for."""

from __future__ import annotations

import itertools
import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")


def abreast(
    items: Iterable[T], work: Callable[[T], R], threads: int, wanted: Callable[[], int] = lambda: 2**63
) -> Iterator[tuple[T, R | BaseException]]:
    """Each item with what ``work`` returned for it, or with what it raised, in the order in which they are done.

    ``items`` may be endless: little more is taken from it than is under way. ``wanted()``: how many further answers
    are of use; no more than that are under way at any time, and at 0 it ends with those that already are.

    The threads are daemons, unlike concurrent.futures', which a program waits for at its end: after Ctrl-C nobody
    should have to sit out a server's time-out. So ``work`` may be cut off anywhere, and has to leave things sound.
    """
    tasks: queue.SimpleQueue[tuple[T] | None] = queue.SimpleQueue()
    answers: queue.SimpleQueue[tuple[T, R | BaseException]] = queue.SimpleQueue()

    def worker() -> None:
        while (task := tasks.get()) is not None:
            try:
                answers.put((task[0], work(task[0])))
            except BaseException as error:
                answers.put((task[0], error))

    for _ in range(threads):
        threading.Thread(target=worker, daemon=True).start()
    todo, under_way = iter(items), 0
    try:
        while True:
            room = max(0, min(2 * threads, wanted()) - under_way)
            for item in itertools.islice(todo, room):
                tasks.put((item,))
                under_way += 1
            if not under_way:
                return
            answer = answers.get()
            under_way -= 1
            yield answer
    finally:
        with suppress(queue.Empty):
            while True:
                tasks.get_nowait()
        for _ in range(threads):
            tasks.put(None)
