"""Meters of a run: how fast it goes, where the time of a step goes, how much of the device it uses.

The parts of a step, in seconds, averaged over steps and ranks, add up to it:

    time/data        waiting for the batch
    time/forward     the towers
    time/backward    DeepSpeed's backward pass
    time/optimizer   DeepSpeed's step
    time/exchange    its collectives (gradients, weights), and what stands between the towers and the backward pass:
                     the loss, which gathers the features of all ranks; in two passes, the next micro-batch's copy
    time/other       what the loop does besides: agreeing on the numbers, the journal

On a GPU they are measured by CUDA events on the stream that computes, read at the points of the meters only; an
exchange that runs beside the computation on a stream of its own takes no time of the step, and is not counted. On a CPU
they are read from the clock. A collective that returns before it has ended is counted where it is waited for.
"""

from __future__ import annotations

import resource
import time
from collections.abc import Callable, Iterator
from functools import wraps
from typing import Any, TypeVar

import torch

from longclip.data.loader import Batch
from longclip.errors import UserError
from longclip.experiment.schema import Experiment
from longclip.model.shape import Shape, shape_of
from longclip.train.gpus import shown_as
from longclip.train.ranks import Ranks

T = TypeVar("T")
PARTS = ("data", "forward", "backward", "optimizer", "exchange", "other")
_COLLECTIVES = (
    "all_reduce",
    "all_reduce_coalesced",
    "reduce",
    "broadcast",
    "all_gather",
    "all_gather_into_tensor",
    "all_gather_coalesced",
    "reduce_scatter",
    "reduce_scatter_tensor",
)
"""of DeepSpeed's communication backend"""


class Clock:
    """Which part of a step this rank is in, and since when."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.current_stream(device) if device.type == "cuda" else None
        self.reset()

    def reset(self) -> None:
        self.part = "other"
        self._marks: list[tuple[str, Any]] = [("other", self._stamp())]

    def turn(self, part: str) -> str:
        """From now on it is ``part``; the one before."""
        before, self.part = self.part, part
        if before != part:
            self._marks.append((part, self._stamp()))
        return before

    def seconds(self) -> dict[str, float]:
        """Of each part since the reset. Waits for the device."""
        found = dict.fromkeys(PARTS, 0.0)
        end = self._stamp()
        if self._stream is not None:
            end.synchronize()
        for (part, begin), (_, until) in zip(self._marks, [*self._marks[1:], ("", end)], strict=True):
            found[part] += begin.elapsed_time(until) / 1000 if self._stream is not None else until - begin
        return found

    def during(self, part: str, act: Callable[..., T], then: str | None = None) -> Callable[..., T]:
        """``act``, whose time is that of ``part``; afterwards ``then``, or what it was before."""

        @wraps(act)
        def timed(*args: Any, **kwargs: Any) -> T:
            if self._stream is not None and torch.cuda.current_stream(self._stream.device) != self._stream:
                return act(*args, **kwargs)
            before = self.turn(part)
            try:
                return act(*args, **kwargs)
            finally:
                self.turn(then or before)

        return timed

    def _stamp(self) -> Any:
        if self._stream is None:
            return time.perf_counter()
        event: Any = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record(self._stream)
        return event


class Meters:
    """Sums since the last point of the meters, on this rank, of an engine that is being trained."""

    def __init__(self, engine: Any, experiment: Experiment, ranks: Ranks) -> None:
        self.clock = Clock(ranks.device)
        self.window, self._ranks = experiment.model.context_length, ranks
        self.packed = experiment.engine.text == "packed"
        self._shape = _shape(engine, experiment)
        gpu = shown_as(torch.cuda.get_device_name(ranks.device)) if ranks.device.type == "cuda" else None
        self._peak = gpu.peak(experiment.train.precision) if gpu else None
        _watch(engine, self.clock)
        self.reset()

    def reset(self) -> None:
        self.since, self.steps, self.tokens, self.captions, self.flops = time.monotonic(), 0, 0, 0, 0.0
        self.clock.reset()

    def waiting(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """Passes batches on; the time that they are waited for is that of ``data``."""
        wait = self.clock.during("data", lambda: next(batches, None))
        while (part := wait()) is not None:
            yield part

    def count(self, part: Batch) -> None:
        """A step has been taken on ``part``."""
        self.steps, self.tokens, self.captions = (
            self.steps + 1,
            self.tokens + part.tokens,
            self.captions + len(part.valid),
        )
        if self._shape is not None:
            self.flops += self._shape.step_flops(part.text.lengths, len(part.valid))

    def point(self) -> dict[str, float]:
        """Since the last reset, over all ranks; memory and speed of the device are this rank's. Collective."""
        parts = self.clock.seconds()
        seconds = time.monotonic() - self.since
        mine = [float(self.tokens), float(self.captions), self.flops, *parts.values()]
        tokens, captions, flops, *spent = self._ranks.sum_across(mine)
        of_parts = dict(zip(parts, (s / self._ranks.size / self.steps for s in spent), strict=True))
        metrics = {
            "speed/samples_per_second": captions / seconds,
            "speed/tokens_per_second": tokens / seconds,
            "text/padding_avoided": 1.0 - tokens / (captions * self.window) if self.packed else 0.0,
            "data/wait_share": of_parts["data"] * self.steps / seconds,
            "memory/peak_gib": peak_bytes(self._ranks) / 2**30,
            "time/step": seconds / self.steps,
            **{f"time/{part}": value for part, value in of_parts.items()},
        }
        if self._shape is not None:
            speed = flops / seconds / self._ranks.size
            metrics["speed/model_tflops_per_rank"] = speed / 1e12
            if self._peak is not None:
                metrics["speed/share_of_peak"] = speed / self._peak
        return metrics


def _watch(engine: Any, clock: Clock) -> None:
    """Lets ``clock`` know where ``engine`` is. Between the towers and the backward pass stands the loss."""
    import deepspeed

    engine.module.register_forward_pre_hook(lambda *_: clock.turn("forward") and None)
    engine.module.register_forward_hook(lambda *_: clock.turn("exchange") and None)
    engine.backward = clock.during("backward", engine.backward, then="exchange")
    engine.step = clock.during("optimizer", engine.step, then="other")
    backend = deepspeed.comm.comm.cdb  # this process group's: it goes when the group does
    for name in _COLLECTIVES:
        setattr(backend, name, clock.during("exchange", getattr(backend, name)))


def _shape(engine: Any, experiment: Experiment) -> Shape | None:
    """None for towers whose FLOPs nobody has written down (model/shape.py): no figure is better than a guess."""
    image, text = (getattr(engine.module, side).trunk.config.to_dict() for side in ("image", "text"))
    try:
        return shape_of(experiment.model, image, text, experiment.train.loss)
    except UserError:
        return None


def peak_bytes(ranks: Ranks) -> int:
    """Peak memory of this rank: the GPU's where there is one, else the process's."""
    if ranks.device.type == "cuda":
        return torch.cuda.max_memory_allocated(ranks.device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
