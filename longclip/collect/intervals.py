"""How sure a Recall@K is, and a difference between two: 95 % intervals by resampling the queries of the test set.

A query is a hit (1) or a miss (0). Drawing as many queries anew, with replacement, gives a binomial for the share of
one model, and a multinomial over the few values that a difference can take; so a resample costs the same for 300
queries as for 100,000, and nothing is approximated by drawing counts in place of queries.

- One model: the binomial needs no draws; it is inverted (Wilson 1927). The percentile interval would have no width
  where all queries hit, and covers 56 % instead of 95 % at a true share of 0.997 and 300 queries.
- Two models on the same queries: the paired difference, query by query, so that what is hard for both cancels out.
  Percentile interval over resamples, after one query in favour of each has been added (Bonett and Price 2012, of the
  2 x 2 table), without which two models that differ in no query would differ by 0 with no doubt.
- Several seeds: a query counts with its mean over the seeds. Seeds are not drawn: the interval is that of the test set,
  for the seeds at hand, and the spread over the seeds stands beside it.

The gallery is that of the test set, and not resampled. Coverage was measured with both drawn anew
(tools/bench/coverage.py): a redrawn gallery adds nothing that can be seen where scores are continuous. Where many pairs
of a test set are doubles of one another, hits come and go together, and these intervals are too narrow: where a third
of the pairs has a double they hold the truth in 85 to 91 % of cases.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import ArrayLike, NDArray

RESAMPLES = 10_000
LEVEL = 0.95
Z = NormalDist().inv_cdf(0.5 + LEVEL / 2)


@dataclass(frozen=True)
class Interval:
    """A share, or a difference of two, with its 95 % interval."""

    value: float
    low: float
    high: float

    @property
    def is_clear(self) -> bool:
        """Whether a difference of nothing lies outside."""
        return not self.low <= 0.0 <= self.high


def hits(ranks_N: ArrayLike, k: int) -> NDArray[np.bool_]:
    """Which queries have their match among the first ``k``; ranks count from 0."""
    return np.asarray(ranks_N) < k


def share(value: float, queries: int) -> Interval:
    """The interval of one model's share of hits, which is all that has to be known of ``queries`` outcomes (Wilson)."""
    if queries < 1:
        raise ValueError("a share of no queries")
    middle = (value + Z * Z / (2 * queries)) / (1 + Z * Z / queries)
    half = Z / (1 + Z * Z / queries) * math.sqrt(value * (1 - value) / queries + Z * Z / (4 * queries**2))
    return Interval(value, max(0.0, min(middle - half, value)), min(1.0, max(middle + half, value)))


def mean_share(hits_SN: ArrayLike) -> Interval:
    """The mean over seeds of the share of hits, ``hits_SN`` [seeds, queries]; the same queries for every seed."""
    hits = np.asarray(hits_SN, dtype=np.int64)
    seeds, queries = hits.shape
    if seeds == 1:
        return share(float(hits.mean()), queries)
    # Two hits and two misses more (Agresti and Coull 1998), for Wilson's interval is not to be had of such means.
    return _resampled(hits.sum(axis=0), seeds, (0, 0, seeds, seeds))


def difference(a_SN: ArrayLike, b_SN: ArrayLike) -> Interval:
    """``b`` minus ``a``: the difference of two models' mean shares of hits on the same queries in the same order.

    Both are [seeds, queries]; the numbers of seeds may differ.

    Raises ValueError where the numbers of queries do.
    """
    a, b = np.asarray(a_SN, dtype=np.int64), np.asarray(b_SN, dtype=np.int64)
    if a.shape[1] != b.shape[1]:
        raise ValueError(f"{a.shape[1]} queries and {b.shape[1]}: not the same test set")
    one = max(len(a), len(b))  # a query that one seed of one model hits, and the other model does not
    return _resampled(len(a) * b.sum(axis=0) - len(b) * a.sum(axis=0), len(a) * len(b), (-one, one))


def unpaired(a: Interval, b: Interval) -> Interval:
    """``b`` minus ``a`` where all that is known is each one's interval (Newcombe 1998, method 10): other queries, or
    ranks that were not kept. Wider than the paired one."""
    value = b.value - a.value
    low = value - math.hypot(b.value - b.low, a.high - a.value)
    return Interval(value, low, value + math.hypot(b.high - b.value, a.value - a.low))


def _resampled(sums_N: NDArray[np.int64], scale: int, added: tuple[int, ...]) -> Interval:
    """Percentile interval of the mean of ``sums_N / scale``, with the queries ``added`` to those that are drawn from.

    Always from the same random numbers: the same runs give the same table.
    """
    queries = len(sums_N)
    if not queries:
        raise ValueError("a share of no queries")
    lowest = min(int(sums_N.min()), *added)
    counts_L = np.bincount(np.concatenate([sums_N, np.array(added)]) - lowest)
    levels_L = np.arange(lowest, lowest + len(counts_L))
    kept = counts_L > 0
    drawn = np.random.default_rng(0).multinomial(counts_L.sum(), counts_L[kept] / counts_L.sum(), RESAMPLES)
    means = drawn @ levels_L[kept] / (counts_L.sum() * scale)
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    value = float(sums_N.sum() / (queries * scale))
    return Interval(value, min(float(low), value), max(float(high), value))
