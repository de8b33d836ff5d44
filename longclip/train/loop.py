"""The training loop: from the last checkpoint (or the initial weights) to the last sample.

The position of a run is the number of pairs seen. A step takes the next ``global_batch`` positions of the order, on
however many ranks there are; everything that decides the curve is keyed by position, so the loop has no state beyond
the checkpoint's.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from longclip.data.loader import Batch, Reader, training_batches
from longclip.data.order import Mixture, key
from longclip.data.shards import Dataset, open_dataset
from longclip.data.sources import Sources
from longclip.data.text import Text
from longclip.data.tokens import Tokenizer
from longclip.errors import LongclipError, UserError
from longclip.evaluate.retrieval import evaluate
from longclip.evaluate.suite import Resolved
from longclip.experiment.durations import parse_interval
from longclip.experiment.identity import train_sources
from longclip.experiment.schema import Experiment, Model
from longclip.model.clip import DualEncoder, build
from longclip.model.compiled import compile_layers
from longclip.model.towers import pixels_of
from longclip.run import checkpoints, lineage
from longclip.run.attempts import FINISHED, INTERRUPTED, Attempt
from longclip.run.folder import RunFolder
from longclip.run.journal import SAVE_SECONDS, Journal
from longclip.train import cached, checkpoint, warm
from longclip.train import engine as engines
from longclip.train.loss import LOSSES
from longclip.train.meters import Meters
from longclip.train.ranks import Ranks
from longclip.train.scoring import score_best

METER_STEPS = 10
"""Steps between two points of the meters (speed, waiting, memory)"""
FLUSH_SECONDS = 2.0


BAD_ALLOWED = 10
"""Unusable samples that an attempt may meet whatever their share: of a few hundred samples a share says nothing"""


class Diverged(LongclipError):
    """The loss or its gradient is no longer a number."""


class _Stopped(Exception):
    """The ranks have agreed to stop within a validation."""


class TooManyBad(UserError):
    """More samples cannot be used than ``engine.bad_limit`` allows."""


@dataclass(frozen=True)
class Job:
    """What one attempt has to train, and where its inputs lie on this machine."""

    run: RunFolder
    attempt: Attempt
    experiment: Experiment
    paths: Mapping[str, str]
    """folders of datasets, towers and tokenizer, by dotted key of the experiment"""
    beat: Callable[[int], None] = lambda samples: None
    """called at every sign of life with the pairs seen so far"""
    saved: Callable[[float], None] = lambda seconds: None
    """called after every save with the seconds that it took"""
    suites: Sequence[Resolved] = ()
    """what the chosen checkpoint is scored on in the end, besides the test set"""


def train(job: Job, ranks: Ranks, should_stop: Callable[[], bool] = lambda: False) -> str:
    """Trains, evaluates and saves until the end (``finished``) or a request to stop (``interrupted``).

    A validation for which a request to stop leaves no time is made up for by the attempt that goes on.

    Raises:
        UserError: the inputs do not fit the experiment; nothing was trained.
        Diverged: the loss is not finite.
    """
    # One rank looks: on NFS another might not see yet what an earlier attempt has published, and go another way.
    begin = ranks.tell(not lineage.has_begun(job.run))
    engine, reader, val = prepare(job, ranks, begin)
    verdict = _train(job, ranks, engine, reader, val, should_stop)
    engine.destroy()  # or its hooks keep it, and its process groups, for good
    return verdict


def _train(job: Job, ranks: Ranks, engine: Any, reader: Reader, val: Reader, should_stop: Callable[[], bool]) -> str:
    experiment = job.experiment
    recipe = experiment.train
    train_set = reader.dataset
    assert isinstance(train_set, Sources)
    batch = recipe.global_batch
    total_steps = steps_of(experiment, len(train_set))
    state: dict[str, Any] = {"step": 0, "samples": 0, "best": None, "validation_due": False}
    source = checkpoint.newest(job.run.checkpoints, ranks)
    if source is not None:
        state = checkpoint.restore(engine, source, ranks)
    journal = Journal(job.attempt.journal) if ranks.rank == 0 else None
    if ranks.rank == 0:
        job.attempt.begin(state["samples"])
        print(_opening(job, ranks, engine.module, state, total_steps, len(train_set)), flush=True)
    evaluate_every = interval_samples(experiment.evaluate.every, len(train_set), batch)
    save_every, save_seconds = _save_interval(experiment, len(train_set))
    begun_at = evaluated = saved = state["samples"]
    bad_samples = 0
    saved_at = flushed_at = time.monotonic()
    meters = Meters(engine, experiment, ranks)
    batches = meters.waiting(
        training_batches(
            reader,
            order_of(experiment, train_set),
            recipe.crop_scale,
            batch,
            range(state["step"], total_steps),
            ranks.rank,
            ranks.size,
            experiment.engine.loader_workers,
        )
    )

    def save() -> None:
        nonlocal saved, saved_at
        if journal:
            journal.flush()
        name = checkpoint.name_of(state["step"])
        seconds = checkpoint.save(engine, job.run.checkpoints, name, state, ranks, fence=job.attempt.fence)
        if ranks.rank == 0:
            keep = state["best"]["checkpoint"] if state["best"] else None
            checkpoints.retain(job.run.checkpoints, experiment.checkpoint.keep.last, keep)
        if journal:
            journal.write(state["step"], state["samples"], {SAVE_SECONDS: seconds})
        saved, saved_at = state["samples"], time.monotonic()
        job.saved(seconds)
        alive()

    def alive() -> None:
        job.beat(state["samples"])

    def go_on() -> None:
        alive()
        if ranks.agree(should_stop()):
            raise _Stopped

    def validate(said: str) -> bool:
        """Scores the weights as they are; whether they are the best so far. Raises _Stopped on all ranks."""
        scores = evaluate(engine, engine.module, val, experiment.evaluate.batch, ranks, go_on).facts
        improved = state["best"] is None or scores["mean_recall_at_1"] > state["best"]["value"]
        if improved:
            state["best"] = {
                "checkpoint": checkpoint.name_of(state["step"]),
                "value": scores["mean_recall_at_1"],
                "samples": state["samples"],
            }
        state["validation_due"] = False
        if journal:
            journal.write(state["step"], state["samples"], {f"val/{k}": v for k, v in scores.items()})
            journal.flush()
            print(_progress(state, total_steps * batch, said, scores), flush=True)
        meters.reset()
        return improved

    alive()
    if source is not None and state.get("validation_due"):  # whoever saved this was to stop, and had no time for it
        try:
            validate("validation made up for")
        except _Stopped:
            if journal:
                journal.close()
            return INTERRUPTED
        checkpoint.amend(source, state, ranks, job.attempt.fence)
    for part in batches:
        step = state["step"]
        lr = engines.learning_rate(recipe, step, total_steps)
        engines.set_lr(engine, lr)
        # Dropout's draws belong to the step and the rank, so that a run that continues draws what it would have drawn.
        torch.manual_seed(key(recipe.seed, "dropout", step, ranks.rank) % 2**63)
        loss, scale, grad_norm = take_step(engine, part, recipe.loss, ranks)
        state.update(step=step + 1, samples=(step + 1) * batch)
        alive()
        _note_bad(job, part, step, ranks)
        meters.count(part)

        timed_out = save_seconds is not None and time.monotonic() - saved_at >= save_seconds
        losses, stops, dues, tokens, cut, bad = ranks.sum_across(
            [
                loss,
                float(should_stop()),
                float(timed_out and ranks.rank == 0),
                float(part.tokens),
                float(part.tokens_cut),
                float(len(part.bad)),
            ]
        )
        mean_loss = losses / ranks.size
        metrics = {
            "train/loss": mean_loss,
            "train/grad_norm": grad_norm,
            "train/lr": lr,
            "train/scale": scale,
            "text/tokens": tokens,
            "text/tokens_cut": cut,
        }
        if bad:
            metrics["data/bad_samples"] = bad
        last = state["step"] == total_steps
        if state["step"] % METER_STEPS == 0 or last:
            metrics |= meters.point()
            meters.reset()
        if journal:
            journal.write(state["step"], state["samples"], metrics)
            if time.monotonic() - flushed_at > FLUSH_SECONDS:
                journal.flush()
                flushed_at = time.monotonic()
        if not (math.isfinite(mean_loss) and math.isfinite(grad_norm)):
            # A step with such a gradient is skipped by ZeRO 1 to 3 and ruins the weights at stage 0; neither may pass.
            if journal:
                journal.flush()
            raise Diverged(
                f"loss {mean_loss}, gradient norm {grad_norm} after {state['samples']:,} samples (step {state['step']})"
            )

        bad_samples += int(bad)
        seen, limit = state["samples"] - begun_at, experiment.engine.bad_limit
        if bad_samples > BAD_ALLOWED + limit * seen:
            if journal:
                journal.flush()
            example = next(name for names in ranks.gather(part.bad) for name in names)
            raise TooManyBad(
                f"{bad_samples:,} of {seen:,} samples cannot be used, engine.bad_limit is {limit:g}; such as {example}",
                f"all are named in {job.attempt.path}/bad-samples-*.jsonl",
            )

        improved = False
        if _crossed(evaluated, state["samples"], evaluate_every) or last:
            evaluated = state["samples"]
            state["validation_due"] = True
            if not stops:  # Slurm waits for a save, and not for minutes of validation before it
                try:
                    improved = validate(f"loss {mean_loss:.4f}")
                except _Stopped:
                    stops = 1.0
        if improved or stops or dues or last or (save_every and _crossed(saved, state["samples"], save_every)):
            save()
            meters.reset()
        if stops and (not last or state["validation_due"]):
            if journal:
                journal.close()
            return INTERRUPTED
    if journal:
        journal.close()
    return FINISHED if score_best(job, engine, state, val, ranks, should_stop) else INTERRUPTED


def prepare(job: Job, ranks: Ranks, begin: bool = False) -> tuple[Any, Reader, Reader]:
    """The engine with initial weights, and the readers of training and validation data. Collective.

    ``begin``: those of another run, where the experiment says so. A run that continues needs them no more.

    Raises UserError where the inputs do not fit the experiment.
    """
    experiment = job.experiment
    spec = localized(experiment.model, job.paths)
    train_set = Sources(tuple(open_pinned(job, name) for name in train_sources(experiment)))
    val_set = open_pinned(job, "data.val")
    tokenizer = Tokenizer(job.paths.get("model.text.tokenizer") or str(spec.text.tower), spec.context_length)
    how = experiment.engine
    model = build(
        spec, experiment.train.seed, how.activation_checkpointing, experiment.train.loss, how.text == "padded"
    )
    check_fit(model, tokenizer, experiment)
    if how.compile:
        compile_layers(model)
    if begin and spec.init is not None:
        warm.start(model, spec, spec.init, Path(job.paths[lineage.KEY]), job.run, ranks)
    train = Reader(train_set, tokenizer, pixels_of(spec.image), Text.of(experiment.data))
    return engines.start(model, experiment, ranks), train, replace(train, dataset=val_set)


def order_of(experiment: Experiment, dataset: Sources) -> Mixture:
    weights = [source.weight for source in experiment.data.sources]
    return Mixture([part.sizes for part in dataset.parts], experiment.train.seed, weights)


def take_step(engine: Any, part: Batch, kind: str, ranks: Ranks) -> tuple[float, float, float]:
    """One optimizer step on this rank's ``part``: its loss, the scale of the logits, the gradient norm. Collective.

    ``kind`` is ``train.loss``. Two passes where ``engine`` takes the part in several micro-batches, else one.
    """
    count = engine.gradient_accumulation_steps()
    if count > 1:
        loss, scale = cached.backward(engine, part, LOSSES[kind], count, ranks)
    else:
        image_bd, text_bd, *numbers = engine(part.images(ranks.device), part.text.to(ranks.device))
        loss, scale = LOSSES[kind](image_bd, text_bd, *numbers, ranks, part.valid.to(ranks.device)), numbers[0]
        engine.backward(loss)
    grad_norm = engines.step(engine)
    if kind == "contrastive":
        engines.bound_scale(engine, scale.item())
    return loss.item(), scale.item(), grad_norm


def localized(spec: Model, paths: Mapping[str, str]) -> Model:
    """The model with its towers' references replaced by folders of this machine."""
    towers = {
        side: getattr(spec, side).model_copy(update={"tower": paths[f"model.{side}.tower"]})
        for side in ("image", "text")
        if f"model.{side}.tower" in paths
    }
    return spec.model_copy(update=towers)


def open_pinned(job: Job, key: str) -> Dataset:
    """A dataset of the run, checked to be the one that the run began with."""
    dataset = open_dataset(job.paths[key])
    pinned = job.run.identity()[key]
    if dataset.hash != pinned:
        raise UserError(
            f"{key}: {job.paths[key]} is not the data that this run began with "
            f"(content {dataset.hash[:12]}, the run's is {pinned[:12]})",
            "longclip submit: other data is another run",
        )
    return dataset


def check_fit(model: DualEncoder, tokenizer: Tokenizer, experiment: Experiment) -> None:
    """Raises UserError where tokenizer and tower do not go together. (That the window fits, ``build`` has seen to.)"""
    config = model.text.trunk.config
    if tokenizer.vocabulary > config.vocab_size:
        raise UserError(
            f"model.text: the tokenizer has {tokenizer.vocabulary} tokens, the tower's vocabulary {config.vocab_size}"
        )


def steps_of(experiment: Experiment, dataset: int) -> int:
    """Optimizer steps of the whole run; a last batch that would not be full is left out."""
    samples = experiment.train.samples or int(dataset * (experiment.train.epochs or 0))
    steps = samples // experiment.train.global_batch
    if steps < 1:
        raise UserError(f"train: {samples} samples are not one global batch of {experiment.train.global_batch}")
    return steps


def interval_samples(text: str, dataset: int, batch: int) -> float:
    """``"1 epoch"``, ``"500 steps"`` or ``"10000 samples"`` in samples."""
    number, unit = parse_interval(text, "every", ("epoch", "samples", "steps"))
    return number * {"epoch": dataset, "samples": 1, "steps": batch}[unit]


def _save_interval(experiment: Experiment, dataset: int) -> tuple[float | None, float | None]:
    """Samples between checkpoints, seconds between checkpoints; one of them is None."""
    number, unit = parse_interval(experiment.checkpoint.every, "every", ("min", "samples", "steps", "epoch"))
    if unit == "min":
        return None, number * 60
    return interval_samples(experiment.checkpoint.every, dataset, experiment.train.global_batch), None


def _crossed(before: int, now: int, every: float) -> bool:
    """Whether a multiple of ``every`` lies in (before, now]."""
    return now // every > before // every


def _note_bad(job: Job, part: Batch, step: int, ranks: Ranks) -> None:
    """Records samples that could not be used, by key; one file a rank, so that every file has one writer."""
    if part.bad:
        with (job.attempt.path / f"bad-samples-{ranks.rank:04d}.jsonl").open("a", encoding="utf-8") as f:
            f.writelines(json.dumps({"step": step + 1, "sample": key}) + "\n" for key in part.bad)


def _opening(job: Job, ranks: Ranks, model: DualEncoder, state: dict[str, Any], total_steps: int, dataset: int) -> str:
    experiment = job.experiment
    dtype = torch.bfloat16 if experiment.train.precision == "bf16" else torch.float32
    batch = experiment.train.global_batch
    share, micro = batch // ranks.size, experiment.engine.micro_batch
    cached_in = "" if micro in ("auto", share) else f" (cached gradients, {share // int(micro)} x {micro})"
    return (
        f"{job.run.name}: attempt {job.attempt.number}, {ranks.size} ranks on {ranks.device.type}, "
        f"window {experiment.model.context_length}, ZeRO {experiment.engine.zero_stage}, "
        f"{experiment.train.precision}, batch {batch} = {ranks.size} x {share}{cached_in}, "
        f"{dataset:,} pairs, {total_steps:,} steps, from sample {state['samples']:,}; "
        f"{model.text.attention(ranks.device, dtype)}; "
        f"threads {torch.get_num_threads()}, pid {os.getpid()}"
    )


def _progress(state: dict[str, Any], total: int, said: str, scores: Mapping[str, float]) -> str:
    return (
        f"{state['samples']:,}/{total:,} samples  {said}  val R@1 "
        f"i2t {100 * scores['i2t_recall_at_1']:.1f} t2i {100 * scores['t2i_recall_at_1']:.1f}"
    )
