"""Which sample stands at which position: arithmetic, the same on any number of ranks, workers and attempts.

Position p of a run is sample k of one of its sources, by a schedule of the sources' weights (:class:`Mixture`); with
one source, k = p. Epoch = k // len(source), counted for each source by itself. Within an epoch the shards are permuted,
then samples are shuffled inside blocks of ``BLOCK`` shards, so that a shared disk sees reads from few files at a time
while neighbours in the order come from many shards. Nothing is drawn from a generator that has a state: a position
needs only the seed, and resuming is asking for the next position.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

Positions = Sequence[int] | NDArray[np.int64]

BLOCK = 16
"""Shards shuffled together: at BIOMEDICA's 10,000 samples a shard, 160,000 samples"""


def key(*parts: int | str) -> int:
    """A 128-bit key for a random stream, from hash(parts)."""
    return int.from_bytes(hashlib.sha256("/".join(map(str, parts)).encode()).digest()[:16], "big")


def permutation(n: int, *parts: int | str) -> NDArray[np.int64]:
    """A permutation of ``range(n)`` keyed by ``parts``.

    From the raw bits of Philox, which numpy promises to keep (NEP 19), unlike the methods of its Generator.
    """
    bits = np.random.Philox(key=key(*parts)).random_raw(n)
    return np.argsort(bits, kind="stable").astype(np.int64)


def uniforms(n: int, *parts: int | str) -> NDArray[np.float64]:
    """``n`` numbers in [0, 1), keyed by ``parts``: the draws that belong to one sample."""
    bits = np.random.Philox(key=key(*parts)).random_raw(n)
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53


@dataclass(frozen=True)
class Draw:
    """What is random about one sample in one epoch."""

    seed: int
    epoch: int
    shard: int
    index: int

    def uniforms(self, n: int, what: str) -> NDArray[np.float64]:
        return uniforms(n, self.seed, what, self.epoch, self.shard, self.index)

    def permutation(self, n: int, what: str) -> NDArray[np.int64]:
        return permutation(n, self.seed, what, self.epoch, self.shard, self.index)


class Order:
    """The order over shards of the given sizes."""

    def __init__(self, sizes: Sequence[int], seed: int | str, block: int = BLOCK) -> None:
        self.sizes = np.asarray(sizes, dtype=np.int64)
        self.seed = seed
        self.block = block
        self.length = int(self.sizes.sum())
        self._epoch = lru_cache(maxsize=2)(self._make_epoch)
        self._block = lru_cache(maxsize=4)(self._make_block)

    def __len__(self) -> int:
        return self.length

    def locate(self, positions: Positions) -> NDArray[np.int64]:
        """``(epoch, shard, index in the shard)`` of the sample at each of ``positions``, [n, 3]."""
        epochs, within = np.divmod(np.asarray(positions, dtype=np.int64), self.length)
        found = np.empty((len(within), 3), dtype=np.int64)
        for epoch in np.unique(epochs).tolist():
            shards, starts = self._epoch(epoch)
            blocks = np.where(epochs == epoch, np.searchsorted(starts, within, side="right") - 1, -1)
            for block in np.unique(blocks[blocks >= 0]).tolist():
                here = blocks == block
                offsets = self._block(epoch, block)[within[here] - starts[block]]
                members = shards[block * self.block : (block + 1) * self.block]
                ends = np.cumsum(self.sizes[members])
                at = np.searchsorted(ends, offsets, side="right")
                begins = ends - self.sizes[members]
                found[here] = np.stack([np.full_like(offsets, epoch), members[at], offsets - begins[at]], axis=1)
        return found

    def _make_epoch(self, epoch: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The shards of an epoch in order, and the position at which each block starts."""
        shards = permutation(len(self.sizes), self.seed, "shards", epoch)
        sizes = self.sizes[shards]
        blocks = np.add.reduceat(sizes, np.arange(0, len(sizes), self.block))
        return shards, np.concatenate([[0], np.cumsum(blocks)[:-1]])

    def _make_block(self, epoch: int, block: int) -> NDArray[np.int64]:
        shards, _ = self._epoch(epoch)
        size = int(self.sizes[shards[block * self.block : (block + 1) * self.block]].sum())
        return permutation(size, self.seed, "block", epoch, block)

    def __getstate__(self) -> tuple[object, ...]:
        return (self.sizes, self.seed, self.block)

    def __setstate__(self, state: tuple[NDArray[np.int64], int | str, int]) -> None:
        self.__init__(state[0].tolist(), state[1], state[2])  # type: ignore[misc]


PERIOD = 10_000
"""Positions after which the schedule of sources repeats; weights are kept to 1 / PERIOD"""


class Mixture:
    """The order over several sources, each drawn from in proportion to its weight, each with epochs of its own.

    Of every PERIOD positions a source has a fixed number, spread evenly, so that any stretch of a few positions holds
    nearly its share. Shards are counted through the sources, in their order.
    """

    def __init__(
        self, sizes: Sequence[Sequence[int]], seed: int, weights: Sequence[float] = (1.0,), block: int = BLOCK
    ) -> None:
        # The first source has the seed itself: alone it is ordered as if there were no mixture.
        seeds: list[int | str] = [seed, *(f"{seed}/source{i}" for i in range(1, len(sizes)))]
        self.seed = seed
        self.orders = [Order(shards, own, block) for shards, own in zip(sizes, seeds, strict=True)]
        self._first_shard = np.cumsum([0, *map(len, sizes)])
        self.counts = _counts(weights)
        source = np.repeat(np.arange(len(sizes)), self.counts)
        nth = np.concatenate([np.arange(count) for count in self.counts])
        # The j-th of a source's c places aims at (j + 1/2) / c of the period.
        order = np.lexsort((source, (nth + 0.5) / self.counts[source]))
        self._source, self._nth = source[order], nth[order]

    def __len__(self) -> int:
        return sum(map(len, self.orders))

    def locate(self, positions: Positions) -> NDArray[np.int64]:
        """``(epoch of its source, shard, index in the shard)`` of the sample at each of ``positions``, [n, 3]."""
        periods, slots = np.divmod(np.asarray(positions, dtype=np.int64), PERIOD)
        sources = self._source[slots]
        found = np.empty((len(slots), 3), dtype=np.int64)
        for source in np.unique(sources).tolist():
            here = sources == source
            nth = periods[here] * self.counts[source] + self._nth[slots[here]]
            found[here] = self.orders[source].locate(nth)
            found[here, 1] += self._first_shard[source]
        return found


def evenly(sizes: Sequence[int], count: int) -> list[tuple[int, int]]:
    """``(shard, index)`` of ``count`` samples that lie evenly over shards of these ``sizes``, in their order, the first
    and the last among them; of all samples where there are no more."""
    ends = np.cumsum(sizes, dtype=np.int64)
    positions = np.linspace(0, sum(sizes) - 1, min(count, sum(sizes))).astype(np.int64)
    shards = np.searchsorted(ends, positions, side="right")
    return list(zip(shards.tolist(), (positions - (ends - sizes)[shards]).tolist(), strict=True))


def _counts(weights: Sequence[float]) -> NDArray[np.int64]:
    """PERIOD dealt out in proportion to ``weights``, the remainder to those that are owed most."""
    exact = np.array(weights, dtype=np.float64) / math.fsum(weights) * PERIOD
    counts = np.floor(exact).astype(np.int64)
    owed = np.argsort(counts - exact, kind="stable")
    counts[owed[: PERIOD - int(counts.sum())]] += 1
    return counts
