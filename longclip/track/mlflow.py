"""Journals into MLflow: one run folder is one MLflow run is one curve, over any number of attempts.

MLflow cannot delete points, and what lies beyond the newest durable checkpoint may be computed once more. So only
points up to it are sent, and the rest when the run has finished; a live curve comes from the journal. Step is the
number of samples seen, timestamps are the journal's. The same point sent twice is stored once, so replaying is always
safe. ``mlflow.json`` in the run folder says which MLflow run stands for it, and up to where that one has been sent.

SQLite has one writer at a time: all of ``sync`` holds a lease, a lock file beside the database (never flock, which
shared file systems do not keep). On a server the lease is the run folder's, so that a run is created once.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from longclip.errors import LongclipError, SiteError, UserError
from longclip.experiment.identity import flatten, train_sources
from longclip.run import checkpoints
from longclip.run.attempts import FINISHED, Attempt, attempts_of
from longclip.run.folder import RunFolder, read_json, write_json
from longclip.run.journal import Point, laid, read_points, text_shares
from longclip.run.verdicts import INFRASTRUCTURE, verdict_of
from longclip.track import facts
from longclip.track.lease import Lease

T = TypeVar("T")

METRICS_A_CALL, PARAMS_A_CALL = 1000, 100  # MLflow's limits, as are the two below
PARAM_LENGTH, DIGEST_LENGTH = 6000, 36
STATUS = {
    "finished": "FINISHED",
    "running": "RUNNING",
    **dict.fromkeys(("queued", "waiting"), "SCHEDULED"),
    **dict.fromkeys((*INFRASTRUCTURE, "cancelled", "killed", "lost"), "KILLED"),
}
"""A run's state -> what MLflow shows; all other states are FAILED"""
PATIENCE = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1", "MLFLOW_HTTP_REQUEST_TIMEOUT": "20"}
"""A server that does not answer is given up in under a minute; by default MLflow tries for a quarter of an hour"""
SILENT = 50.0
"""Seconds after which who syncs with a server, and renews its lease at every request, counts as killed"""


@dataclass(frozen=True)
class Synced:
    """One run as it now stands in MLflow."""

    run: str
    run_id: str
    experiment: str
    status: str
    """as MLflow shows it: FINISHED; RUNNING; SCHEDULED (has begun and waits for its next job); KILLED (stopped, and
    ``longclip submit`` or ``retry`` continues it: cancelled, killed, interrupted with no job queued); FAILED (ended by
    itself: crashed, diverged, ...)"""
    samples: int
    """sent up to here"""
    points: int
    """journal points sent this time"""


@dataclass(frozen=True)
class SyncReport:
    """What ``sync`` did."""

    uri: str
    """without user and password"""
    runs: tuple[Synced, ...]
    waiting: int
    """runs left out, because no attempt of them has started yet"""

    def __str__(self) -> str:
        names = ", ".join(sorted({r.experiment for r in self.runs})) or "nothing to send"
        words = [f"{len(self.runs)} run{'' if len(self.runs) == 1 else 's'} synced"]
        words += [f"{self.waiting} not started"] if self.waiting else []
        return f"{names} ({', '.join(words)})"


def sync(runs: Sequence[RunFolder], uri: str, states: Mapping[Path, str] | None = None) -> SyncReport:
    """Replays the journals of ``runs`` into the MLflow store at ``uri``. Any number of times, by any number at once.

    ``states`` holds, by run folder, what the scheduler and the records say together (``launch.status``). Without it
    a run that was killed before it could leave a verdict shows as RUNNING.

    Raises:
        UserError: ``uri`` is neither http(s) nor SQLite.
        SiteError: the store cannot be reached or written, or another writer does not let go of it.
    """
    database = _database(uri)
    states = states or {}
    shown = _without_login(uri) if database is None else f"sqlite:///{database}"
    with _patient(), _as_site_error(shown, uri):
        from mlflow import MlflowClient

        # After the import, which sets the level of its own loggers; alembic tells of every migration.
        for name in ("mlflow", "alembic"):
            logging.getLogger(name).setLevel(logging.WARNING)
        if database is None:
            return _sync(runs, MlflowClient(tracking_uri=uri), shown, states, None, None)
        database.parent.mkdir(parents=True, exist_ok=True)
        with Lease(database.with_name(f"{database.name}.lock")) as lease:
            # The first client of a fresh database creates its tables, which must not happen twice at once.
            # MLflow would put artifacts into the working folder.
            place = (database.parent / "mlartifacts").as_uri()
            return _sync(runs, MlflowClient(tracking_uri=uri), shown, states, place, lease)


# ---- one run -----------------------------------------------------------------------------------------------------


def _sync(
    runs: Sequence[RunFolder],
    client: Any,
    uri: str,
    states: Mapping[Path, str],
    artifacts: str | None,
    held: Lease | None,
) -> SyncReport:
    begun = [r for r in runs if any(a.started or a.ended for a in attempts_of(r))]
    done = []
    for run in begun:
        with contextlib.nullcontext(held) if held else Lease(run.path / ".mlflow.lock", SILENT) as lease:
            done.append(_replay(run, client, uri, states.get(run.path), artifacts, lease))
    return SyncReport(uri, tuple(done), len(runs) - len(begun))


def _replay(run: RunFolder, client: Any, uri: str, state: str | None, artifacts: str | None, lease: Lease) -> Synced:
    from mlflow.entities import Metric, Param, RunTag

    attempts = attempts_of(run)
    experiment = run.experiment()
    last = attempts[-1]
    status = _status(last, state)
    # The checkpoint is read before the journal, which was flushed before it: what is durable is then all seen.
    limit = math.inf if status == "FINISHED" else _durable(run)
    journals = {a: read_points(a.journal) for a in attempts}
    points = laid(attempts, journals)
    name = experiment.track.experiment or run.sweep
    known, sent, sender = _claimed(run, client, uri)
    if known is None:
        started = [float(a.started["time"]) for a in attempts if a.started and "time" in a.started]
        place = _experiment(client, name, artifacts)
        lease.renew()
        known = client.create_run(place, start_time=_ms(min(started)) if started else None, run_name=run.name)
        sent = 0
    run_id = known.info.run_id
    record = {"run_id": run_id, "uri": uri, "samples": sent, "attempt": sender}
    write_json(run.path / "mlflow.json", record)

    params = flatten(experiment.model_dump(mode="json", exclude={"slurm"}))
    # Parameters never change in MLflow: the first attempt's stay.
    absent = {k: v for k, v in params.items() if v is not None and _key(k) not in known.data.params}
    for part in _parts(list(absent.items()), PARAMS_A_CALL):
        client.log_batch(run_id, params=[Param(_key(k), str(v)[:PARAM_LENGTH]) for k, v in part])
        lease.renew()
    tags = {**_tags(run, attempts, experiment), **facts.tags(run, attempts, journals)}
    client.log_batch(run_id, tags=[RunTag(k, str(v)) for k, v in tags.items()])
    lease.renew()
    client.log_inputs(run_id, _datasets(run, experiment))
    lease.renew()

    # From the last position sent, and that one again: the journal may have had only half of its points then. Not so if
    # the checkpoint there turned out to be broken, and a later attempt came by once more: its points have other times.
    after = sent if _passed(attempts, sent) == sender else sent + 1
    new = [p for p in points if after <= p.samples <= limit]
    metrics = [Metric(_key(k), float(v), _ms(p.time), p.samples) for p in new for k, v in p.metrics.items()]
    metrics += [Metric(k, v, t, step) for k, v, t, step in _finals(run, last, points, experiment)]
    for part in _parts(metrics, METRICS_A_CALL):
        client.log_batch(run_id, metrics=part)
        lease.renew()
    if new:
        sent = new[-1].samples
        sender = _passed(attempts, sent)
    if status != known.info.status:
        if status in ("RUNNING", "SCHEDULED"):
            client.update_run(run_id, status=status)
        else:
            client.set_terminated(run_id, status, _ms(_end(last, points)))
    write_json(run.path / "mlflow.json", {**record, "samples": sent, "attempt": sender})
    return Synced(run.name, run_id, name, status, sent, len(new))


def _claimed(run: RunFolder, client: Any, uri: str) -> tuple[Any, int, int]:
    """The MLflow run that stands for ``run`` in this store, or None; the position sent, and by which attempt."""
    from mlflow.exceptions import MlflowException

    try:
        record = read_json(run.path / "mlflow.json")
        known = client.get_run(record["run_id"])
    except (FileNotFoundError, ValueError, KeyError):
        return None, 0, 0
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return None, 0, 0
    if known.info.lifecycle_stage != "active":
        return None, 0, 0
    # Known under another address: a moved store, or an older copy of it. All is sent again, and stored once.
    if record.get("uri") != uri:
        return known, 0, 0
    return known, int(record["samples"]), int(record.get("attempt", 0))


def _experiment(client: Any, name: str, artifacts: str | None) -> str:
    """The id of the MLflow experiment called ``name``, created where there is none."""
    from mlflow.exceptions import MlflowException

    known = client.get_experiment_by_name(name)
    if known is None:
        try:
            return str(client.create_experiment(name, artifact_location=artifacts))
        except MlflowException as error:  # on a server, another run's sync may have been quicker
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
            known = client.get_experiment_by_name(name)
    if known.lifecycle_stage != "active":
        raise SiteError(
            f"MLflow experiment {name!r} has been deleted in this store",
            f"mlflow experiments restore --experiment-id {known.experiment_id}, or set track.experiment",
        )
    return str(known.experiment_id)


def _status(last: Attempt, state: str | None) -> str:
    """MLflow's word for ``state``; without one, for what the last attempt recorded."""
    if state is None or state == "unknown":
        verdict = verdict_of(last)
        cancelled = (last.path / "cancelled.json").exists()
        if verdict is None:
            return "KILLED" if cancelled else "RUNNING"
        waits = verdict.kind in INFRASTRUCTURE and not cancelled
        state = "queued" if waits else "cancelled" if verdict.kind in INFRASTRUCTURE else verdict.kind
    return STATUS.get(state, "FAILED")


def _end(last: Attempt, points: Sequence[Point]) -> float:
    """When the run ended, in seconds since 1970; for one that was killed, its last sign of life."""
    times = [(last.ended or {}).get("time"), points[-1].time if points else None, (last.started or {}).get("time")]
    return float(next((t for t in times if t), 0)) or time.time()


def _passed(attempts: Sequence[Attempt], samples: int) -> int:
    """The attempt whose point at ``samples`` counts: the last that began before it; 0 where there is none."""
    return max((a.number for a in attempts if a.resumed_at is not None and a.resumed_at < samples), default=0)


def _durable(run: RunFolder) -> float:
    """Samples seen at the newest checkpoint that was published; -1 where there is none."""
    try:
        return int(checkpoints.state_of(checkpoints.published(run.checkpoints)[-1])["samples"])
    except (OSError, LongclipError, IndexError, KeyError, TypeError):
        return -1


def _tags(run: RunFolder, attempts: Sequence[Attempt], experiment: Any) -> dict[str, Any]:
    def each(*values: Any) -> str:
        return ",".join(dict.fromkeys(str(v) for v in values if v))

    started, submitted = [a.started or {} for a in attempts], [a.submitted or {} for a in attempts]
    tags = {
        "context_length": experiment.model.context_length,
        "sweep": run.sweep,
        "uid": run.uid,
        "attempts": len(attempts),
        "jobs": each(*(a.job for a in attempts)),
        "hosts": each(*(n for s in started for n in s.get("nodes", ()))),
        "code": each(*(s.get("code") for s in started)) or each(*(s.get("code") for s in submitted)),
        "commit": each(*(s.get("commit") for s in submitted)),
    }
    return {f"longclip.{k}": v for k, v in tags.items() if v != ""}


def _datasets(run: RunFolder, experiment: Any) -> list[Any]:
    """What the run read: the name in the experiment as source, the hash of the content as digest."""
    from mlflow.entities import Dataset, DatasetInput, InputTag

    hashes = {**run.identity(), "data.test": (_test(run) or {}).get("dataset")}
    return [
        DatasetInput(
            Dataset(key, str(hashes[key])[:DIGEST_LENGTH], "longclip", str(name)),
            [InputTag("mlflow.data.context", context)],
        )
        for key, name, context in (
            *((key, name, "training") for key, name in train_sources(experiment).items()),
            ("data.val", experiment.data.val, "validation"),
            ("data.test", experiment.data.test, "test"),
        )
        if hashes.get(key)
    ]


def _finals(
    run: RunFolder, last: Attempt, points: Sequence[Point], experiment: Any
) -> list[tuple[str, float, int, int]]:
    """Metrics of the run as a whole: (name, value, time [ms], step). Only when it has finished and the whole journal
    is here (NFS may show the verdict first): a value that changed later would be a second point. For the same reason
    their time is the verdict's."""
    ended = last.ended or {}
    if ended.get("verdict") != FINISHED or not points or points[-1].samples != ended.get("samples"):
        return []
    when, end = _ms(ended["time"]), points[-1].samples
    shares = text_shares(points, experiment.model.context_length)
    values = [] if shares is None else [("text/waste", shares[0], when, end)]
    # Not text/padding_avoided, which is a curve: the same over the last few steps.
    values += [] if shares is None else [("text/padding_avoided_overall", shares[1], when, end)]
    test = _test(run)
    if test is not None:
        scores = {**test["metrics"], **{f"ceiling_{k}": v for k, v in (test.get("ceiling") or {}).items()}}
        values += [(f"test/{_key(k)}", float(v), when, int(test["samples"])) for k, v in scores.items()]
    return values


def _test(run: RunFolder) -> dict[str, Any] | None:
    file = run.evaluations / "test.json"
    return read_json(file) if file.exists() else None


def _key(name: str) -> str:
    """A name that MLflow takes."""
    return re.sub(r"[^\w\-. :/]", "_", name)


def _parts(values: list[T], size: int) -> Iterator[list[T]]:
    return (values[i : i + size] for i in range(0, len(values), size))


def _ms(seconds: float) -> int:
    return round(seconds * 1000)


# ---- the store ---------------------------------------------------------------------------------------------------


def _database(uri: str) -> Path | None:
    """The file of an SQLite URI, None for a server. Raises UserError for anything else."""
    if uri.startswith(("http://", "https://")):
        return None
    path = uri.removeprefix("sqlite:///").partition("?")[0]
    if not uri.startswith("sqlite:///") or not path:
        raise UserError(
            f"MLflow URI {_without_login(uri)!r}: valid is http://HOST:PORT, https://HOST, or sqlite:///PATH/mlflow.db",
            "set tracking: in the site profile",
        )
    return Path(path).resolve()


def _without_login(uri: str) -> str:
    return re.sub(r"//[^/@]*@", "//", uri)


@contextlib.contextmanager
def _patient() -> Iterator[None]:
    """Short patience with servers while it lasts, where the user has not said otherwise.

    Telemetry stays off, and so do the links that MLflow prints to stdout, where a script may expect JSON.
    """
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    ours = {k: v for k, v in PATIENCE.items() if k not in os.environ}
    os.environ.update(ours)
    try:
        yield
    finally:
        for name in ours:
            os.environ.pop(name, None)


@contextlib.contextmanager
def _as_site_error(shown: str, uri: str) -> Iterator[None]:
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    try:
        yield
    except (MlflowException, SQLAlchemyError, OSError) as error:
        lines = _without_login(str(error)).strip().splitlines()
        what = lines[0] if lines else type(error).__name__
        raise SiteError(
            f"MLflow at {shown}: {what[:300]}", "the runs are untouched; longclip sync sends them later"
        ) from None
