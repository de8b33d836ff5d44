"""Neighbours among perceptual hashes: which pictures of millions look like one of a few hundred thousand others."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

_AT_ONCE = 2**20
"""comparisons held in memory at a time"""


def near(hashes: NDArray[np.uint64], others: NDArray[np.uint64], distance: int) -> NDArray[np.bool_]:
    """Whether each of ``hashes`` [n] differs in at most ``distance`` of 64 bits from any of ``others`` [m]; [n].

    Cut into p pieces, two hashes that differ in d bits have a piece that differs in at most d // p (Manber & Wu's
    pigeonhole argument). With p as below that is one bit or none, so only those are compared of which a piece is the
    same but for one bit: memory O(n + 23 m).
    """
    distinct, back = np.unique(hashes, return_inverse=True)
    if len(distinct) * len(others) <= _AT_ONCE:
        found = np.any(_compare(distinct[:, None], others[None], distance), axis=1)
        return np.asarray(found[back])
    others, found = np.unique(others), np.zeros(len(distinct), dtype=bool)
    pieces = max(3, distance // 2 + 1)  # at least 3, or the table of all values of a piece would not fit
    edges = [64 * i // pieces for i in range(pieces + 1)]
    for low, high in pairwise(edges):
        mask = np.uint64(2 ** (high - low) - 1)
        flips = [0, *(1 << bit for bit in range(high - low))] if distance >= pieces else [0]
        theirs = ((others >> np.uint64(low)) & mask)[:, None] ^ np.array(flips, dtype=np.uint64)
        values = theirs.ravel().astype(np.int64)
        by_value = np.argsort(values, kind="stable")
        starts = np.append(0, np.cumsum(np.bincount(values, minlength=2 ** (high - low))))
        todo = np.flatnonzero(~found)
        mine = ((distinct[todo] >> np.uint64(low)) & mask).astype(np.int64)
        first = starts[mine]
        many = starts[mine + 1] - first
        ends = np.cumsum(many)
        begin = 0
        while begin < len(todo):
            done = int(ends[begin - 1]) if begin else 0
            end = max(begin + 1, int(np.searchsorted(ends, done + _AT_ONCE, "right")))
            repeated = np.repeat(np.arange(begin, end), many[begin:end])
            candidate = np.arange(len(repeated)) - (ends - many)[repeated] + done + first[repeated]
            alike = _compare(distinct[todo[repeated]], others[by_value[candidate] // len(flips)], distance)
            found[todo[repeated[alike]]] = True
            begin = end
    return np.asarray(found[back])


def _compare(a: NDArray[np.uint64], b: NDArray[np.uint64], distance: int) -> NDArray[np.bool_]:
    return np.asarray(np.bitwise_count(a ^ b) <= distance)
