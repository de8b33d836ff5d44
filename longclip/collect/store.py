"""Rows from an MLflow store or server, through its plain client: the same tables without the run folders.

``longclip sync`` leaves a run's summary there as tags, its curves as metrics, and its evaluations (suites, the ranks of
single queries) as artifacts, so ``table.csv`` comes out the same, byte for byte, as of the last sync. What MLflow does
not hold: points beyond the newest checkpoint of a run that still goes on. Where this machine cannot read the store's
artifacts, differences have no intervals, neither have means over seeds, and what suites say is missing.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from longclip.collect.gather import arranged, row_of
from longclip.collect.row import CURVES, Curve, Row
from longclip.collect.scores import of_suites, of_test, together
from longclip.errors import UserError
from longclip.track import facts
from longclip.track.mlflow import EVALUATIONS
from longclip.track.parent import PARENT
from longclip.track.store import as_site_error, patient, without_login

PAGE = 1000
_ID = re.compile(r"[0-9a-f]{32}")
"""an MLflow run"""


def gather_from(uri: str, targets: Sequence[str]) -> list[Row]:
    """A row for every run of the sweeps (or ``sweep/run``) in ``targets``, in the order of :func:`gather`; a run that
    several of them name is one row. In place of a sweep's name there may be the id of its run, the parent of its runs.

    Raises:
        UserError: the URI is neither http(s) nor SQLite, the database is not there, nothing in it is called so, or more
            than one sweep is.
        SiteError: the store cannot be read.
    """
    _check(uri)
    with patient(60), as_site_error(without_login(uri), "collect from the run folders"):
        from mlflow import MlflowClient

        client = MlflowClient(tracking_uri=uri)
        experiments = [e.experiment_id for e in client.search_experiments()]
        found = {run.info.run_id: (run, f) for t in targets for run, f in _runs(client, experiments, t, uri)}
        return arranged([_row(client, each) for each in found.values()])


def _runs(client: Any, experiments: list[str], target: str, uri: str) -> Iterator[tuple[Any, dict[str, Any]]]:
    """The runs that ``target`` names, each with its summary; parents, and runs of others, have none."""
    sweep, _, name = target.partition("/")
    found, without, shown = [], [], without_login(uri)
    tag = PARENT if _ID.fullmatch(sweep) else "longclip.sweep"
    for run in _search(client, experiments, f"tags.`{tag}` = '{sweep}'") if "'" not in sweep else ():
        if "longclip.uid" not in run.data.tags or name not in ("", run.info.run_name, run.info.run_name[:-9]):
            continue
        known = facts.read(run.data.tags)
        if known is None:
            without.append(run.info.run_name)
        else:
            found.append((run, known))
    if without:
        raise UserError(
            f"{', '.join(without[:4])}: {len(without)} runs without a summary, by an older longclip", "longclip sync"
        )
    if not found:
        there = {run.data.tags.get("longclip.sweep") for run in _search(client, experiments, "")} - {None}
        raise UserError(
            f"{target}: no such sweep in {shown}; there are: {', '.join(sorted(map(str, there))) or 'none'}",
            "longclip sync sends runs there",
        )
    parents = {run.data.tags.get(PARENT) for run, _ in found} - {None}
    if len(parents) > 1:
        raise UserError(
            f"{target}: {len(parents)} sweeps in {shown} are called so: {', '.join(_told_apart(client, found))}",
            f"longclip collect ID --mlflow {shown} takes one of them, ID ID ... several as one",
        )
    yield from found


def _told_apart(client: Any, found: Sequence[tuple[Any, dict[str, Any]]]) -> list[str]:
    """Sweeps by the ids of their runs, each with what somebody might know it by."""
    by_parent: dict[str, list[Any]] = {}
    for run, _ in found:
        by_parent.setdefault(str(run.data.tags.get(PARENT)), []).append(run)
    said = []
    for parent, runs in by_parent.items():
        name = client.get_experiment(runs[0].info.experiment_id).name
        hosts = dict.fromkeys(host for r in runs for host in r.data.tags.get("longclip.hosts", "").split(",") if host)
        where = f", on {' '.join(list(hosts)[:2])}" if hosts else ""
        said.append(f"{parent} ({len(runs)} runs, experiment {name}{where})")
    return said


def _search(client: Any, experiments: list[str], which: str) -> Iterator[Any]:
    token = None
    while True:
        page = client.search_runs(experiments, which, max_results=PAGE, page_token=token)
        yield from page
        token = page.token
        if not token:
            return


def _row(client: Any, found: tuple[Any, dict[str, Any]]) -> Row:
    run, known = found
    run_id = run.info.run_id
    curves = {name: _curve(client, run_id, name) for name in CURVES if name in run.data.metrics}
    row = row_of(known, curves, None)
    if not any(f.path == EVALUATIONS for f in _artifacts(client, run_id)):
        return row
    with tempfile.TemporaryDirectory() as folder:
        there = Path(client.download_artifacts(run_id, EVALUATIONS, folder))
        test = of_test(known["test"], there / "test.json", row.test_set, row.text)
        suites, accuracy, records, missing = of_suites(there, (known["test"] or {}).get("checkpoint"))
    return replace(row, scores=together(test, suites, test), accuracy=accuracy, records=records, notes=tuple(missing))


def _artifacts(client: Any, run_id: str) -> list[Any]:
    from mlflow.exceptions import MlflowException

    try:
        return list(client.list_artifacts(run_id))
    except (MlflowException, OSError):  # a store of artifacts that this machine cannot reach holds none for it
        return []


def _curve(client: Any, run_id: str, name: str) -> Curve:
    """One metric; of a position that was sent twice, the later measurement."""
    points = sorted((p.step, p.timestamp, p.value) for p in client.get_metric_history(run_id, name))
    last = {step: (step, value, stamp / 1000) for step, stamp, value in points}
    return Curve.of(last.values())


def _check(uri: str) -> None:
    if uri.startswith(("http://", "https://")):
        return
    file = Path(uri.removeprefix("sqlite:///").partition("?")[0])
    if not uri.startswith("sqlite:///") or not file.name:
        raise UserError(
            f"--mlflow {without_login(uri)}: valid is http://HOST:PORT, https://HOST, or sqlite:///PATH/mlflow.db"
        )
    if not file.is_file():
        raise UserError(f"--mlflow {uri}: no such database", "longclip sync makes it")
