"""Neighbours among perceptual hashes: which pictures of millions look like one of a few hundred thousand others."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

_AT_ONCE = 2**20
"""comparisons held in memory at a time"""


def near(hashes: NDArray[np.uint64], others: NDArray[np.uint64], distance: int) -> NDArray[np.bool_]:
    """Whether each of ``hashes`` [n] differs in at most ``distance`` of 64 bits from any of ``others`` [m]; [n].

    Two hashes that differ in d bits agree in at least one of d + 1 pieces, so only those are compared that share a
    piece (Manber & Wu's pigeonhole argument): memory O(n + m).
    """
    distinct, back = np.unique(hashes, return_inverse=True)
    if len(distinct) * len(others) <= _AT_ONCE:
        found = np.any(_compare(distinct[:, None], others[None], distance), axis=1)
        return np.asarray(found[back])
    others, found = np.unique(others), np.zeros(len(distinct), dtype=bool)
    edges = [64 * i // (distance + 1) for i in range(distance + 2)]
    for low, high in pairwise(edges):
        mask = np.uint64(2 ** (high - low) - 1)
        pieces = (others >> np.uint64(low)) & mask
        by_piece = np.argsort(pieces, kind="stable")
        pieces = pieces[by_piece]
        todo = np.flatnonzero(~found)
        mine = (distinct[todo] >> np.uint64(low)) & mask
        first = np.searchsorted(pieces, mine, "left")
        many = np.searchsorted(pieces, mine, "right") - first
        ends = np.cumsum(many)
        begin = 0
        while begin < len(todo):
            done = int(ends[begin - 1]) if begin else 0
            end = max(begin + 1, int(np.searchsorted(ends, done + _AT_ONCE, "right")))
            repeated = np.repeat(np.arange(begin, end), many[begin:end])
            candidate = np.arange(len(repeated)) - (ends - many)[repeated] + done + first[repeated]
            hit = _compare(distinct[todo[repeated]], others[by_piece[candidate]], distance)
            found[todo[repeated[hit]]] = True
            begin = end
    return np.asarray(found[back])


def _compare(a: NDArray[np.uint64], b: NDArray[np.uint64], distance: int) -> NDArray[np.bool_]:
    return np.asarray(np.bitwise_count(a ^ b) <= distance)
