"""What a run does when it has been trained: the checkpoint that validation chose is scored on the test set, and on
the suites that the experiment names."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from longclip.data.loader import Reader
from longclip.data.shards import open_dataset
from longclip.evaluate.conventions import lines
from longclip.evaluate.embed import Embedder
from longclip.evaluate.retrieval import ceiling, evaluate
from longclip.evaluate.score import score
from longclip.run import evaluations, lineage
from longclip.run.folder import write_json
from longclip.train import checkpoint
from longclip.train.ranks import Ranks

if TYPE_CHECKING:
    from longclip.train.loop import Job

BEST = "val/mean_recall_at_1"
"""The metric that chooses the checkpoint to be tested"""


def score_best(
    job: Job, engine: Any, state: Mapping[str, Any], val: Reader, ranks: Ranks, should_stop: Callable[[], bool]
) -> bool:
    """Scores the best checkpoint, whose weights ``engine`` holds afterwards, on all that the experiment asks.

    Whether it is all done: False where a request to stop came first. A suite that has its record is not computed again.
    """
    if job.experiment.data.test is None and not job.suites:
        return True
    folder = job.run.checkpoints / state["best"]["checkpoint"]
    # Named after the step, a checkpoint is of the weights that every attempt has there, and this one may hold them.
    if folder.name != checkpoint.name_of(state["step"]):
        checkpoint.restore(engine, folder, ranks)
    alive = partial(job.beat, state["samples"])
    if job.experiment.data.test is not None:
        _test(job, engine, state, val, ranks, alive)
    batch = job.experiment.evaluate.batch
    embedder = Embedder(engine, engine.module, val.tokenizer, val.pixels, ranks, batch, alive)
    about = {
        "weights": lineage.hash_of_weights(folder),
        "checkpoint": folder.name,
        "samples": state["best"]["samples"],
        "precision": job.experiment.train.precision,
    }
    for suite in job.suites:
        if ranks.agree(should_stop()):
            return False
        there = evaluations.cached(job.run.evaluations, about["weights"], suite.hash) if ranks.rank == 0 else None
        if ranks.tell(there) is None:
            record = score(embedder, suite, evaluations.place(job.run.evaluations, suite.name, folder.name), about)
            if ranks.rank == 0:
                print(*lines(record), sep="\n", flush=True)
    return True


def _test(
    job: Job, engine: Any, state: Mapping[str, Any], val: Reader, ranks: Ranks, alive: Callable[[], None]
) -> None:
    """Into ``evaluations/test.json`` and ``test.npz``."""
    dataset = open_dataset(job.paths["data.test"])
    reader = replace(val, dataset=dataset)
    found = evaluate(engine, engine.module, reader, job.experiment.evaluate.batch, ranks, alive)
    if ranks.rank == 0:
        window = job.experiment.model.context_length
        record = {
            "dataset": dataset.hash,
            "checkpoint": state["best"]["checkpoint"],
            "samples": state["best"]["samples"],
            "chosen_by": BEST,
            "context_length": window,
            "metrics": found.facts,
            "ceiling": ceiling(dataset.folder, window),
            "time": time.time(),
        }
        arrays = {f"test/{name}": array for name, array in found.arrays.items()}
        evaluations.write_arrays(job.run.evaluations / "test.npz", arrays)
        write_json(job.run.evaluations / "test.json", record)
        print(f"test: {found.facts}", flush=True)
