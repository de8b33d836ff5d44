"""A sweep in MLflow: one parent run, with the sweep's runs below it and what ``longclip collect`` found out as files.

``mlflow.json`` in the sweep's folder says which MLflow run that is in each store and MLflow experiment, as the file of
that name in a run's folder does for the run. Made once, under a lease; made anew where it was deleted.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from longclip.run.folder import RunFolder, read_json, runs_of, write_json
from longclip.track.scores import AXIS, CONTEXT_LENGTH, HEADLINE, WINDOW
from longclip.track.store import TAG_LENGTH, Store, key_of, log_params, ms, opened

PARENT = "mlflow.parentRunId"
"""The tag of a child"""
NOTE = "mlflow.note.content"
"""The tag that a run's page shows as its description, in Markdown"""
RESULTS = "results"
"""Where the files of ``collect`` are, among a parent's artifacts"""


class Parents:
    """The parent runs that one sync meets, each looked up once."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._known: dict[tuple[Path, str], str] = {}
        self._moved: set[str] = set()

    def of(self, run: RunFolder, experiment: str, started: float, params: Mapping[str, str]) -> str:
        """The id of the MLflow run that stands for the sweep of ``run``; ``started`` in seconds since 1970, ``params``
        those of ``run``."""
        sweep = run.path.parent
        if (sweep, experiment) not in self._known:
            known = _recorded(self._store, sweep, experiment) or self._make(run, experiment, started, params)
            self._known[sweep, experiment] = known
        return self._known[sweep, experiment]

    def moved(self, parent: str) -> None:
        """A run below ``parent`` has another status than before."""
        self._moved.add(parent)

    def settle(self) -> None:
        """Gives the parents of runs that moved the status that their children have together."""
        for parent in sorted(self._moved):
            known = self._store.run(parent)
            children = _children(self._store, known) if known else []
            status = together(c.info.status for c in children)
            if known is None or status == known.info.status:
                continue
            if status in ("RUNNING", "SCHEDULED"):
                self._store.client.update_run(parent, status=status)
            else:
                self._store.client.set_terminated(parent, status, max((c.info.end_time or 0) for c in children))

    def _make(self, run: RunFolder, experiment: str, started: float, params: Mapping[str, str]) -> str:
        sweep, client = run.path.parent, self._store.client
        place = self._store.experiment(experiment)
        with self._store.holding(sweep) as lease:
            if known := _recorded(self._store, sweep, experiment):  # another job of the sweep was quicker
                return known
            tags = {"longclip.sweep": sweep.name, "longclip.kind": "sweep"}
            made = client.create_run(place, start_time=ms(started), tags=tags, run_name=sweep.name).info.run_id
            this = {"uri": self._store.uri, "experiment": experiment}
            others = [r for r in _records(sweep) if {**r, **this} != r]
            write_json(sweep / "mlflow.json", {"parents": [*others, {**this, "run_id": made}]})
            lease.renew()
            # Whoever ticks all runs of an experiment, this one too, compares them by the same parameters and metric.
            log_params(client, made, shared(params, run.axes()))
            client.log_metric(made, HEADLINE, math.nan, ms(started), 0)
        self._moved.add(made)
        return str(made)


def shared(params: Mapping[str, str], varied: Iterable[str]) -> dict[str, str]:
    """Those of a run's parameters that do not tell it from the other runs of its sweep, as far as was declared."""
    own = (WINDOW, CONTEXT_LENGTH, "name", *varied)
    return {k: v for k, v in params.items() if not k.startswith((AXIS, *(f"{o}." for o in own))) and k not in own}


def together(statuses: Iterable[str]) -> str:
    """One status for a sweep: under way while a run is; then the worst of its runs."""
    found = set(statuses)
    return next((s for s in ("RUNNING", "SCHEDULED", "FAILED", "KILLED", "FINISHED") if s in found), "RUNNING")


def log_results(
    runs: Sequence[RunFolder], files: Sequence[Path], note: str, summary: Mapping[str, Mapping[str, float]], uri: str
) -> list[str]:
    """Puts ``files`` and ``note`` (Markdown) under the parent of each sweep all of whose runs are among ``runs``.

    ``summary`` holds metrics of sweeps as a whole, by name. Any number of times: what is there is replaced,
    and a metric is sent when its value is another.

    Returns:
        names of the sweeps that now have the results. Not those of which only some runs were collected, or none was
        ever synced.

    Raises:
        as ``opened``.
    """
    from mlflow.entities import Metric, RunTag

    given = {run.path.resolve() for run in runs}
    whole = [
        sweep
        for sweep in dict.fromkeys(run.path.parent for run in runs)
        if all(run.path.resolve() in given for run in runs_of(sweep.parent, sweep.name))
    ]
    with opened(uri) as store:
        done = []
        for sweep in whole:
            names = dict.fromkeys(r["experiment"] for r in _records(sweep))
            for parent in filter(None, (_recorded(store, sweep, name) for name in names)):
                with store.holding(sweep) as lease:
                    has = store.client.get_run(parent).data
                    new = {
                        key_of(k): v for k, v in summary.get(sweep.name, {}).items() if has.metrics.get(key_of(k)) != v
                    }
                    now = ms(time.time())
                    store.client.log_batch(
                        parent,
                        metrics=[Metric(k, v, now, 0) for k, v in new.items()],
                        tags=[RunTag(NOTE, _short(note))],
                    )
                    for file in files:
                        store.client.log_artifact(parent, str(file), RESULTS)
                        lease.renew()
                    done.append(sweep.name)
    return done


def _recorded(store: Store, sweep: Path, experiment: str) -> str | None:
    """The id of the sweep's parent in this store; also under another address, if the store was moved."""
    ours = [r for r in _records(sweep) if r["experiment"] == experiment]
    ours.sort(key=lambda r: r["uri"] != store.uri)
    return next((r["run_id"] for r in ours if store.run(r["run_id"]) is not None), None)


def _records(sweep: Path) -> list[dict[str, str]]:
    try:
        return list(read_json(sweep / "mlflow.json")["parents"])
    except (FileNotFoundError, ValueError, KeyError):
        return []


def _children(store: Store, parent: Any) -> list[Any]:
    found: list[Any] = []
    token = None
    while True:
        page = store.client.search_runs(
            [parent.info.experiment_id], f"tags.`{PARENT}` = '{parent.info.run_id}'", page_token=token
        )
        found += page
        if not (token := page.token):
            return found


def _short(note: str) -> str:
    """At most as long as MLflow takes, cut after a line."""
    if len(note) <= TAG_LENGTH:
        return note
    more = f"\n\n... the rest is in {RESULTS}/table.md, among the artifacts"
    return note[: TAG_LENGTH - len(more)].rpartition("\n")[0] + more
