"""What a run will need: parameters, memory per rank at every ZeRO stage, time at a stated utilisation, disk. No torch.

Time counts what is computed: three forwards' worth for a step, a fourth where activations are recomputed, another where
gradients are cached between two passes. ``utilisation`` is the share of the GPU's peak (``gpus.py``) that these reach.
What is not computed (waiting for data, evaluation, checkpoints, queues) is not in it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from longclip.experiment.schema import Experiment
from longclip.model.shape import Shape
from longclip.train.gpus import Gpu
from longclip.train.memory import Memory, memory

UTILISATION = 0.35
"""of the peak, unless said otherwise"""
USABLE = 0.92
"""share of a GPU's memory that a run may plan with; the rest is lost to fragments"""
LEAST, SCALE, SHAPE = 5.2, 123.4, 0.9578
"""Tokens of a caption: the least, and a Weibull above it. The three that give what is published (arXiv 2510.03978):
55 % of the tokens wasted at 77, 2.2 % at 512, and 131 tokens a caption (434 M wasted at 77 are 55 %, of 6 M captions).
A lognormal through the two shares has a mean of 159."""


@dataclass(frozen=True)
class Captions:
    """Lengths of captions in tokens, before the window cuts them, and where they are from."""

    lengths: tuple[int, ...]
    source: str

    def within(self, window: int) -> tuple[int, ...]:
        return tuple(min(n, window) for n in self.lengths)


def published() -> Captions:
    """A thousand quantiles, evenly spaced, of the distribution that has the paper's waste and mean."""
    above = (SCALE * (-math.log1p(-(k + 0.5) / 1000)) ** (1 / SHAPE) for k in range(1000))
    lengths = tuple(round(LEAST + tokens) for tokens in above)
    return Captions(lengths, "published distribution (waste 55 % at 77, 2.2 % at 512; mean 131 tokens)")


@dataclass(frozen=True)
class Estimate:
    """One experiment on some number of ranks."""

    name: str
    window: int
    ranks: int
    stage: int
    """as the experiment says, or the lowest at which it fits"""
    share: int
    """pairs of the global batch on one rank"""
    micro_batch: int
    """of these, how many run at once"""
    asked_micro_batch: int
    """the same as the experiment says it; where that does not divide the share, the next smaller that does"""
    fits: bool | None
    """None where the GPU is not known"""
    memory: Memory
    by_stage: dict[int, Memory]
    """at every stage, with the experiment's own micro batch"""
    parameters: dict[str, int]
    tokens: float
    """of a caption within the window, on average"""
    flops: float
    """of the model, forward and backward, for one pair"""
    samples: int | None
    """pairs of the whole run; None where the dataset is not here"""
    samples_per_second: float | None
    hours: float | None
    """of the whole run, or of a million pairs where its length is not known"""
    checkpoint_bytes: int
    disk_bytes: int
    """with all checkpoints that are kept, and one that is being written"""

    @property
    def rank_hours(self) -> float | None:
        return None if self.hours is None else self.hours * self.ranks

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "rank_hours": self.rank_hours}


def estimate(
    experiment: Experiment,
    shape: Shape,
    captions: Captions,
    ranks: int,
    gpu: Gpu | None,
    utilisation: float = UTILISATION,
    samples: int | None = None,
) -> Estimate:
    """Of ``experiment`` on ``ranks`` ranks, each with one ``gpu`` (None: on CPUs, or on a device not in the table).

    With a GPU the stage is the experiment's if that fits, else the lowest that does, else the lowest that does with a
    smaller micro batch. ``ranks`` has to divide the global batch.
    """
    window, train = experiment.model.context_length, experiment.train
    lengths = captions.within(window)
    # A batch padded to the window is computed whole; what is counted as the model's work stays that of real tokens.
    computed = lengths if experiment.engine.text == "packed" else (window,)
    share = train.global_batch // ranks
    own = share if experiment.engine.micro_batch == "auto" else _within(share, experiment.engine.micro_batch)

    states = (experiment.engine.deepspeed.get("zero_optimization") or {}).get("offload_optimizer")
    offload = isinstance(states, dict) and states.get("device", "none") != "none"

    def at(stage: int, micro_batch: int) -> Memory:
        return memory(
            shape,
            computed,
            micro_batch=micro_batch,
            global_batch=train.global_batch,
            precision=train.precision,
            stage=stage,
            ranks=ranks,
            checkpointing=experiment.engine.activation_checkpointing,
            on_gpu=gpu is not None or experiment.slurm.gpus_per_node > 0,
            offload=stage > 0 and offload,
        )

    stages = [s for s in range(4) if s > 0 or train.precision == "fp32"]
    by_stage = {s: at(s, own) for s in stages}
    stage: int = experiment.engine.zero_stage
    micro, fits = own, None
    if gpu is not None:
        room = USABLE * gpu.memory_gib * 2**30
        found = _cheapest(at, [stage, *(s for s in stages if s != stage)], own, share, room)
        fits = found is not None
        stage, micro = found or (stage, own)
    flops = shape.step_flops(lengths, len(lengths)) / len(lengths)
    again = experiment.engine.activation_checkpointing + (micro < share)
    towers = shape.image.forward_flops([shape.image.tokens]) + shape.text.forward_flops(computed) / len(computed)
    work = shape.step_flops(computed, len(computed)) / len(computed) + again * towers
    peak = None if gpu is None else gpu.peak(train.precision)
    speed = ranks * peak * utilisation / work if peak is not None else None
    kept = experiment.checkpoint.keep.last + experiment.checkpoint.keep.best + 1
    checkpoint = 4 * shape.total + 8 * shape.trained  # fp32 weights, and Adam's two moments of what is trained
    return Estimate(
        name=experiment.name,
        window=window,
        ranks=ranks,
        stage=stage,
        share=share,
        micro_batch=micro,
        asked_micro_batch=own,
        fits=fits,
        memory=at(stage, micro),
        by_stage=by_stage,
        parameters=shape.parameters(),
        tokens=sum(lengths) / len(lengths),
        flops=flops,
        samples=samples,
        samples_per_second=speed,
        hours=None if speed is None else (samples or 10**6) / speed / 3600,
        checkpoint_bytes=checkpoint,
        disk_bytes=kept * checkpoint,
    )


def _within(share: int, micro_batch: int) -> int:
    return next(m for m in range(min(share, micro_batch), 0, -1) if share % m == 0)


def _cheapest(
    at: Callable[[int, int], Memory], stages: Sequence[int], own: int, share: int, room: float
) -> tuple[int, int] | None:
    """The stage and micro batch to take. Fewer pairs at once cost a forward more, a higher stage only exchange."""
    for stage in stages:
        if at(stage, own).peak <= room:
            return stage, own
    for micro in (m for m in range(own - 1, 0, -1) if share % m == 0):
        for stage in stages:
            if at(stage, micro).peak <= room:
                return stage, micro
    return None
