"""What a window wastes: the tokens that truncation cuts off, and the places that padding leaves empty.

All of it follows from one histogram of lengths, so that memory is flat however many texts there are, and the result is
exact and the same for any number of workers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from longclip.data.counter import TokenCounter
from longclip.data.shards import Dataset, open_dataset
from longclip.data.text import render
from longclip.errors import SiteError, UserError
from longclip.experiment.template import template

CHUNK = 2000
"""samples that a worker reads and counts at a time"""


@dataclass(frozen=True)
class Lengths:
    """How many texts have how many tokens."""

    counts: Counter[int]
    """length in tokens, special tokens included -> texts"""
    specials: int
    """special tokens of every text, which also take places in the window"""
    without: Counter[str] = field(default_factory=Counter)
    """shard -> samples that have no such text; they are in no figure"""

    @property
    def texts(self) -> int:
        return self.counts.total()

    @property
    def tokens(self) -> int:
        """The texts' own tokens: without special ones."""
        return sum((length - self.specials) * n for length, n in self.counts.items())

    def cut(self, window: int) -> int:
        """Tokens that do not fit: sum max(0, L - window), special tokens kept, as tokenizers' truncation does."""
        return sum((length - window) * n for length, n in self.counts.items() if length > window)

    def waste(self, window: int) -> float:
        """Share of the texts' own tokens that is cut off (arXiv 2510.03978: token-weighted), 0 to 1.

        A window of 77 keeps 75 of a text's tokens, CLIP's start and end being the other two; neither counts as text.
        """
        return self.cut(window) / self.tokens if self.tokens else 0.0

    def texts_cut(self, window: int) -> float:
        """Share of the texts of which something is cut off, 0 to 1."""
        return sum(n for length, n in self.counts.items() if length > window) / self.texts if self.texts else 0.0

    def padding(self, window: int) -> float:
        """Share of the window's places that is empty where each text is padded to it, 0 to 1: what packing saves."""
        places = self.texts * window
        return 1 - sum(min(length, window) * n for length, n in self.counts.items()) / places if places else 0.0

    def quantile(self, share: float) -> int:
        """The shortest length that at least this share of the texts does not exceed, in tokens."""
        below = 0
        for length in sorted(self.counts):
            below += self.counts[length]
            if below >= share * self.texts:
                return length
        return 0

    def as_dict(self, windows: Sequence[int]) -> dict[str, Any]:
        """For JSON. Shares are in [0, 1], lengths in tokens with special ones."""
        return {
            "texts": self.texts,
            "tokens": self.tokens,
            "special_tokens_per_text": self.specials,
            "without_text": self.without.total(),
            "mean": self.tokens / self.texts + self.specials if self.texts else 0.0,
            **{f"p{round(100 * q)}": self.quantile(q) for q in (0.05, 0.25, 0.5, 0.75, 0.95, 0.99)},
            "longest": max(self.counts, default=0),
            "windows": [self.at(window) for window in windows],
        }

    def at(self, window: int) -> dict[str, Any]:
        """What one window does."""
        return {
            "window": window,
            "waste": self.waste(window),
            "tokens_cut": self.cut(window),
            "texts_cut": self.texts_cut(window),
            "padding": self.padding(window),
        }


def measure(
    shards: Sequence[str],
    tokenizer: str,
    text: str = "txt",
    workers: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> Lengths:
    """Lengths of the texts of indexed shards; images are not read.

    Args:
        shards: what :func:`open_dataset` takes: indexed folders, or ``FOLDER/GLOB.tar``. A shard named twice counts
            once.
        tokenizer: what :class:`TokenCounter` takes.
        text: ``txt``, a field of the json member, or a template over these.
        workers: processes.
        progress: called with the samples done and the samples there are.

    Raises:
        UserError: no such shards or tokenizer, no sample that has this text, or a template that is none.
        SiteError: the shards cannot be read, or are not those that were indexed.
    """
    try:
        template(text)
    except ValueError as error:
        raise UserError(
            f"--text {text}: {error}", "valid is txt, a json field, or a template: '{txt} {title}'"
        ) from None
    datasets = [open_dataset(spec) for spec in dict.fromkeys(shards)]
    counter = TokenCounter(tokenizer)
    units = list(_units(datasets))
    total, done = sum(stop - start for _, _, start, stop in units), 0
    found = Lengths(Counter(), counter.specials)
    for size, counts, without in _each(units, datasets, counter, text, min(workers, len(units))):
        found.counts.update(counts)
        found.without.update(without)
        done += size
        if progress is not None:
            progress(done, total)
    if not found.counts:
        raise UserError(f"no sample of {', '.join(shards)} has a text {text!r}", "--text FIELD names one of its fields")
    return found


_Unit = tuple[int, int, int, int]
"""dataset, shard, first sample, end"""
_Result = tuple[int, Counter[int], Counter[str]]


def _units(datasets: Sequence[Dataset]) -> Iterator[_Unit]:
    seen: set[Path] = set()
    for d, dataset in enumerate(datasets):
        for s, size in enumerate(dataset.sizes):
            if (shard := (dataset.root / dataset.names[s]).resolve()) not in seen:
                seen.add(shard)
                yield from ((d, s, start, min(start + CHUNK, size)) for start in range(0, size, CHUNK))


def _each(
    units: Sequence[_Unit], datasets: Sequence[Dataset], counter: TokenCounter, text: str, workers: int
) -> Iterator[_Result]:
    if workers <= 1:
        _start(datasets, counter, text)
        yield from map(_count, units)
        return
    with ProcessPoolExecutor(workers, initializer=_start, initargs=(datasets, counter, text)) as pool:
        yield from pool.map(_count, units)


_worker: tuple[Sequence[Dataset], TokenCounter, str]
"""what every unit of this process needs: sent once, not with each unit"""


def _start(datasets: Sequence[Dataset], counter: TokenCounter, text: str) -> None:
    global _worker
    _worker = (datasets, counter, text)


def _count(unit: _Unit) -> _Result:
    datasets, counter, name = _worker
    d, shard, start, stop = unit
    texts: list[str] = []
    for i in range(start, stop):
        try:
            _, txt, fields = datasets[d].fields_and_text(shard, i)
        except OSError as error:
            where = f"{datasets[d].root / datasets[d].names[shard]}: {error.strerror or error}"
            raise SiteError(where, f"longclip data index {datasets[d].root} (again)") from None
        text = render(name, {**fields, "txt": txt})
        if text.strip():
            texts.append(text)
    without = Counter({datasets[d].names[shard]: stop - start - len(texts)})
    return stop - start, Counter(counter.many(texts)), +without
