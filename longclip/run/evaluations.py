"""Scores of checkpoints, as files: what an evaluation leaves, and what a collector reads.

    evaluations/test.json  test.npz                     the chosen checkpoint on data.test, by the job that trained it
    evaluations/<suite>/<checkpoint>.json  .npz         a suite (evaluate/suite.py), any checkpoint

A record of a suite:

    {"suite": name, "suite_hash": hex, "weights": sha256 of the weights, "checkpoint": "step-00000480", "samples": 480,
     "context_length": 77, "convention": "strict", "time": seconds since 1970,
     "tasks": {task: {"kind": "retrieval", "data": hash of the data, "images": n, "captions": n, "pairs": n,
                      "convention": "strict", "metrics": {...}, "skipped": {"w512": why}},
               task: {"kind": "classification", "data": hash of the data, "images": n, "metrics": {...}}}}

and beside it arrays, one value a query, in the same order for every model on the same data:

    "<task>/i2t", "<task>/t2i"         int32, wrong candidates before the match: 0 is a hit at 1
    "<task>/tokens"                    int32, full length of the captions of ``t2i`` in tokens
    "<task>/w512/i2t", ...             at another window

``test.npz`` has them for a task called ``test``. Models that are no runs have a folder ``<runs>/models/<name>-<hash>/``
with ``model.json`` and ``evaluations/`` as above. A record is written after its arrays, so one that is there is whole.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from longclip.run.folder import read_json, write_json

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

MODELS = "models"
"""in the folder of runs: models that no run has trained"""
MODEL = "model.json"


@dataclass(frozen=True)
class Scored:
    """What a model did on one task of a suite."""

    facts: dict[str, Any]
    """the task's part of the record: ``kind``, ``data``, how many, ``metrics``, ..."""
    arrays: dict[str, NDArray[Any]] = field(default_factory=dict)
    """by name, without the task's"""


def headline(task: Mapping[str, Any]) -> tuple[str, float] | None:
    """The metric by which a table shows a classification task, and its value in [0, 1].

    ``accuracy``; ``auc``, the mean over labels, where an image may have several. None where neither is defined.
    """
    found = task.get("metrics", {})
    return next(((name, float(found[name])) for name in ("accuracy", "auc") if name in found), None)


def place(folder: Path, suite: str, checkpoint: str) -> Path:
    """The record of a suite on a checkpoint; ``folder`` is a run's ``evaluations/``."""
    return folder / suite / f"{checkpoint}.json"


def write(file: Path, record: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]]) -> None:
    """Writes the arrays, then the record ``file``, each aside and renamed."""
    file.parent.mkdir(parents=True, exist_ok=True)
    write_arrays(file.with_suffix(".npz"), arrays)
    write_json(file, dict(record))


def write_arrays(file: Path, arrays: Mapping[str, NDArray[Any]]) -> None:
    import numpy as np

    aside = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    with aside.open("wb") as f:
        np.savez_compressed(f, allow_pickle=False, **dict(arrays))
        f.flush()
        os.fsync(f.fileno())
    aside.replace(file)


def read_arrays(file: Path) -> dict[str, NDArray[np.int32]]:
    """The arrays beside the record ``file``; empty where there are none."""
    import numpy as np

    arrays = file.with_suffix(".npz")
    if not arrays.is_file():
        return {}
    with np.load(arrays, allow_pickle=False) as found:
        return {name: found[name] for name in found.files}


def records(folder: Path, suite: str | None = None) -> Iterator[tuple[Path, dict[str, Any]]]:
    """All records of suites (or of one) in a run's ``evaluations/``, by suite and checkpoint; torn ones left out."""
    for file in sorted(folder.glob(f"{suite or '*'}/*.json")):
        try:
            record = read_json(file)
        except ValueError:
            continue
        if isinstance(record, dict) and "tasks" in record:
            yield file, record


def cached(folder: Path, weights: str, suite_hash: str) -> Path | None:
    """The record of these weights on this suite, whatever either was called; None where there is none yet."""
    for file, record in records(folder):
        if (record.get("weights"), record.get("suite_hash")) == (weights, suite_hash):
            return file
    return None
