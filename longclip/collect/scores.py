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


def of_test(record: Mapping[str, Any] | None, file: Path | None, called: str, text: str) -> list[Scores]:
    """The scores of ``evaluations/test.json``; ``file`` is where its arrays lie beside, ``text`` the run's."""
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
            text,
        )
    ]


def of_suites(folder: Path, checkpoint: str | None) -> tuple[list[Scores], dict[str, float], dict[str, Any], list[str]]:
    """Of the suites in ``folder`` (a run's ``evaluations/``): retrieval scores, accuracies by ``suite/task``, the
    records by suite, and what is missing.

    Taken are those of ``checkpoint``, which validation chose; None takes any (a model without a run has one).
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
                scores += _windows(f"{suite}/{name}", name, task, record, arrays)
    missing = [f"suite {s}: not evaluated at {checkpoint}, only at {', '.join(c)}" for s, c in others.items()]
    return scores, accuracy, whole, [line for line, suite in zip(missing, others, strict=True) if suite not in whole]


def together(own: Sequence[Scores], suites: Sequence[Scores], tests: Sequence[Scores]) -> tuple[Scores, ...]:
    """A model's ``own`` scores on its test set, then those of suites. What is on the queries of one of ``tests`` is of
    the test set: other windows stand beside it, and what a suite says of the same window (probes, strata, ranks where
    none were kept) is added to what is there, which stands where both have a figure.

    Another text of the same shards, or another convention, is of other queries: a task by itself.
    """
    found = {(s.task, s.data, s.text, s.window): s for s in own}
    for s in suites:
        test = next((test for test in tests if s.alike(test)), None)
        task, text = (s.task, s.text) if test is None else (TEST, test.text)
        key = task, s.data, text, s.window
        before = found.setdefault(key, replace(s, task=task, text=text))
        metrics, ranks = dict(s.metrics) | dict(before.metrics), before.ranks or s.ranks
        found[key] = replace(before, metrics=metrics, ranks=ranks)
    return tuple(found.values())


def _windows(
    task: str, name: str, facts: Mapping[str, Any], record: Mapping[str, Any], arrays: Mapping[str, Any]
) -> list[Scores]:
    own = int(record["context_length"])
    metrics: dict[int, dict[str, float]] = {own: {}}
    for key, value in facts["metrics"].items():
        at = _AT.fullmatch(key)
        metrics.setdefault(int(at[1]) if at else own, {})[at[2] if at else key] = float(value)
    # Not all captions: under open_clip's convention an image's first alone is a query.
    counts = {"i2t": facts.get("images", facts.get("pairs")), "t2i": facts.get("pairs", facts.get("captions"))}
    found = []
    for window, values in metrics.items():
        at_window = "" if window == own else f"w{window}/"
        ranks = {s: arrays[k] for s in ("i2t", "t2i") if (k := f"{name}/{at_window}{s}") in arrays}
        queries = {side: int(n) for side, n in counts.items() if n is not None}
        convention = str(facts.get("convention", record.get("convention", "strict")))
        data, text = str(facts.get("data")), facts.get("text")
        found.append(Scores(task, data, window, values, queries, ranks, convention, called=task, text=text))
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
