"""Ranks that step and beat: ``python watch_worker.py ASKED`` with JSON; prints their exit codes when all have left.

ASKED is ``{"folder": the attempt's, "ranks": 3, "floor": seconds}``, and may have ``"stays": [[step, rank, seconds]]``:
where that rank sleeps on the way, and the others wait for it. The ranks record who they are in ``started.json``, and
step until the folder has a file ``enough``. They are forked from this process, which has imported torch.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from longclip.run.attempts import Attempt
from longclip.run.folder import write_json
from longclip.train import watch as watching
from longclip.train.ranks import Ranks
from longclip.train.watch import Watch, Who

BATCH = 10
watching.HEARTBEAT_SECONDS = 0.5


def stay(seconds: float) -> None:
    time.sleep(seconds)


def steps(asked: dict[str, Any], me: Ranks) -> None:
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


def rank_of(asked: dict[str, Any], rank: int) -> None:
    os.environ["SLURMD_NODENAME"] = f"n{rank + 1}"
    meeting = f"file://{asked['folder']}/.meeting"
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=asked["ranks"])
    steps(asked, Ranks(rank, asked["ranks"], rank, torch.device("cpu")))


def main(asked: dict[str, Any]) -> None:
    children = []
    for rank in range(asked["ranks"]):
        child = os.fork()
        if child == 0:
            code = 1
            try:
                rank_of(asked, rank)
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)
        children.append(child)
    print(json.dumps([os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
