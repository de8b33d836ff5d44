"""Zero-shot classification as one figure a model: the mean over the tasks that all of a table have."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np

from longclip.collect.row import Row
from longclip.collect.scores import External


def shared_tasks(models: Sequence[Row | External]) -> tuple[tuple[str, ...], list[str]]:
    """``suite/task`` of those that every model has which has any; and in words who lacks what, or was asked otherwise.

    A mean over more tasks, or over others, is another figure: it would tell the tasks apart and not the models.
    """
    scored = [m for m in models if m.accuracy]
    every = list(dict.fromkeys(task for m in scored for task in m.accuracy))
    said = []
    if scored and (without := [m.name for m in models if not m.accuracy]):
        said.append(f"{', '.join(without)}: no zero-shot task was scored ({', '.join(every)} of others)")
    shared = tuple(task for task in every if all(task in m.accuracy for m in scored))
    for task in every:
        if task not in shared:
            lacking = ", ".join(m.name for m in scored if task not in m.accuracy)
            said.append(f"{lacking}: {task} was not scored: left out of the zero-shot mean of all")
    return shared, [*said, *_other_suites(scored)]


def mean_accuracy(model: Row | External, tasks: Sequence[str]) -> float | None:
    """In [0, 1], each task counting the same; None where the model has none."""
    return float(np.mean([model.accuracy[task] for task in tasks])) if tasks and model.accuracy else None


def _other_suites(models: Sequence[Row | External]) -> list[str]:
    """Suites of one name that are not one by their hash. Where a task takes each model's own text the hashes differ as
    they should, and say nothing."""
    found = []
    for suite in dict.fromkeys(task.partition("/")[0] for m in models for task in m.accuracy):
        by_text: dict[str, dict[str, str]] = {}
        for m in models:
            if (record := m.records.get(suite)) is not None:
                texts = repr([task["text"] for task in record["tasks"].values() if "text" in task])
                by_text.setdefault(texts, {})[m.name] = str(record.get("suite_hash"))
        for hashes in by_text.values():
            usual = Counter(hashes.values()).most_common(1)[0][0]
            if others := [name for name, digest in hashes.items() if digest != usual]:
                found.append(
                    f"{', '.join(others)}: suite {suite} is not that of the others (its hash differs): zero-shot "
                    "may be of other data, classes or templates"
                )
    return found
