"""A suite: what a model is scored on besides its own validation and test set, as a YAML file (``experiments/suites/``).

    tasks:
      long-captions: {kind: retrieval, data: demo-test, windows: [own, 77, 512], strata: [77, 154], probes: [kept]}
      stain: {kind: classification, reader: shards, data: demo-test, label: facts.0, classes: {...}}

A suite is known by the hash of what it asks: its tasks, with the content of their data in place of names and paths. A
figure is computed once for each (weights, suite hash).
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from longclip.errors import UserError
from longclip.evaluate.classes import Classification
from longclip.evaluate.conventions import Convention
from longclip.experiment.load import read_as
from longclip.experiment.section import Section, bad
from longclip.experiment.template import template

VERSION = 2
"""counts the changes of code after which the same suite gives other figures: part of its hash"""
KEPT = (16, 32, 64, 77, 128, 154, 192, 256, 384, 512)
"""tokens that the probe ``kept`` leaves of a caption, as far as the model's own window goes"""
LEAST = 4
"""tokens of a window, as of ``model.context_length``"""

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=100)]
Probe = Literal["kept", "shuffled", "first"]


class Retrieval(Section):
    """Images and their captions, each found by the other."""

    kind: Literal["retrieval"]
    data: Annotated[str, Field(min_length=1)]
    """indexed shards (a name of the site's, or a path), or a folder with captions.csv or captions.jsonl: an image's
    path in the folder and a caption a row, any number of rows an image"""
    text: str | None = None
    """of shards: as ``data.text`` of an experiment; by default the model's own, else ``txt``"""
    windows: Annotated[tuple[str | int, ...], Field(strict=False)] = ("own",)
    """where captions are cut; each model's own always counts"""
    strata: Annotated[tuple[Annotated[int, Field(ge=1)], ...], Field(strict=False)] = ()
    """bounds of caption length in tokens: queries up to the first, up to the second, ..., and beyond the last"""
    probes: Annotated[tuple[Probe, ...], Field(strict=False)] = ()
    """R@1 by tokens ``kept``, with sentences ``shuffled``, with the ``first`` sentence alone"""
    convention: Convention = "strict"

    @model_validator(mode="after")
    def _check(self) -> Retrieval:
        if wrong := [w for w in self.windows if w != "own" and (isinstance(w, str) or w < LEAST)]:
            raise bad("windows", f"hold {wrong[0]!r}; valid is own, or a number of tokens from {LEAST}")
        if list(self.strata) != sorted(set(self.strata)):
            raise bad("strata", f"are {list(self.strata)}; valid are bounds that rise")
        if self.text is not None:
            try:
                template(self.text)
            except ValueError as error:
                raise bad("text", f"is {self.text!r}: {error}") from None
        return self


Task = Retrieval | Classification
KINDS = ("retrieval", "classification")


def _kind(value: Any) -> str | None:
    kind = value.get("kind") if isinstance(value, Mapping) else getattr(value, "kind", None)
    return f"{kind} task" if kind in KINDS else None


_Task = Annotated[
    Annotated[Retrieval, Tag("retrieval task")] | Annotated[Classification, Tag("classification task")],
    Discriminator(
        _kind,
        custom_error_type="longclip",
        custom_error_message="{message}",
        custom_error_context={"key": "kind", "message": f"missing or unknown; valid: {', '.join(KINDS)}"},
    ),
]


class Suite(Section):
    """What a suite's file says. Without ``name`` it is called as its file."""

    name: Name
    tasks: Annotated[dict[Name, _Task], Field(min_length=1)]


def read_suite(file: Path) -> Suite:
    """The suite in ``file``; paths of data are taken relative to it.

    Raises UserError: there is no such file, or it has mistakes, each with its line and key.
    """
    if not file.is_file():
        raise UserError(f"no such suite: {file}", "experiments/suites/ has some; a suite is a YAML file with tasks:")
    suite = read_as(Suite, file, name=file.stem)
    beside = file.absolute().parent
    tasks = {}
    for name, task in suite.tasks.items():
        paths = {key: path for key in ("data", "labels") if isinstance(path := getattr(task, key, None), str)}
        tasks[name] = task.model_copy(update={key: _beside(beside, path) for key, path in paths.items()})
    return suite.model_copy(update={"tasks": tasks})


def _beside(folder: Path, data: str) -> str:
    return os.path.normpath(folder / Path(data).expanduser()) if data.startswith((".", "/", "~")) else data


@dataclass(frozen=True)
class Resolved:
    """A suite with its data found: what a worker is given."""

    suite: Suite
    """its retrieval tasks have the text that is meant"""
    data: Mapping[str, str]
    """hash of the content of each task's data, wherever it lies"""
    paths: Mapping[str, str]
    """where it lies here; ``<task>.labels`` where its labels have a file of their own"""

    @property
    def name(self) -> str:
        return self.suite.name

    @property
    def hash(self) -> str:
        """sha256 (hex) of all that decides the figures; a field at its default is not in it, nor is any path."""
        tasks = {
            name: {**task.model_dump(mode="json", exclude_defaults=True, exclude={"labels"}), "data": self.data[name]}
            for name, task in self.suite.tasks.items()
        }
        text = json.dumps([VERSION, tasks], sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

    def as_record(self) -> dict[str, Any]:
        """All but the paths, which stand with those of the model: see :meth:`named_paths`."""
        return {
            "suite": self.suite.model_dump(mode="json", exclude_defaults=True),
            "hash": self.hash,
            "data": dict(self.data),
        }

    def named_paths(self) -> dict[str, str]:
        """``evaluate.suites.<suite>.<task>`` -> path"""
        return {f"{_KEY}.{self.name}.{task}": path for task, path in self.paths.items()}

    @classmethod
    def of_record(cls, record: Mapping[str, Any], paths: Mapping[str, str]) -> Resolved:
        """``paths`` holds :meth:`named_paths`, and perhaps others."""
        suite = Suite.model_validate(record["suite"])
        start = f"{_KEY}.{suite.name}."
        own = {key.removeprefix(start): path for key, path in paths.items() if key.startswith(start)}
        return cls(suite, dict(record["data"]), own)


_KEY = "evaluate.suites"
