"""A few queries of the test set, as two arms ranked them: what the longer window finds and the shorter one does not.

The ranks are those beside ``evaluations/test.json``; pictures and captions are read from the shards where the run was
submitted with them, if they still lie there and are the same by hash. Whatever stands in the way is said.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from longclip.collect.comparison import Comparison, Line
from longclip.collect.row import TEST, Row, Scores
from longclip.data.shards import IMAGE_FORMATS, MAX_PIXELS, Dataset, open_dataset
from longclip.data.text import Text
from longclip.errors import LongclipError
from longclip.run.attempts import attempts_of

GROUPS = (("found by {long} only", 6), ("found by both", 3), ("found by neither", 3))
"""what is shown, and at most how many of each: a dozen"""
SIDE, QUALITY = 144, 80
"""pixels of a thumbnail's longer side, and JPEG's quality"""
LONGEST = 1500
"""characters of a caption that are shown"""

Ranks = NDArray[np.int32]


@dataclass(frozen=True)
class Example:
    """One pair of the test set."""

    key: str
    caption: str
    seen: int | None
    """characters of ``caption`` that the shorter window holds; None where the tokenizer is not at hand"""
    thumbnail: str
    """data: URI; empty where the image cannot be read"""
    short: tuple[int, int]
    """places of the match in the ranking, from 1: caption by image (i2t), image by caption (t2i)"""
    long: tuple[int, int]


@dataclass(frozen=True)
class Examples:
    """What a report shows of single queries."""

    short: str = ""
    long: str = ""
    """names of the two runs"""
    window: int = 0
    """of the shorter"""
    groups: tuple[tuple[str, int, tuple[Example, ...]], ...] = ()
    """title, how many there are in all, and the examples"""
    missing: str = ""
    """why there are none"""


def examples(comparison: Comparison) -> Examples:
    """Of the first group whose smallest and largest window were both tested, by the runs of its first common seed."""
    found = _arms([line for line in comparison.lines if line.task == TEST and line.own and line.counts])
    if isinstance(found, str):
        return Examples(missing=found)
    (short_row, short), (long_row, long) = found
    place = _place(short_row)
    if place is None:
        return Examples(missing=f"{short_row.name} does not record where its test set lay")
    try:
        dataset = open_dataset(place)
    except LongclipError as error:
        return Examples(missing=f"the test set is not readable where it was: {error.message}")
    if dataset.hash != short.data:
        return Examples(missing=f"the shards at {place} are not those that were scored (their hash differs)")
    if len(dataset) != len(short.ranks["i2t"]):
        unread = len(dataset) - len(short.ranks["i2t"])
        return Examples(missing=f"{unread} samples of {place} could not be read when it was scored: which is not known")
    reader = _Reader(short_row, dataset)
    sides = [(s.ranks["i2t"], s.ranks["t2i"]) for s in (short, long)]
    missed, hit = sides[0][0] > 0, sides[1][0] == 0
    chosen = (missed & hit, ~missed & hit, missed & ~hit)
    groups = []
    for (title, most), mask in zip(GROUPS, chosen, strict=True):
        there = np.flatnonzero(mask)
        picked = there[np.unique(np.linspace(0, len(there) - 1, most).round().astype(int))] if len(there) else there
        shown = tuple(reader.read(int(i), *sides) for i in picked)
        groups.append((title.format(long=long_row.name), len(there), shown))
    return Examples(short_row.name, long_row.name, short_row.context_length, tuple(groups))


def _arms(lines: Sequence[Line]) -> tuple[tuple[Row, Scores], tuple[Row, Scores]] | str:
    """The two runs to be shown, or why there are none."""
    groups: dict[str, list[Line]] = {}
    for line in lines:
        groups.setdefault(line.group, []).append(line)
    several = [g for g in groups.values() if len({line.window for line in g}) > 1]
    if not several:
        return "no two windows of one sweep were tested"
    for group in several:
        ends = [f(group, key=lambda line: line.window or 0) for f in (min, max)]
        by_seed = [
            {row.seed: (row, s) for row, s in zip(line.rows, line.scored, strict=False) if len(s.ranks) == 2}
            for line in ends
        ]
        for seed in (s for s in by_seed[0] if s in by_seed[1]):
            short, long = by_seed[0][seed], by_seed[1][seed]
            same = [len(set(map(len, s.ranks.values()))) == 1 for _, s in (short, long)]
            if short[1].alike(long[1]) and all(same):
                return short, long
    return "the ranks of single queries were not kept, or not of the same data (evaluations/test.npz)"


def _paths(row: Row) -> dict[str, str]:
    submitted = [a.submitted for a in attempts_of(row.run) if a.submitted] if row.run else []
    return dict(submitted[-1].get("paths") or {}) if submitted else {}


def _place(row: Row) -> str | None:
    return _paths(row).get("data.test")


class _Reader:
    """Pairs by their place in the gallery."""

    def __init__(self, row: Row, dataset: Dataset) -> None:
        assert row.run is not None
        self._dataset = dataset
        self._ends = list(accumulate(dataset.sizes))
        self._text = Text.of(row.run.experiment().data)
        self._window = row.context_length
        self._tokenizer = _tokenizer(_paths(row))

    def read(self, i: int, short: tuple[Ranks, Ranks], long: tuple[Ranks, Ranks]) -> Example:
        shard = next(s for s, end in enumerate(self._ends) if i < end)
        places = [(int(side[0][i]) + 1, int(side[1][i]) + 1) for side in (short, long)]
        try:
            sample = self._dataset.read(shard, i - (self._ends[shard] - self._dataset.sizes[shard]))
        except OSError as error:
            return Example(f"sample {i}", f"cannot be read: {error}", None, "", places[0], places[1])
        caption = self._text(sample.text, sample.fields)
        return Example(sample.key, caption, self._seen(caption), _thumbnail(sample.image), places[0], places[1])

    def _seen(self, caption: str) -> int | None:
        if self._tokenizer is None:
            return None
        offsets = self._tokenizer.encode(caption).offsets  # type: ignore[attr-defined]
        # A caption that is cut keeps the first window - 1 tokens and the last special one (data/tokens.py).
        return len(caption) if len(offsets) <= self._window else int(offsets[self._window - 2][1])


def _tokenizer(paths: dict[str, str]) -> object | None:
    """The run's tokenizer, without transformers; None where it is not at hand as a ``tokenizer.json``."""
    folder = paths.get("model.text.tokenizer") or paths.get("model.text.tower")
    file = Path(folder) / "tokenizer.json" if folder else None
    if file is None or not file.is_file():
        return None
    from tokenizers import Tokenizer

    try:
        found = Tokenizer.from_file(str(file))
    except Exception:  # what tokenizers raises; without it, captions are shown without the mark
        return None
    found.no_truncation()
    found.no_padding()
    return found


def _thumbnail(data: bytes) -> str:
    """Encoded anew, so that nothing of the file but its pixels is in the report."""
    from PIL import Image

    try:
        with Image.open(io.BytesIO(data), formats=IMAGE_FORMATS) as opened:
            if opened.width * opened.height > MAX_PIXELS:
                return ""
            image = opened.convert("RGB")
            image.thumbnail((SIDE, SIDE))
    except Exception:  # decoders raise nearly anything, and the bytes are in memory
        return ""
    out = io.BytesIO()
    image.save(out, "JPEG", quality=QUALITY)
    return "data:image/jpeg;base64," + base64.b64encode(out.getvalue()).decode()
