"""A run's summary (run/summary.py) as tags of its MLflow run, so that a table can be made from the store alone."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from longclip.run.attempts import Attempt
from longclip.run.folder import RunFolder
from longclip.run.journal import Point
from longclip.run.summary import summary

NAME = "longclip.summary"
PART = 4500
"""Characters of a tag; a store takes 5,000 to 8,000, by its version"""


def tags(run: RunFolder, attempts: Sequence[Attempt], journals: Mapping[Attempt, Sequence[Point]]) -> dict[str, str]:
    """``longclip.summary`` tells of how many parts it is, ``longclip.summary.0`` is the first."""
    text = json.dumps(summary(run, attempts, journals), separators=(",", ":"))
    parts = [text[i : i + PART] for i in range(0, len(text), PART)]
    return {NAME: str(len(parts)), **{f"{NAME}.{i}": part for i, part in enumerate(parts)}}


def read(found: Mapping[str, str]) -> dict[str, Any] | None:
    """The summary in a run's tags; None where there is none, or half of one (it is being written)."""
    try:
        count = int(found[NAME])
        facts: dict[str, Any] = json.loads("".join(found[f"{NAME}.{i}"] for i in range(count)))
    except (KeyError, ValueError):
        return None
    return facts
