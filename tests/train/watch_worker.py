"""Groups of ranks that step and beat: one for each line of JSON that ``python watch_worker.py`` reads.

A line is ``{"folder": the attempt's, "ranks": 3, "floor": seconds}``; with ``"stays": [[step, rank, seconds]]`` that
rank sleeps on the way, and the others wait for it. The ranks record who they are in ``started.json``, and step until
the folder has a file ``enough``; their exit codes are in ``codes.json`` when all have left. They are forked from this
process, which has imported torch.
"""

from __future__ import annotations

import json
import os
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

from longclip.run.attempts import Attempt
from longclip.run.folder import write_json
from longclip.train import watch as watching
from longclip.train.ranks import Ranks
from longclip.train.watch import Watch, Who
from tests.forked import fork_ranks

BATCH = 10
watching.HEARTBEAT_SECONDS = 0.5


def stay(seconds: float) -> None:
    time.sleep(seconds)


def steps(asked: dict[str, Any], me: Ranks) -> None:
    """A loop like that of training."""
    folder = Path(asked["folder"])
    attempt = Attempt(folder)
    stays = {(step, rank): seconds for step, rank, seconds in asked.get("stays", [])}
    who = me.gather(Who.here(me.rank))
    if me.rank == 0:
        write_json(folder / "started.json", {"who": who})
    step = 0

    def on_hang(found: str) -> None:
        attempt.end("hung", step * BATCH, f"{found} (says rank {me.rank})")

    with Watch(folder, me.rank, who, asked["floor"], on_hang) as watch:
        watch.beat(0)
        while not me.agree((folder / "enough").exists()):
            stay(stays.get((step, me.rank), 0.01))
            me.sum_across([1.0])
            step += 1
            watch.beat(step * BATCH)
    if me.rank == 0:
        attempt.end("finished", step * BATCH)


def group(asked: dict[str, Any]) -> None:
    """In a process of its own, whose children the ranks are."""
    folder = Path(asked["folder"])
    log = os.open(folder / "log.txt", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(log, sys.stderr.fileno())
    codes = fork_ranks(folder / ".meeting", [f"n{rank + 1}" for rank in range(asked["ranks"])], partial(steps, asked))
    write_json(folder / "codes.json", {"codes": codes})


if __name__ == "__main__":
    for line in sys.stdin:
        if os.fork() == 0:
            group(json.loads(line))
            os._exit(0)
    while True:
        try:
            os.wait()
        except ChildProcessError:
            break
