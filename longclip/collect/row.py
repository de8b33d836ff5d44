"""One run as a table sees it, wherever it was read: from its folder (gather.py) or from MLflow (store.py).

Stable, for what is built on it: all public fields of :class:`Row`, :class:`Scores` and :class:`Curve`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from longclip.run.folder import RunFolder

if TYPE_CHECKING:
    from collections.abc import Iterable

    from longclip.run.journal import Point

WINDOW = "model.context_length"
SEED = "train.seed"
RECALL = "val/mean_recall_at_1"
"""chooses the checkpoint, and draws the curve of convergence"""
LOSS = "train/loss"
SCORES = tuple(f"val/{k}" for k in ("mean_recall_at_1", "i2t_recall_at_1", "t2i_recall_at_1", "pairs"))
CURVES = (LOSS, *SCORES)
"""all that is read of a journal's metrics, besides the tokens"""
TEST = "test"
"""the task that every run is scored on by itself: its checkpoint chosen on validation, on ``data.test``"""


@dataclass(frozen=True, eq=False)
class Curve:
    """One metric of a run: what counts of it, superseded points left out."""

    samples: NDArray[np.int64]
    """[N] pairs seen, rising"""
    values: NDArray[np.float64]
    """[N]"""
    times: NDArray[np.float64]
    """[N] seconds since 1970"""

    @classmethod
    def of(cls, points: Iterable[tuple[int, float, float]]) -> Curve:
        """From (samples, value, time)."""
        table = np.array(list(points), dtype=np.float64).reshape(-1, 3)
        return cls(table[:, 0].astype(np.int64), table[:, 1], table[:, 2])

    def __len__(self) -> int:
        return len(self.samples)

    def pairs(self) -> list[tuple[int, float]]:
        return list(zip(self.samples.tolist(), self.values.tolist(), strict=True))

    def until(self, samples: int) -> Curve:
        """Without what was measured after ``samples``."""
        kept = self.samples <= samples
        return Curve(self.samples[kept], self.values[kept], self.times[kept])


EMPTY = Curve.of([])


@dataclass(frozen=True, eq=False)
class Scores:
    """One model on one retrieval task, captions cut at one window."""

    task: str
    """``test``, or ``suite/task``"""
    data: str
    """hash of the data's content: queries of the same hash and text are the same, in the same order"""
    window: int
    metrics: Mapping[str, float]
    """``i2t_recall_at_1`` ...; ``len77-154/...`` of strata, ``kept64/...`` of probes"""
    queries: Mapping[str, int]
    """how many, ``i2t`` (images) and ``t2i`` (captions that are queries); empty where the record does not tell"""
    ranks: Mapping[str, NDArray[np.int32]] = field(default_factory=dict)
    """``i2t`` and ``t2i``, one a query, 0 is a hit; empty where they were not kept"""
    convention: str = "strict"
    ceiling: Mapping[str, float] = field(default_factory=dict)
    """the best possible Recall@1 of any model at this window, ``i2t`` and ``t2i``, where the data say so"""
    called: str = ""
    """the data, as people call them"""
    text: str | None = None
    """of shards, the text that was taken (``data.text``); None where the record is older, or the data are no shards"""

    def alike(self, other: Scores) -> bool:
        """Whether both are of the same queries, counted by the same convention."""
        texts = {self.text, other.text} - {None}
        return (self.data, self.convention) == (other.data, other.convention) and len(texts) <= 1


@dataclass(frozen=True, eq=False)
class Row:
    """One run. Shares and recalls are in [0, 1]; what is not known (yet) is None or empty."""

    run: RunFolder | None
    """None where it was read from MLflow"""
    sweep: str
    folder: str
    """the run's name with its uid: ``ctx77-1f2c9a7b``"""
    name: str
    """without its uid, where that is unique among the rows"""
    context_length: int
    axes: Mapping[str, Any]
    """what ``sweep:`` varies, by dotted key"""
    identity: Mapping[str, Any]
    finished: bool
    verdict: str | None
    """of the last attempt; None while it runs, or if it was killed"""
    message: str
    samples: int
    """pairs seen, each counted once"""
    total: int | None
    waste: float | None
    padding_avoided: float | None
    """share of window positions that hold no token: 1 - tokens / (captions * window)"""
    test: Mapping[str, float]
    test_set: str
    test_hash: str | None
    test_samples: int | None
    """samples seen at the checkpoint that was tested, which validation chose"""
    ceiling: Mapping[str, float]
    curves: Mapping[str, Curve]
    """those of CURVES that the run has"""
    spans: Sequence[tuple[float, float, int]]
    """begin, end (seconds since 1970) and ranks of each attempt"""
    hours: float
    """rank-hours, of GPUs where there are any"""
    hours_lost: float
    """of these, spent on samples that a later attempt computed once more, or on starts that came to nothing"""
    on_gpu: bool
    codes: tuple[str, ...]
    """hashes of the code that computed what counts, oldest first; more than one if it changed between attempts"""
    scores: tuple[Scores, ...] = ()
    """retrieval: on the test set and on the tasks of suites, at every window that was asked for"""
    accuracy: Mapping[str, float] = field(default_factory=dict)
    """zero-shot classification by ``suite/task``"""
    records: Mapping[str, Any] = field(default_factory=dict)
    """suites as they were written, by name: everything else that they say"""
    notes: tuple[str, ...] = ()
    """what could not be read as it should be"""
    samples_to: int | None = None
    """samples at which validation first crossed the best of the ``baseline``, between evaluations on a straight line"""
    baseline: str | None = None
    """the finished run of this sweep with the smallest window, and all other axes equal"""

    @property
    def seed(self) -> int:
        return int(self.identity.get(SEED, 0))

    @property
    def text(self) -> str:
        """What validation and test take of a sample (``data.text``, the long one of a mix)."""
        return str(self.identity.get("data.text.long", self.identity.get("data.text", "txt")))

    @property
    def val(self) -> list[tuple[int, float]]:
        """(samples, mean Recall@1)"""
        return self.curves.get(RECALL, EMPTY).pairs()

    @property
    def loss(self) -> Curve:
        return self.curves.get(LOSS, EMPTY)

    @property
    def best(self) -> float | None:
        return max((v for _, v in self.val if v == v), default=None)

    @property
    def group(self) -> str:
        """Rows of one group differ in the window only, as far as was declared."""
        return repr((self.sweep, sorted((k, v) for k, v in {**self.axes, SEED: self.seed}.items() if k != WINDOW)))

    def paid(self, times: NDArray[np.float64]) -> NDArray[np.float64]:
        """Rank-hours spent at each of ``times``, what was lost included; [N]."""
        return self._clock(times, [ranks for _, _, ranks in self.spans])

    def ran(self, times: NDArray[np.float64]) -> NDArray[np.float64]:
        """Hours that the run had run at each of ``times``, waiting between its attempts left out; [N]."""
        return self._clock(times, [1] * len(self.spans))

    def _clock(self, times: NDArray[np.float64], weights: Sequence[int]) -> NDArray[np.float64]:
        total = np.zeros(len(times))
        for (begin, end, _), weight in zip(self.spans, weights, strict=True):
            # An attempt that still runs, or wrote a last point after its verdict, has not ended before that point.
            total += weight * np.clip(times - begin, 0, max(0.0, end - begin))
        return total / 3600


def reaches(curve: Sequence[tuple[int, float]], goal: float) -> int | None:
    """Samples at which ``curve`` first crosses ``goal``, on the straight line between two evaluations."""
    before: tuple[int, float] | None = None
    for samples, value in curve:
        if value >= goal:
            if before is None:
                return samples
            return round(before[0] + (samples - before[0]) * (goal - before[1]) / (value - before[1]))
        before = samples, value
    return None


def curves_of(points: Sequence[Point]) -> dict[str, Curve]:
    """Those metrics of a run's effective journal that are drawn or compared."""
    found: dict[str, list[tuple[int, float, float]]] = {name: [] for name in CURVES}
    for p in points:
        for name, value in p.metrics.items():
            if name in found:
                found[name].append((p.samples, value, p.time))
    return {name: Curve.of(values) for name, values in found.items() if values}


def state(row: Row) -> str:
    """``finished``, or ``unfinished (4.2 k/20.0 k)``."""
    if row.finished:
        return "finished"
    return f"unfinished ({count(row.samples)}/{count(row.total) if row.total else '?'})"


def count(number: float) -> str:
    """``6.3 M``, ``12.8 k``, ``640``."""
    for limit, unit in ((999_950, " M"), (1000, " k")):
        if number >= limit:
            return f"{number / {' M': 1e6, ' k': 1e3}[unit]:.1f}{unit}"
    return f"{number:.0f}"
