"""A canary: some real steps at their worst, to see in minutes whether a run would fit and could save, resume and score.

The longest captions of the training set, in the batches, on the ranks and by the loader of the real run; nothing of it
is kept but the measures.
"""

from __future__ import annotations

import math
import shutil
import statistics
import time
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from longclip.data.loader import Reader, training_batches
from longclip.data.order import Order, Positions, evenly
from longclip.data.shards import Dataset
from longclip.data.sources import Sources
from longclip.data.text import render
from longclip.evaluate.retrieval import evaluate
from longclip.run.folder import write_json
from longclip.train import checkpoint
from longclip.train import engine as engines
from longclip.train.loop import Diverged, Job, prepare, steps_of, take_step
from longclip.train.meters import peak_bytes
from longclip.train.ranks import Ranks

STEPS = 20
CAPTIONS = 20_000
"""captions that are tokenized in search of the longest: enough to meet those at the window, in a minute at most"""
EVALUATION_BATCHES = 2
"""of ``evaluate.batch`` pairs, on every rank"""
CHUNK = 1000


def canary(job: Job, ranks: Ranks) -> None:
    """Takes STEPS steps, saves, resumes from that, takes one more, and evaluates on a part of the validation set.

    Leaves ``canary.json`` in the folder ``job.run``: peak memory of the rank that took most (GiB; of the GPU where
    there is one), seconds of a step (median) and of the save. It resumes into the engine that it has, which needs at
    least the memory that a new one would. Collective.

    Raises:
        UserError: the inputs do not fit the experiment.
        Diverged: the loss is not finite. And whatever else would end the run: that is what it is for.
    """
    experiment = job.experiment
    recipe = experiment.train
    engine, reader, val = prepare(job, ranks)
    reader = replace(reader, text=replace(reader.text, p_long=1.0))
    order = _Longest(reader.dataset, longest(job, reader, ranks))
    total_steps = steps_of(experiment, len(reader.dataset))
    workers = experiment.engine.loader_workers
    steps = range(STEPS + 1)
    batches = training_batches(
        reader, order, recipe.crop_scale, recipe.global_batch, steps, ranks.rank, ranks.size, workers
    )

    def step(number: int) -> float:
        begun = time.monotonic()
        engines.set_lr(engine, engines.learning_rate(recipe, number, total_steps))
        loss, _, grad_norm = take_step(engine, next(batches), recipe.loss, ranks)
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            raise Diverged(f"loss {loss}, gradient norm {grad_norm} in step {number + 1} of a canary")
        job.beat(0)
        return time.monotonic() - begun

    taken = [step(number) for number in range(STEPS)]
    name = checkpoint.name_of(STEPS)
    state = {"step": STEPS, "samples": 0, "best": None}
    saved = checkpoint.save(engine, job.run.checkpoints, name, state, ranks, fence=job.attempt.fence)
    job.beat(0)
    checkpoint.restore(engine, job.run.checkpoints / name, ranks)
    step(STEPS)
    batch = experiment.evaluate.batch
    pairs = EVALUATION_BATCHES * batch * ranks.size
    evaluate(engine, engine.module, val, batch, ranks, lambda: job.beat(0), pairs)
    peak = max(ranks.gather(peak_bytes(ranks)))
    if ranks.rank == 0:
        shutil.rmtree(job.run.checkpoints)
        measures = {
            "code": (job.attempt.started or {}).get("code"),
            "peak_gib": peak / 2**30,
            "step_seconds": statistics.median(taken),
            "save_seconds": saved,
            "time": time.time(),
        }
        write_json(job.run.path / "canary.json", measures)
        print(f"canary passed: {measures}", flush=True)
    engine.destroy()


def longest(job: Job, reader: Reader, ranks: Ranks) -> list[tuple[int, int]]:
    """``(shard, index)`` of the longest captions, a global batch of them, longest first.

    Of CAPTIONS that lie evenly over the dataset; to know their lengths they must be tokenized. Collective.
    """
    dataset, count = reader.dataset, job.experiment.train.global_batch
    mine = evenly(dataset.sizes, CAPTIONS)[ranks.rank :: ranks.size]
    found: list[tuple[int, int, int]] = []
    for start in range(0, len(mine), CHUNK):
        places, texts = mine[start : start + CHUNK], []
        for place in places:
            _, text, fields = dataset.fields_and_text(*place)
            texts.append(render(reader.text.long, {**fields, "txt": text}))
        _, lengths = reader.tokenizer(texts)
        found += [(length, *place) for length, place in zip(lengths, places, strict=True)]
        job.beat(0)
    everyone = [each for theirs in ranks.gather(sorted(found, reverse=True)[:count]) for each in theirs]
    return [(shard, index) for _, shard, index in sorted(everyone, reverse=True)[:count]]


class _Longest(Order):
    """The same ``places`` over and over, in place of an order over the whole dataset."""

    def __init__(self, dataset: Dataset | Sources, places: Sequence[tuple[int, int]]) -> None:
        super().__init__(dataset.sizes, 0)
        self.places = places

    def locate(self, positions: Positions) -> NDArray[np.int64]:
        return np.array([(0, *self.places[position % len(self.places)]) for position in positions])
