"""Estimates of experiments with what this site knows: its GPUs, the towers' configurations, the datasets' captions.

A run that has trained already is measured, not estimated: its speed is in its journal.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from statistics import median
from typing import Any

from rich.table import Table

from longclip.data.counter import TokenCounter
from longclip.data.order import Draw, Mixture, uniforms
from longclip.data.shards import open_dataset
from longclip.data.sources import Sources
from longclip.data.text import Text
from longclip.errors import LongclipError, UserError
from longclip.experiment.identity import train_sources
from longclip.experiment.load import Loaded
from longclip.experiment.schema import Experiment
from longclip.launch.plan import Plan
from longclip.launch.resolve import resolve, tower_config
from longclip.launch.site import Site
from longclip.model.shape import Shape, shape_of
from longclip.run.attempts import attempts_of
from longclip.run.journal import laid, read_points, series
from longclip.train.estimate import UTILISATION, Captions, Estimate, estimate, published
from longclip.train.gpus import Gpu, of_site

CAPTIONS = 2000
"""captions that are drawn and counted; the mean of 2,000 such lengths is good to 2 %"""


def forecasts(
    loaded: Sequence[Loaded], site: Site, gpu: Gpu | None, ranks: Sequence[int], utilisation: float
) -> tuple[list[Estimate], list[str]]:
    """An estimate for every experiment and every number of ``ranks`` (none given: the experiment's own), and notes.

    Raises UserError where a tower's configuration is not to be had, or the batch does not divide.
    """
    found: list[Estimate] = []
    notes: dict[str, list[str]] = {}
    for one in loaded:
        experiment = one.experiment
        resolved = resolve(experiment, site)
        shape = _shape(experiment, resolved.paths)
        captions = _captions(experiment, resolved.paths)
        notes.setdefault(f"tokens of captions: {captions.source}", []).append(experiment.name)
        samples = resolved.samples or experiment.train.samples
        if samples is None:
            names = ", ".join(train_sources(experiment).values())
            unknown = f"data.train ({names}) is not here, so the length of {experiment.train.epochs:g} "
            unknown += "epochs is not known: hours are those of a million pairs"
            notes.setdefault(unknown, []).append(experiment.name)
        for count in ranks or [experiment.slurm.ranks]:
            if experiment.train.global_batch % count:
                raise UserError(
                    f"--gpus {count}: a batch of {experiment.train.global_batch} does not divide among them"
                )
            found.append(estimate(experiment, shape, captions, count, gpu, utilisation, samples))
    return found, [f"{', '.join(names)}: {note}" for note, names in notes.items()]


def _shape(experiment: Experiment, paths: dict[str, str]) -> Shape:
    configs = {side: _config(experiment, side, paths) for side in ("image", "text")}
    return shape_of(experiment.model, configs["image"], configs["text"], experiment.train.loss)


def _config(experiment: Experiment, side: str, paths: dict[str, str]) -> dict[str, Any]:
    """A tower's transformers configuration; of a checkpoint with both towers that of this side."""
    tower = getattr(experiment.model, side)
    if tower.config is not None:
        return dict(tower.config)
    key = f"model.{side}.tower"
    if key not in paths:
        raise UserError(f"{key}: {tower.tower} is not here, so its size is not known")
    return tower_config(Path(paths[key]), key, side)


def _captions(experiment: Experiment, paths: dict[str, str]) -> Captions:
    """Measured where the training shards are indexed here and the tokenizer can be read without transformers."""
    sources = train_sources(experiment)
    tokenizer = paths.get("model.text.tokenizer") or paths.get("model.text.tower")
    if tokenizer is None or not all(key in paths for key in sources):
        return published()
    weights = tuple(source.weight for source in experiment.data.sources)
    folders = tuple(paths[key] for key in sources)
    return _measured(folders, weights, Text.of(experiment.data), experiment.train.seed, tokenizer)


@lru_cache
def _measured(folders: tuple[str, ...], weights: tuple[float, ...], text: Text, seed: int, tokenizer: str) -> Captions:
    """Of captions of the first epoch, as training draws them."""
    try:
        counter = TokenCounter(tokenizer)
    except LongclipError as error:
        return replace(published(), source=f"{published().source}; {error.message}")
    dataset = Sources(tuple(open_dataset(folder) for folder in folders))
    order = Mixture([part.sizes for part in dataset.parts], seed, weights)
    positions: Sequence[int] = range(len(dataset))
    if len(dataset) > CAPTIONS:
        positions = sorted((uniforms(CAPTIONS, seed, "estimate") * len(dataset)).astype(int).tolist())
    texts, without = [], 0
    for epoch, shard, index in order.locate(positions).tolist():
        _, txt, fields = dataset.fields_and_text(shard, index)
        try:
            texts.append(text(txt, fields, Draw(seed, epoch, shard, index)))
        except ValueError:
            without += 1
    if not texts:
        return published()
    source = f"{len(texts):,} of {len(dataset):,} training captions" + f", {without:,} more have no text" * bool(
        without
    )
    return Captions(tuple(counter.many(texts)), source)


# ---- submit's columns --------------------------------------------------------------------------------------------


def of_plan(plan: Plan, site: Site) -> Estimate | None:
    """An estimate for a planned run on the site's GPUs; None where nobody can say."""
    experiment = plan.experiment
    try:
        shape = _shape(experiment, plan.resolved.paths)
    except LongclipError:
        return None
    gpu = of_site(site.gpu_type) if experiment.slurm.gpus_per_node else None
    captions = _captions(experiment, plan.resolved.paths) if gpu else published()
    return estimate(experiment, shape, captions, experiment.slurm.ranks, gpu, UTILISATION, plan.resolved.samples)


def unfit(plan: Plan, guess: Estimate | None, site: Site) -> str | None:
    """What to say of a run that by the estimate needs more memory than the site's GPUs have; None if it does not."""
    gpu, engine = of_site(site.gpu_type), plan.experiment.engine
    if guess is None or gpu is None or guess.fits is None:
        return None
    asked = guess.by_stage[engine.zero_stage]
    if (guess.stage, guess.micro_batch) == (engine.zero_stage, guess.asked_micro_batch) and guess.fits:
        return None
    needs = f"{guess.asked_micro_batch} pairs at once at ZeRO {engine.zero_stage} need {asked.peak / 2**30:.0f} GiB"
    fits = f"zero_stage {guess.stage} with micro_batch {guess.micro_batch} fits" if guess.fits else "nothing fits"
    return f"by the estimate {needs}, {gpu.name} has {gpu.memory_gib:.0f}: {fits} (longclip estimate)"


def columns(plan: Plan, guess: Estimate | None) -> tuple[str, str]:
    """GPU-hours (or CPU-hours) that a planned run still takes, and GB on disk; ``?`` where nobody can say."""
    if not plan.queues:
        return "0", "0"
    if guess is None:
        return "?", "?"
    hours = guess.rank_hours if plan.resolved.samples else None
    attempts = attempts_of(plan.run) if plan.run.exists() else []
    journals = {attempt: read_points(attempt.journal) for attempt in attempts}
    # Of one rank: attempts may have had other numbers of them than the next one will.
    speeds = [
        value / int((attempt.started or {}).get("ranks", 1))
        for attempt in attempts
        for _, value in series(journals[attempt], "speed/samples_per_second")
    ]
    if speeds and plan.resolved.samples:
        left = plan.resolved.samples - laid(attempts, journals)[-1].samples
        hours = max(0, left) / median(speeds[-10:]) / 3600
    return "?" if hours is None else f"{hours:.2g}", f"{guess.disk_bytes / 1e9:.2g} GB"


# ---- the table ---------------------------------------------------------------------------------------------------


def table(estimates: Sequence[Estimate], gpu: Gpu | None) -> Table:
    """One row an experiment and number of ranks. GiB are of one rank."""
    made = Table(box=None, pad_edge=False, header_style="bold")
    per_million = any(e.samples is None for e in estimates)
    unit = "GPU" if gpu else "rank"
    numbers = ("window", "tokens", "GFLOP/pair", f"{unit}s", "batch/rank", "micro", "ZeRO", "GiB")
    times = ("pairs/s", "h/M pairs" if per_million else "h", f"{unit}-h") if gpu else ()
    for column in ("run", *numbers, *times, ""):
        made.add_column(column, justify="left" if column in ("run", "") else "right")
    for e in estimates:
        timed = (_number(e.samples_per_second), _number(e.hours), _number(e.rank_hours)) if gpu else ()
        made.add_row(
            e.name,
            str(e.window),
            f"{e.tokens:.0f}",
            f"{e.flops / 1e9:,.1f}",
            str(e.ranks),
            str(e.share),
            str(e.micro_batch),
            str(e.stage),
            f"{e.memory.peak / 2**30:.1f}",
            *timed,
            "does not fit" if e.fits is False else "",
        )
    return made


def memory_table(estimates: Sequence[Estimate], gpu: Gpu | None) -> Table:
    """The parts of one rank's memory, in GiB: a row for every ZeRO stage, and for what is taken."""
    made = Table(box=None, pad_edge=False, header_style="bold")
    parts = ("weights", "gradients", "optimizer", "its step", "activations", "loss", "other", "peak")
    for column in ("run", "GPUs" if gpu else "ranks", "micro", "ZeRO", *parts, ""):
        made.add_column(column, justify="left" if column in ("run", "") else "right")
    for e in estimates:
        rows = {(e.asked_micro_batch, stage): memory for stage, memory in e.by_stage.items()}
        rows[e.micro_batch, e.stage] = e.memory
        for (micro, stage), m in rows.items():
            other = m.inputs + m.libraries
            numbers = (m.weights, m.gradients, m.optimizer, m.step, m.activations, m.loss, other, m.peak)
            made.add_row(
                e.name,
                str(e.ranks),
                str(micro),
                str(stage),
                *(f"{number / 2**30:.1f}" for number in numbers),
                "taken" if (micro, stage) == (e.micro_batch, e.stage) else "",
            )
    return made


def _number(value: float | None) -> str:
    return "?" if value is None else f"{value:,.0f}" if value >= 100 else f"{value:.2g}"
