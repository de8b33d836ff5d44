"""A suite on a model: every task, one after the other, into one record. Collective."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from longclip.errors import LongclipError, UserError
from longclip.evaluate.embed import Embedder
from longclip.evaluate.gallery import open_gallery
from longclip.evaluate.pairs import retrieve
from longclip.evaluate.readers import open_labelled
from longclip.evaluate.suite import Resolved, Retrieval, Task
from longclip.evaluate.zeroshot import classify
from longclip.run.evaluations import Scored, write


def score(embedder: Embedder, resolved: Resolved, file: Path, about: Mapping[str, Any]) -> dict[str, Any]:
    """Scores the model on a suite; rank 0 writes the record ``file`` and its arrays. The record, on all ranks.

    ``about`` says which model it is: ``weights``, ``checkpoint``, ``samples``, ...

    Raises UserError where data are not those that were found when the suite was resolved.
    """
    tasks: dict[str, dict[str, Any]] = {}
    arrays: dict[str, Any] = {}
    for name, task in resolved.suite.tasks.items():
        try:
            scored = _task(embedder, task, resolved.paths[name], resolved.paths.get(f"{name}.labels"))
        except LongclipError as error:
            error.message = f"{resolved.name}: {name}: {error.message}"
            raise
        if scored.facts["data"] != resolved.data[name]:
            raise UserError(
                f"{resolved.name}: {name}: {resolved.paths[name]} has changed since this was asked for",
                "the same command again, for the data as they are now",
            )
        tasks[name] = scored.facts
        arrays |= {f"{name}/{key}": array for key, array in scored.arrays.items()}
    conventions = dict.fromkeys(str(t["convention"]) for t in tasks.values() if t["kind"] == "retrieval")
    record = {
        "suite": resolved.name,
        "suite_hash": resolved.hash,
        **about,
        "context_length": embedder.context_length,
        "convention": ", ".join(conventions),
        "tasks": tasks,
        "time": time.time(),
    }
    if embedder.ranks.rank == 0:
        write(file, record, arrays)
    return record


def _task(embedder: Embedder, task: Task, path: str, labels: str | None) -> Scored:
    if isinstance(task, Retrieval):
        return retrieve(embedder, task, open_gallery(path, task.text or "txt"))
    return classify(embedder, task, open_labelled(task, path, labels))
