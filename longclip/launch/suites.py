"""Suites on the submit side: their data found through the site and checked, handed to a job with all that it needs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from longclip.data.shards import Dataset
from longclip.data.text import Text, render, words
from longclip.errors import LongclipError, SiteError, UserError
from longclip.evaluate.gallery import Shards, open_gallery
from longclip.evaluate.readers import open_labelled
from longclip.evaluate.suite import Resolved, Retrieval, Suite, Task
from longclip.launch.site import Site
from longclip.run.folder import read_json, write_json

FILE = "suites.json"
"""in an attempt's folder"""


def resolve_suite(suite: Suite, site: Site, text: str) -> Resolved:
    """Finds the data of every task. ``text`` is what a retrieval task takes of shards where the suite does not say.

    Raises UserError or SiteError where data are missing or cannot be used, with the task.
    """
    tasks: dict[str, Any] = {}
    data: dict[str, str] = {}
    paths: dict[str, str] = {}
    for name, task in suite.tasks.items():
        try:
            tasks[name], data[name], found = _resolved(task, site, text)
        except LongclipError as error:
            error.message = f"suite {suite.name}: {name}: {error.message}"
            raise
        paths |= {f"{name}{key}": path for key, path in found.items()}
    return Resolved(suite.model_copy(update={"tasks": tasks}), data, paths)


def _resolved(task: Task, site: Site, text: str) -> tuple[Task, str, dict[str, str]]:
    """The task in full, the hash of its data, and their paths."""
    data = str(Path(site.dataset(task.data)).absolute())
    if isinstance(task, Retrieval):
        full = task.model_copy(update={"text": task.text or text})
        gallery = open_gallery(data, full.text or text)
        if isinstance(gallery, Shards):
            check_text(gallery.dataset, gallery.text, "text")
        else:
            full = task  # a captions file says what the text is
        return full, gallery.hash, {"": data}
    labels = None if task.labels is None else str(Path(site.dataset(task.labels)).absolute())
    found = {"": data} if labels is None else {"": data, ".labels": labels}
    return task, open_labelled(task, data, labels).hash, found


def write_suites(folder: Path, suites: list[Resolved]) -> None:
    if suites:
        write_json(folder / FILE, {"suites": [suite.as_record() for suite in suites]})


def suites_of(folder: Path, paths: Mapping[str, str]) -> list[Resolved]:
    """What :func:`write_suites` left in an attempt's folder."""
    try:
        records = read_json(folder / FILE)["suites"]
    except FileNotFoundError:
        return []
    return [Resolved.of_record(record, paths) for record in records]


LOOKED_AT = 100
"""samples among which every field that a template names must occur"""


def check_text(dataset: Dataset, text: Text, key: str) -> None:
    """Some of the first samples have the text that is wanted: a misnamed field shows before the queue, not after.

    Raises UserError, or SiteError where the samples cannot be read.
    """
    shard = next(i for i, size in enumerate(dataset.sizes) if size)
    count = min(LOOKED_AT, dataset.sizes[shard])
    try:
        first = [dataset.fields_and_text(shard, index) for index in range(count)]
    except OSError as error:
        raise SiteError(f"{dataset.folder}: cannot be read: {error}", f"longclip data index {dataset.folder}") from None
    samples = [{**fields, "txt": txt} for _, txt, fields in first]
    known = ", ".join(sorted({k for s in samples for k, v in s.items() if words(v)}))
    valid = f"{key}: one of {known}, or a template over them"
    for name in text.names:  # what is not there is empty, and rightly; a number would be as well
        for held in (s[name] for s in samples if s.get(name) not in (None, "", [], {})):
            if not words(held):
                raise UserError(
                    f"{dataset.folder}: {name} ({key}) holds {json.dumps(held)[:60]}, which is no text", valid
                )
    missing = [name for name in text.names if not any(name in sample for sample in samples)]
    missing += [t for t in text.texts if not any(render(t, sample).strip() for sample in samples)]
    if missing:
        raise UserError(f"{dataset.folder} has no text {missing[0]!r} ({key}) in its first {count} samples", valid)
