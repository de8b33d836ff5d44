"""Runs into MLflow as they stand, by their records and the scheduler's word."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from longclip.errors import SiteError
from longclip.launch.status import UNDER_WAY, statuses
from longclip.run.folder import RunFolder
from longclip.track.mlflow import SyncReport, sync

EVERY = 30.0
"""seconds between two syncs of ``longclip sync --watch``"""


def sync_runs(runs: Sequence[RunFolder], uri: str) -> SyncReport:
    """Replays the journals of ``runs`` into the store at ``uri``, with the state that ``longclip status`` shows."""
    return sync(runs, uri, {s.run.path: s.state for s in statuses(runs)[0]})


def keep_synced(runs: Sequence[RunFolder], uri: str, say: Callable[[str], None]) -> None:
    """Syncs every ``EVERY`` seconds until no run is queued or running any more.

    A store that does not answer is told to ``say`` and tried again. Raises SiteError if the last sync fails.
    """
    while True:
        # Asked before the sync: what a run wrote until its end is then sent.
        over = all(s.state not in (*UNDER_WAY, "waiting") for s in statuses(runs)[0])
        try:
            report = sync_runs(runs, uri)
        except SiteError as error:
            if over:
                raise
            say(f"! {error.message}; trying again")
        else:
            say(f"{report}: {sum(r.points for r in report.runs):,} points")
            if over:
                return
        time.sleep(EVERY)
