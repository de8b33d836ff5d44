"""Runs whose ranks are planted: a test set of 400 queries, the same for all."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from longclip.experiment.sweep import short_name
from longclip.run.evaluations import place, write, write_arrays
from longclip.run.folder import RunFolder, read_json, write_json
from tests.helpers import experiment, finished_run

QUERIES = 400
TEST_SET = "7" * 64


def ranks(skill: float, seed: int) -> NDArray[np.int32]:
    """A query is a hit where it is easier than ``skill``, give or take what is a seed's own."""
    hard = np.random.default_rng(0).random(QUERIES)
    own = 0.1 * np.random.default_rng(seed + 1).random(QUERIES)
    return np.maximum(0, np.ceil(20 * (hard + own - skill))).astype(np.int32)


def metrics(i2t: NDArray[np.int32], t2i: NDArray[np.int32]) -> dict[str, float]:
    found = {f"{s}_recall_at_{k}": float((r < k).mean()) for s, r in (("i2t", i2t), ("t2i", t2i)) for k in (1, 5, 10)}
    return {**found, "mean_recall_at_1": (found["i2t_recall_at_1"] + found["t2i_recall_at_1"]) / 2}


def scored_run(
    runs: Path, window: int, skill: float, seed: int = 0, axes: Mapping[str, Any] | None = None, **train: Any
) -> RunFolder:
    """Finished, with a curve of validation that rises to ``skill``, and the ranks of its test."""
    asked = experiment(window, name=_name(window, seed, train), seed=seed, **train)
    declared = {"model.context_length": window, "train.seed": seed, **(axes or {})}
    val = {300: skill / 2, 600: skill, 900: skill, 1000: skill}
    run = finished_run(runs, asked, val, axes=declared)
    i2t, t2i = ranks(skill, seed), ranks(skill - 0.05, seed + 100)
    record = read_json(run.evaluations / "test.json")
    record["metrics"] = {**metrics(i2t, t2i), "pairs": float(QUERIES), "waste": 0.4}
    write_json(run.evaluations / "test.json", record)
    write_arrays(run.evaluations / "test.npz", {"test/i2t": i2t, "test/t2i": t2i})
    return run


def _name(window: int, seed: int, train: Mapping[str, Any]) -> str:
    lr = f"_{short_name('train.lr', train['lr'])}" if "lr" in train else ""
    return f"ctx{window}{lr}_s{seed}"


def suite_record(
    run: RunFolder,
    tasks: dict[str, Any],
    arrays: dict[str, NDArray[Any]] | None = None,
    checkpoint: str | None = None,
    suite_hash: str = "5" * 64,
) -> None:
    """A suite called ``zoo`` on the run's chosen checkpoint, or another."""
    chosen = read_json(run.evaluations / "test.json")["checkpoint"]
    record = {
        "suite": "zoo",
        "suite_hash": suite_hash,
        "weights": "3" * 64,
        "checkpoint": checkpoint or chosen,
        "samples": 600,
        "context_length": run.experiment().model.context_length,
        "convention": "strict",
        "time": 1.7e9,
        "tasks": tasks,
    }
    write(place(run.evaluations, "zoo", checkpoint or chosen), record, arrays or {})


def retrieval_task(
    i2t: NDArray[np.int32],
    t2i: NDArray[np.int32],
    data: str = TEST_SET,
    text: str | None = None,
    convention: str = "strict",
    **more: float,
) -> dict[str, Any]:
    """Without ``text`` as records were before they had it."""
    counts = {"images": len(i2t), "captions": len(t2i), "pairs": len(t2i)}
    return {
        "kind": "retrieval",
        "data": data,
        **({} if text is None else {"text": text}),
        "convention": convention,
        **counts,
        "metrics": {**metrics(i2t, t2i), **more},
    }
