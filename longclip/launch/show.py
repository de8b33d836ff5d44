"""One page about a run: what it is, how it got where it is, what is left of it on disk. Reading changes nothing."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from longclip.evaluate.conventions import lines
from longclip.experiment.identity import references
from longclip.launch.status import CONTINUES, UNDER_WAY, statuses
from longclip.run import lineage
from longclip.run.attempts import Attempt, attempts_of
from longclip.run.evaluations import records
from longclip.run.folder import RunFolder, read_json
from longclip.run.journal import read_points
from longclip.run.verdicts import verdict_of


def facts(run: RunFolder) -> dict[str, Any]:
    """All that the page says, for ``--json``. Times are seconds since 1970; what is not known (yet) is None."""
    (status,) = statuses([run])[0]
    experiment = run.experiment()
    attempts = attempts_of(run)
    paths: dict[str, str] = ((attempts[-1].submitted or {}) if attempts else {}).get("paths") or {}
    identity = run.identity()
    return {
        "run": run.name,
        "sweep": run.sweep,
        "uid": run.uid,
        "path": str(run.path.resolve()),
        "state": status.state,
        "note": status.note,
        "samples": status.samples,
        "total": status.total,
        "mlflow": _json(run.path / "mlflow.json"),
        "attempts": [_attempt(a) for a in attempts],
        "checkpoints": _checkpoints(run.checkpoints),
        "evaluations": {p.stem: _json(p) for p in sorted(run.evaluations.glob("*.json"))},
        "suites": [record for _, record in records(run.evaluations)],
        "pins": {
            key: {"reference": name, "content": identity.get(key), "path": paths.get(key)}
            for key, name in references(experiment).items()
        },
        "origin": _json(run.path / lineage.ORIGIN),
        "experiment": experiment.model_dump(mode="json"),
        "next": _next(run, status.state),
    }


def _attempt(attempt: Attempt) -> dict[str, Any]:
    submitted, started, verdict = attempt.submitted or {}, attempt.started or {}, verdict_of(attempt)
    points = read_points(attempt.journal)
    begin = started.get("time")
    # Killed: it lived at least until its last point.
    finish = (verdict.time if verdict else None) or (points[-1].time if points else None)
    return {
        "number": attempt.number,
        "job": attempt.job,
        "executor": submitted.get("executor"),
        "site": submitted.get("site"),
        "nodes": started.get("nodes", []),
        "ranks": started.get("ranks"),
        "device": started.get("device"),
        "code": started.get("code") or submitted.get("code"),
        "commit": submitted.get("commit"),
        "version": started.get("version"),
        "python": started.get("python"),
        "submitted": submitted.get("time"),
        "began": begin,
        "ended": finish,
        "seconds": None if begin is None or finish is None else finish - begin,
        "from": attempt.resumed_at,
        "to": points[-1].samples if points else verdict.samples if verdict else None,
        "verdict": verdict.kind if verdict else None,
        "message": verdict.message if verdict else "",
        "said_by": verdict.source if verdict else None,
        "cancelled_by": (_json(attempt.path / "cancelled.json") or {}).get("user"),
    }


def _checkpoints(folder: Path) -> list[dict[str, Any]]:
    """Newest last. ``best`` is what validation had chosen when the newest was saved."""
    latest = (_json(folder / "latest") or {}).get("checkpoint")
    newest = folder / str(latest)
    state = {**(_json(newest / "state.json") or {}), **(_json(newest / "validated.json") or {})}
    best = (state.get("best") or {}).get("checkpoint")
    return [
        {
            "name": path.name,
            "samples": (_json(path / "state.json") or {}).get("samples"),
            "bytes": sum(f.stat().st_size for f in path.iterdir() if f.is_file()),
            "latest": path.name == latest,
            "best": path.name == best,
            "pinned": (path / "pinned").exists(),
            "broken": path.name.startswith("broken-"),
        }
        for path in sorted([*folder.glob("step-*"), *folder.glob("broken-*")], key=lambda p: p.name.rpartition("-")[2])
    ]


def _next(run: RunFolder, state: str) -> str:
    """The command to type next."""
    if state == "finished":
        return f"longclip collect {run.sweep}"
    if state in UNDER_WAY:
        return f"longclip logs {run.name} -f"
    if state in CONTINUES:
        return f"the submit that made it, or longclip retry {run.name}"
    return f"longclip logs {run.name}, then longclip retry {run.name}"


def _json(file: Path) -> dict[str, Any] | None:
    """A record, or None where there is none (yet), or half of one."""
    try:
        return read_json(file)
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None


# ---- the page ----------------------------------------------------------------------------------------------------


def page(said: dict[str, Any], experiment: str) -> RenderableType:
    """The facts for people; ``experiment`` is the resolved YAML."""
    total = f"{said['total']:,}" if said["total"] else "?"
    head = {
        "run": f"{said['sweep']}/{said['run']}",
        "path": said["path"],
        "state": f"{said['state']}, {said['samples']:,}/{total} samples"
        + (f": {said['note']}" if said["note"] else ""),
        "mlflow": f"{said['mlflow']['run_id']} at {said['mlflow']['uri']}" if said["mlflow"] else "not synced yet",
    }
    if said["origin"]:
        head["began with"] = lineage.line(said["origin"])
    parts: list[RenderableType] = [_table((), head.items())]
    if said["attempts"]:
        titles = ("attempt", "job", "nodes", "ranks", "code", "version", "began", "took", "from", "to", "verdict")
        parts += [Text(), _table(titles, map(_attempt_row, said["attempts"]))]
    if said["checkpoints"]:
        rows = [
            (c["name"], _count(c["samples"]), f"{c['bytes'] / 2**20:,.1f} MiB", _marks(c)) for c in said["checkpoints"]
        ]
        parts += [Text(), _table(("checkpoint", "samples", "size", ""), rows)]
    for name, scores in said["evaluations"].items():
        if scores:
            parts += [Text(), _table((name, ""), _scores(scores))]
    if said["suites"]:
        parts += [Text(), *(Text(line) for record in said["suites"] for line in lines(record))]
    rows = [(k, v["reference"], (v["content"] or "?")[:12], v["path"] or "-") for k, v in said["pins"].items()]
    parts += [Text(), _table(("reference", "name", "content", "where it lay"), rows)]
    parts += [Text(), Text(experiment.rstrip()), Text(), Text(f"next: {said['next']}")]
    return Group(*parts)


def _table(titles: Sequence[str], rows: Iterable[Iterable[str]]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold", show_header=bool(titles))
    for title in titles:
        table.add_column(title, overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))  # Text: an error message may hold brackets
    return table


def _attempt_row(a: dict[str, Any]) -> tuple[str, ...]:
    verdict = ": ".join(filter(None, [a["verdict"] or "-", a["message"]]))
    return (
        str(a["number"]),
        a["job"] or "-",
        ",".join(a["nodes"]) or "-",
        f"{a['ranks']} x {str(a['device']).partition(':')[0]}" if a["ranks"] else "-",
        " ".join(filter(None, [a["code"], f"({a['commit']})" if a["commit"] else ""])) or "-",
        " ".join(filter(None, [a["version"], f"py{a['python']}" if a["python"] else ""])) or "-",
        time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(a["began"])) if a["began"] else "-",
        str(timedelta(seconds=round(a["seconds"]))) if a["seconds"] is not None else "-",
        _count(a["from"]),
        _count(a["to"]),
        verdict + (f" (cancelled by {a['cancelled_by']})" if a["cancelled_by"] else ""),
    )


def _count(samples: int | None) -> str:
    return "-" if samples is None else f"{samples:,}"


def _marks(checkpoint: dict[str, Any]) -> str:
    return ", ".join(mark for mark in ("latest", "best", "pinned", "broken") if checkpoint[mark])


def _scores(scores: dict[str, Any]) -> Iterable[tuple[str, str]]:
    """What was tested, and each score."""
    for key in ("checkpoint", "samples", "context_length", "dataset"):
        if key in scores:
            yield key, str(scores[key])[:24]
    for name, value in scores.get("metrics", {}).items():
        yield name, json.dumps(value) if not isinstance(value, float) else f"{value:.4f}"
