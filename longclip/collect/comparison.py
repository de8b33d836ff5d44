"""What a comparison says: lines of cells, each with its uncertainty, and differences to the smallest window.

Stable, for tables and reports that are built on it: all public fields of :class:`Comparison`, :class:`Line`,
:class:`Cell` and :class:`Delta`. A line is what a table shows in one line: the runs of one arm that differ in their
seed, on one task, at one evaluation window; or a run that is not finished; or a model from outside; or a figure that a
paper reports. ``Comparison.lines`` has them in the order to be shown, ``Comparison.tasks`` names the tasks, each a
table of its own, the test set first. How they come about is in compare.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from longclip.collect.row import Row, Scores

KS = (1, 5, 10)
SIDES = ("i2t", "t2i")
RECALLS = tuple(f"{side}_recall_at_{k}" for side in SIDES for k in KS)
MEAN = "mean_recall_at_1"
VAL = "val"
"""the task of a comparison at equal samples (``--trim``): validation, which is scored along the way"""


def group_of(sweep: str, axes: Mapping[str, Any]) -> str:
    """What is compared with each other: runs of one sweep that are equal in all ``axes``, window and seed left out."""
    return repr((sweep, sorted(axes.items())))


@dataclass(frozen=True)
class Cell:
    """A figure of an arm: the mean over its seeds."""

    value: float
    by_seed: tuple[float, ...]
    """of those that have it"""
    low: float | None = None
    """95 % interval over the queries, for these seeds (intervals.py); None where the queries are not known"""
    high: float | None = None

    @property
    def spread(self) -> float | None:
        """Standard deviation over seeds; None for one."""
        return float(np.std(self.by_seed, ddof=1)) if len(self.by_seed) > 1 else None


@dataclass(frozen=True)
class Delta:
    """Difference to the arm with the smallest window of the same group, on the same queries."""

    value: float
    low: float | None
    """95 % interval of the paired difference; None where the ranks of the queries are not at hand"""
    high: float | None
    seeds: int
    """how many of each arm it is the mean over: those that both have"""


@dataclass(frozen=True, eq=False)
class Line:
    """What one line of a table says. Shares in [0, 1]; what is not known is None, or not in its mapping."""

    kind: str
    """``measured``; ``external`` (a model that no run here has trained); ``reported`` (quoted, not measured)"""
    name: str
    task: str
    """``test``, ``suite/task``, or ``val`` where all are compared at the samples of the least advanced"""
    window: int | None
    """in training"""
    evaluated: int | None
    """window in evaluation"""
    sweep: str
    axes: Mapping[str, Any]
    """declared, without the window and the seed"""
    rows: tuple[Row, ...]
    """the runs behind it, one a seed"""
    counts: bool
    """whether it is complete: an unfinished run has a line, but no figures and no part in means"""
    state: str
    scored: tuple[Scores, ...] = ()
    """what the figures are from, one for each of ``rows``: ranks of single queries, where they were kept"""
    scores: Mapping[str, Cell] = field(default_factory=dict)
    """``i2t_recall_at_1``, ..., ``mean_recall_at_1``; and all else that the record of the task says"""
    ceiling: Mapping[str, float] = field(default_factory=dict)
    deltas: Mapping[str, Delta] = field(default_factory=dict)
    """by score; empty for the arm that all are compared to"""
    baseline: str | None = None
    """name of the line that it is compared to"""
    accuracy: Cell | None = None
    """zero-shot classification, the mean over the tasks that all have; ``by_seed`` has those that were scored"""
    waste: float | None = None
    padding_avoided: float | None = None
    best: Cell | None = None
    """of validation's mean Recall@1"""
    area: Cell | None = None
    """under the curve of validation's mean Recall@1 over samples, over the samples: its mean height, from 0 at 0"""
    samples_to: Cell | None = None
    """to the best of the smallest window (of the same seed); ``by_seed`` has those that reached it"""
    hours_to: Cell | None = None
    """rank-hours until then, what was lost included"""
    samples_to_goal: Cell | None = None
    hours_to_goal: Cell | None = None
    samples: float | None = None
    test_samples: float | None = None
    total: int | None = None
    hours: float | None = None
    """of all its runs together"""
    hours_lost: float | None = None
    marks: tuple[str, ...] = ()
    """undeclared differences, in words"""
    source: str = ""
    """of a reported or external line: where it is from"""
    data: str = ""
    """hash of the content that it was scored on"""
    called: str = ""
    """the data, as people call them"""

    @property
    def group(self) -> str:
        """Lines of one group differ in the window only, as far as was declared."""
        return group_of(self.sweep, self.axes)

    @property
    def own(self) -> bool:
        """Whether it is evaluated at the window that it was trained at."""
        return self.window == self.evaluated

    @property
    def of_ceiling(self) -> float | None:
        """Mean Recall@1 as a share of the best possible."""
        possible = sum(self.ceiling.values()) / 2 if len(self.ceiling) == 2 else 0.0
        return self.scores[MEAN].value / possible if possible and MEAN in self.scores else None


@dataclass(frozen=True, eq=False)
class Comparison:
    """Everything that tables, figures and reports show."""

    rows: tuple[Row, ...]
    """every run, one by one"""
    lines: tuple[Line, ...]
    warnings: tuple[str, ...]
    choices: tuple[str, ...]
    """what ``--best-over`` chose, in words"""
    cut: int | None
    """samples at which all are compared (``--trim``); None: at the end of each"""
    goal: float | None
    """mean Recall@1 on validation that was asked for"""

    @property
    def tasks(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(line.task for line in self.lines))

    @property
    def varied(self) -> tuple[str, ...]:
        """The axes besides window and seed."""
        return tuple(sorted({k for line in self.lines for k in line.axes}))

    @property
    def baselines(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(line.baseline for line in self.lines if line.baseline))

    @property
    def folded(self) -> bool:
        """Whether a line stands for several seeds."""
        return any(len(line.rows) > 1 for line in self.lines)

    @property
    def on_gpu(self) -> bool:
        return any(r.on_gpu for r in self.rows)
