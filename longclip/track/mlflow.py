"""Journals into MLflow: one run folder is one MLflow run is one curve, over any number of attempts.

MLflow cannot delete points, and what lies beyond the newest durable checkpoint may be computed once more. So only
points up to it are sent, and the rest when the run has finished; a live curve comes from the journal. Step is the
number of samples seen, timestamps are the journal's. The same point sent twice is stored once, so replaying is always
safe. ``mlflow.json`` in the run folder says which MLflow run stands for it, and up to where that one has been sent.

The runs of a sweep are children of one parent run (parent.py). Who may write when is in store.py.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from longclip.errors import LongclipError
from longclip.experiment.identity import flatten, train_sources
from longclip.run import checkpoints
from longclip.run.attempts import Attempt, attempts_of
from longclip.run.folder import RunFolder, read_json, write_json
from longclip.run.journal import Point, laid, read_points
from longclip.run.verdicts import INFRASTRUCTURE, verdict_of
from longclip.track import facts
from longclip.track.lease import Lease
from longclip.track.parent import PARENT, Parents
from longclip.track.scores import HEADLINE, axes, finals, tested
from longclip.track.store import (
    DIGEST_LENGTH,
    METRICS_A_CALL,
    PARAM_LENGTH,
    Store,
    key_of,
    log_params,
    ms,
    opened,
    parts,
)

STATUS = {
    "finished": "FINISHED",
    "running": "RUNNING",
    **dict.fromkeys(("queued", "waiting"), "SCHEDULED"),
    **dict.fromkeys((*INFRASTRUCTURE, "cancelled", "killed", "lost"), "KILLED"),
}
"""A run's state -> what MLflow shows; all other states are FAILED"""
EVALUATIONS = "evaluations"
"""among a run's artifacts: the folder of that name in its own folder"""


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
    left: str = ""
    """why its evaluations are not among its artifacts; all else is there"""


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
        left = next((f"; evaluations not sent: {r.left}" for r in self.runs if r.left), "")
        return f"{names} ({', '.join(words)}){left}"


def sync(runs: Sequence[RunFolder], uri: str, states: Mapping[Path, str] | None = None) -> SyncReport:
    """Replays the journals of ``runs`` into the MLflow store at ``uri``. Any number of times, by any number at once.

    ``states`` holds, by run folder, what the scheduler and the records say together (``launch.status``). Without it
    a run that was killed before it could leave a verdict shows as RUNNING.

    Raises:
        UserError: ``uri`` is neither http(s) nor SQLite.
        SiteError: the store cannot be reached or written, or another writer does not let go of it.
    """
    begun = [r for r in runs if any(a.started or a.ended for a in attempts_of(r))]
    done = []
    with opened(uri) as store:
        parents = Parents(store)
        for run in begun:
            with store.holding(run.path) as lease:
                done.append(_replay(run, store, parents, (states or {}).get(run.path), lease))
        parents.settle()
    return SyncReport(store.uri, tuple(done), len(runs) - len(begun))


# ---- one run -----------------------------------------------------------------------------------------------------


def _replay(run: RunFolder, store: Store, parents: Parents, state: str | None, lease: Lease) -> Synced:
    from mlflow.entities import Metric, RunTag

    attempts = attempts_of(run)
    experiment = run.experiment()
    last = attempts[-1]
    status = _status(last, state)
    # The checkpoint is read before the journal, which was flushed before it: what is durable is then all seen.
    limit = math.inf if status == "FINISHED" else _durable(run)
    journals = {a: read_points(a.journal) for a in attempts}
    points = laid(attempts, journals)
    name = experiment.track.experiment or run.sweep
    started = [float(a.started["time"]) for a in attempts if a.started and "time" in a.started]
    begun = min(started, default=time.time())
    params = _params(run, experiment)
    parent = parents.of(run, name, begun, params)
    lease.renew()
    client = store.client
    known, sent, sender, evaluated = _claimed(run, store)
    if known is None:
        place = store.experiment(name)
        lease.renew()
        known = client.create_run(place, start_time=ms(begun), tags={PARENT: parent}, run_name=run.name)
        sent, evaluated = 0, ""
        parents.moved(parent)
    run_id = known.info.run_id
    record = {"run_id": run_id, "uri": store.uri, "samples": sent, "attempt": sender}
    record |= {"evaluations": evaluated} if evaluated else {}
    write_json(run.path / "mlflow.json", record)

    # Parameters never change in MLflow: the first attempt's stay.
    log_params(client, run_id, {k: v for k, v in params.items() if k not in known.data.params})
    lease.renew()
    # Before all other metrics: see scores.py.
    first = [] if HEADLINE in known.data.metrics else [Metric(HEADLINE, math.nan, ms(begun), 0)]
    tags = {PARENT: parent, **_tags(run, attempts, experiment), **facts.tags(run, attempts, journals)}
    client.log_batch(run_id, metrics=first, tags=[RunTag(k, str(v)) for k, v in tags.items()])
    lease.renew()
    client.log_inputs(run_id, _datasets(run, experiment))
    lease.renew()

    # From the last position sent, and that one again: the journal may have had only half of its points then. Not so if
    # the checkpoint there turned out to be broken, and a later attempt came by once more: its points have other times.
    after = sent if _passed(attempts, sent) == sender else sent + 1
    new = [p for p in points if after <= p.samples <= limit]
    metrics = [Metric(key_of(k), float(v), ms(p.time), p.samples) for p in new for k, v in p.metrics.items()]
    metrics += [Metric(k, v, t, step) for k, v, t, step in finals(run, last, points, experiment)]
    for part in parts(metrics, METRICS_A_CALL):
        client.log_batch(run_id, metrics=part)
        lease.renew()
    if new:
        sent = new[-1].samples
        sender = _passed(attempts, sent)
    if status != known.info.status:
        if status in ("RUNNING", "SCHEDULED"):
            client.update_run(run_id, status=status)
        else:
            client.set_terminated(run_id, status, ms(_end(last, points)))
        parents.moved(parent)
    evaluated, left = _send_evaluations(run, evaluated, client, run_id)
    record |= {"samples": sent, "attempt": sender} | ({"evaluations": evaluated} if evaluated else {})
    write_json(run.path / "mlflow.json", record)
    return Synced(run.name, run_id, name, status, sent, len(new), left)


def _send_evaluations(run: RunFolder, sent: str, client: Any, run_id: str) -> tuple[str, str]:
    """Puts the run's ``evaluations/`` among its artifacts where they are not what was ``sent``: their fingerprint, and
    why they could not go. Ranks of single queries are files; paired intervals need them.

    That a server's artifacts cannot be reached from here (they may lie in a bucket) hurts nothing else.
    """
    from mlflow.exceptions import MlflowException

    files = sorted(f for f in run.evaluations.rglob("*") if f.suffix in (".json", ".npz") and f.is_file())
    if not files:
        return "", ""
    stats = [(str(f.relative_to(run.evaluations)), f.stat().st_size, f.stat().st_mtime_ns) for f in files]
    fingerprint = hashlib.sha256(repr(stats).encode()).hexdigest()[:16]
    if fingerprint == sent:
        return sent, ""
    try:
        client.log_artifacts(run_id, str(run.evaluations), EVALUATIONS)
    except (MlflowException, OSError, ImportError) as error:  # such as no boto3 for a bucket
        lines = str(error).strip().splitlines() or [type(error).__name__]
        return "", lines[0][:200]
    return fingerprint, ""


def _claimed(run: RunFolder, store: Store) -> tuple[Any, int, int, str]:
    """The MLflow run that stands for ``run`` in this store, or None; the position sent, by which attempt, and the
    fingerprint of the evaluations sent."""
    try:
        record = read_json(run.path / "mlflow.json")
        known = store.run(record["run_id"])
    except (FileNotFoundError, ValueError, KeyError):
        return None, 0, 0, ""
    # Known under another address: a moved store, or an older copy of it. All is sent again, and stored once.
    if known is None or record.get("uri") != store.uri:
        return known, 0, 0, ""
    return known, int(record["samples"]), int(record.get("attempt", 0)), str(record.get("evaluations", ""))


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


def _params(run: RunFolder, experiment: Any) -> dict[str, str]:
    found = axes(experiment.model.context_length, run.axes())
    found |= flatten(experiment.model_dump(mode="json", exclude={"slurm"}))
    return {key_of(k): str(v)[:PARAM_LENGTH] for k, v in found.items() if v is not None}


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

    hashes = {**run.identity(), "data.test": (tested(run) or {}).get("dataset")}
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
