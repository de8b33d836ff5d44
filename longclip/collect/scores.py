"""Evaluation records (run/evaluations.py) as scores: one for each task and window, with the ranks of every query."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from longclip.collect.row import TEST, Scores
from longclip.run.evaluations import MODEL, headline, read_arrays, records
from longclip.run.folder import read_json

_AT = re.compile(r"w(\d+)/(.+)")


@dataclass(frozen=True, eq=False)
class External:
    """A model that no run here has trained, scored on suites: ``<runs>/models/<name>/``."""

    name: str
    source: str
    """a hub id or a folder"""
    context_length: int | None
    scores: tuple[Scores, ...]
    accuracy: Mapping[str, float]
    records: Mapping[str, Any]


def of_test(record: Mapping[str, Any] | None, file: Path | None, called: str) -> list[Scores]:
    """The scores of ``evaluations/test.json``; ``file`` is where its arrays lie beside."""
    if not record or not record.get("metrics"):
        return []
    arrays = read_arrays(file) if file else {}
    ranks = {side: arrays[f"{TEST}/{side}"] for side in ("i2t", "t2i") if f"{TEST}/{side}" in arrays}
    metrics = record["metrics"]
    pairs = metrics.get("pairs")
    counts = {"i2t": metrics.get("images", pairs), "t2i": metrics.get("captions", pairs)}
    return [
        Scores(
            TEST,
            str(record.get("dataset")),
            int(record["context_length"]),
            metrics,
            {side: int(n) for side, n in counts.items() if n is not None},
            ranks,
            str(record.get("convention", "strict")),
            record.get("ceiling") or {},
            called,
        )
    ]


def of_suites(
    folder: Path, checkpoint: str | None, test: str | None = None
) -> tuple[list[Scores], dict[str, float], dict[str, Any], list[str]]:
    """Of the suites in ``folder`` (a run's ``evaluations/``): retrieval scores, accuracies by ``suite/task``, the
    records by suite, and what is missing.

    Taken are those of ``checkpoint``, which validation chose; None takes any (a model without a run has one). A task on
    the data with hash ``test`` is that on the test set: its other windows stand beside it.
    """
    scores: list[Scores] = []
    accuracy: dict[str, float] = {}
    whole: dict[str, Any] = {}
    others: dict[str, list[str]] = {}
    for file, record in records(folder):
        suite = str(record["suite"])
        if checkpoint is not None and record.get("checkpoint") != checkpoint:
            others.setdefault(suite, []).append(str(record.get("checkpoint")))
            continue
        whole[suite] = record
        arrays = read_arrays(file)
        for name, task in record["tasks"].items():
            if task.get("kind") == "classification":
                # One of several labels has an AUC and no accuracy: it is in the record, not in the mean.
                shown = headline(task)
                accuracy |= {f"{suite}/{name}": shown[1]} if shown and shown[0] == "accuracy" else {}
            elif task.get("kind") == "retrieval":
                called = TEST if test is not None and task.get("data") == test else f"{suite}/{name}"
                scores += _windows(called, name, task, record, arrays, f"{suite}/{name}")
    missing = [f"suite {s}: not evaluated at {checkpoint}, only at {', '.join(c)}" for s, c in others.items()]
    return scores, accuracy, whole, [line for line, suite in zip(missing, others, strict=True) if suite not in whole]


def together(test: Sequence[Scores], suites: Sequence[Scores]) -> tuple[Scores, ...]:
    """A run's own scores on its test set, then those of suites; what a suite says of the same task and window (probes,
    strata, ranks where none were kept) is added to the run's own, which stand where both have a figure."""
    found = []
    for ours in test:
        same = [s for s in suites if (s.task, s.window, s.data) == (ours.task, ours.window, ours.data)]
        metrics = {k: v for s in reversed(same) for k, v in s.metrics.items()} | dict(ours.metrics)
        # Ranks by another convention than that of the figures beside them would be of other queries.
        alike = next((s.ranks for s in same if s.ranks and s.convention == ours.convention), {})
        found.append(replace(ours, metrics=metrics, ranks=ours.ranks or alike))
    known = {(s.task, s.window) for s in test}
    return (*found, *(s for s in suites if (s.task, s.window) not in known))


def _windows(
    task: str, name: str, facts: Mapping[str, Any], record: Mapping[str, Any], arrays: Mapping[str, Any], called: str
) -> list[Scores]:
    own = int(record["context_length"])
    metrics: dict[int, dict[str, float]] = {own: {}}
    for key, value in facts["metrics"].items():
        at = _AT.fullmatch(key)
        metrics.setdefault(int(at[1]) if at else own, {})[at[2] if at else key] = float(value)
    counts = {"i2t": facts.get("images", facts.get("pairs")), "t2i": facts.get("captions", facts.get("pairs"))}
    found = []
    for window, values in metrics.items():
        at_window = "" if window == own else f"w{window}/"
        ranks = {s: arrays[k] for s in ("i2t", "t2i") if (k := f"{name}/{at_window}{s}") in arrays}
        queries = {side: int(n) for side, n in counts.items() if n is not None}
        convention = str(facts.get("convention", record.get("convention", "strict")))
        found.append(Scores(task, str(facts.get("data")), window, values, queries, ranks, convention, called=called))
    return found


def external(folder: Path) -> External:
    """A model outside any run, from its folder. Raises FileNotFoundError where it is none."""
    facts = read_json(folder / MODEL)
    scores, accuracy, whole, _ = of_suites(folder / "evaluations", None)
    window = facts.get("context_length")
    return External(
        folder.name.rpartition("-")[0] or folder.name,
        str(facts.get("source", "")),
        None if window is None else int(window),
        tuple(scores),
        accuracy,
        whole,
    )
