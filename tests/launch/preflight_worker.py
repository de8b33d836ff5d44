"""Preflights one after the other: ``python preflight_worker.py FLIGHTS`` with JSON; each rank leaves ``<rank>.json``.

A flight is ``{"folder": the run's, "nodes": ["n1", "n2"], "needs": {...}, "limit": seconds, "env": {...}}``, where
``"needs_of": {rank: {...}}``, ``"clock": {rank: seconds}``, ``"late": {rank: seconds}`` and ``"elsewhere": {rank:
folder}`` make a rank differ. Its ranks are forked from this process, which has imported torch.
"""

from __future__ import annotations

import json
import os
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

from longclip.errors import LongclipError
from longclip.launch import preflight
from longclip.launch.node import Needs
from longclip.run.folder import write_json
from longclip.train.ranks import Ranks
from longclip.train.watch import Who
from tests.forked import fork_ranks


def check(asked: dict[str, Any], me: Ranks) -> None:
    rank = str(me.rank)
    os.environ.update(asked.get("env", {}))
    who = me.gather(Who.here(me.rank))
    time.sleep(asked.get("late", {}).get(rank, 0))
    if ahead := asked.get("clock", {}).get(rank):
        right = time.time
        time.time = lambda: right() + ahead
    own = asked.get("needs_of", {}).get(rank, {})
    needs = Needs(**{"gpus": 0, "memory": 0, "shm": 0, "disk": 0, **asked.get("needs", {}), **own})
    run = Path(asked["folder"]) / asked.get("elsewhere", {}).get(rank, "")
    try:
        report = preflight.preflight(run / "attempts" / "0002", me, who, needs, asked.get("limit", 60))
        result = {"warnings": report.warnings, "seconds": report.seconds}
    except LongclipError as error:
        result = {"error": type(error).__name__, "code": error.exit_code, "message": error.message}
    write_json(Path(asked["folder"]) / f"{rank}.json", result)


if __name__ == "__main__":
    preflight.SIGHT_SECONDS = 2.0
    for asked in json.loads(sys.argv[1]):
        meeting = Path(asked["folder"]) / ".meeting"
        codes = fork_ranks(meeting, asked["nodes"], partial(check, asked))
        assert codes == [0] * len(codes), asked
