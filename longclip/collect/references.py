"""Figures that papers report, quoted in a table beside what was measured (``references.yaml``).

rows:
  - name: BiomedCLIP
    source: arXiv 2303.00915, supplement, table 1
    window: 256
    measured_on: their own test set of 725,739 pairs
    metrics: {i2t_recall_at_1: 0.735, t2i_recall_at_1: 0.7226}
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import Field

from longclip.errors import UserError
from longclip.experiment.load import REFERENCES, read_as
from longclip.experiment.section import Section

Share = Annotated[float, Field(ge=0, le=1)]


class Metrics(Section):
    """Shares in [0, 1], as everywhere here: 73.5 % is 0.735."""

    i2t_recall_at_1: Share | None = None
    i2t_recall_at_5: Share | None = None
    i2t_recall_at_10: Share | None = None
    t2i_recall_at_1: Share | None = None
    t2i_recall_at_5: Share | None = None
    t2i_recall_at_10: Share | None = None
    mean_recall_at_1: Share | None = None
    accuracy: Share | None = None


class Quoted(Section):
    """One row. Without ``source`` there is none: a figure from nowhere has no place in a table."""

    name: Annotated[str, Field(min_length=1)]
    source: Annotated[str, Field(min_length=1)]
    window: Annotated[int, Field(ge=1)] | None = None
    measured_on: str = ""
    task: str = "test"
    """the table that it stands in: ``test``, or ``suite/task``"""
    metrics: Metrics


class References(Section):
    """The whole file."""

    rows: Annotated[tuple[Quoted, ...], Field(strict=False, min_length=1)]


class Reference(Section):
    """A quoted row as a comparison takes it."""

    name: str
    source: str
    window: int | None
    task: str
    metrics: dict[str, float]


def read_references(file: Path) -> list[Reference]:
    """The rows of a file.

    Raises:
        UserError: there is no such file.
        ExperimentError: with every mistake, each with its line and the nearest valid key.
    """
    if not file.is_file():
        raise UserError(
            f"no such file: {file}", f"leave out --references, or write one ({REFERENCES} beside the experiment)"
        )
    found = []
    for row in read_as(References, file).rows:
        metrics = row.metrics.model_dump(exclude_none=True)
        where = f"{row.source} (on {row.measured_on})" if row.measured_on else row.source
        found.append(Reference(name=row.name, source=where, window=row.window, task=row.task, metrics=metrics))
    return found
