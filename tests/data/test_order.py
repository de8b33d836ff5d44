"""The order of samples: a permutation each epoch, the same on any number of ranks and workers."""

from __future__ import annotations

import itertools
import pickle
from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from longclip.data.order import PERIOD, Mixture, Order, evenly, permutation, uniforms

sizes = st.lists(st.integers(min_value=0, max_value=40), min_size=1, max_size=40).filter(lambda s: sum(s) > 0)


@settings(deadline=None)
@given(sizes, st.integers(0, 2**31), st.integers(1, 7), st.integers(0, 3))
def test_each_epoch_is_the_multiset_of_the_index(sizes: list[int], seed: int, block: int, epoch: int) -> None:
    order = Order(sizes, seed, block)
    start = epoch * len(order)
    located = order.locate(range(start, start + len(order))).tolist()
    assert {e for e, _, _ in located} == {epoch}
    everything = Counter((shard, i) for shard, size in enumerate(sizes) for i in range(size))
    assert Counter((shard, i) for _, shard, i in located) == everything


@settings(deadline=None)
@given(sizes, st.integers(0, 99), st.integers(1, 5))
def test_a_block_reads_from_few_shards(sizes: list[int], seed: int, block: int) -> None:
    """Within any stretch of the order between block boundaries, at most ``block`` shards are open."""
    order = Order(sizes, seed, block)
    shards = order.locate(range(len(order)))[:, 1].tolist()
    first_seen = {s: shards.index(s) for s in set(shards)}
    last_seen = {s: len(shards) - 1 - shards[::-1].index(s) for s in set(shards)}
    for p in range(len(order)):
        assert sum(first_seen[s] <= p <= last_seen[s] for s in first_seen) <= block


def test_asking_out_of_order_changes_nothing() -> None:
    order = Order([30, 0, 50, 7, 90], 3, 2)
    forwards = order.locate(range(400)).tolist()
    again = pickle.loads(pickle.dumps(order))
    assert [again.locate([p]).tolist()[0] for p in reversed(range(400))] == forwards[::-1]


def test_epochs_and_seeds_differ() -> None:
    order = Order([500, 500], 0)
    first = order.locate(range(1000))[:, 1:].tolist()
    assert first != order.locate(range(1000, 2000))[:, 1:].tolist()
    assert first != Order([500, 500], 1).locate(range(1000))[:, 1:].tolist()


def test_far_positions_cost_what_near_ones_do() -> None:
    """A resume at sample ten million of 24 million is one permutation of a block, not a replay."""
    order = Order([10_000] * 2400, 0)
    ((epoch, shard, index),) = order.locate([10_000_000]).tolist()
    assert epoch == 0 and 0 <= shard < 2400 and 0 <= index < 10_000
    assert order.locate([3 * len(order) + 5])[0, 0] == 3


def test_draws_are_pinned() -> None:
    """Values of today: if numpy's bits or our keys ever changed, every run under way would see other data."""
    assert permutation(8, 0, "block", 0, 0).tolist() == PINNED_PERMUTATION
    assert [round(x, 12) for x in uniforms(2, 0, "crop", 0, 1, 2).tolist()] == PINNED_UNIFORMS


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 200), st.integers(0, 10))
def test_uniforms_are_in_range(n: int, seed: int) -> None:
    values = uniforms(n, seed)
    assert ((values >= 0) & (values < 1)).all()


# ---- several sources ---------------------------------------------------------------------------------------------

few = st.lists(st.integers(min_value=0, max_value=9), min_size=1, max_size=6).filter(lambda s: sum(s) > 0)
mixed = st.lists(st.tuples(few, st.floats(0.05, 20)), min_size=1, max_size=5)


@settings(max_examples=60, deadline=None)
@given(mixed, st.integers(0, 99), st.integers(0, 10**9))
def test_each_source_keeps_its_own_epochs(sources: list[tuple[list[int], float]], seed: int, start: int) -> None:
    """Wherever one looks: what a source gave before and after is its own order, uninterrupted, epoch after epoch."""
    sizes, weights = [s for s, _ in sources], [w for _, w in sources]
    mixture = Mixture(sizes, seed, weights, block=2)
    shards = [(i, shard) for i, own in enumerate(sizes) for shard in range(len(own))]
    given: dict[int, list[tuple[int, int, int]]] = {i: [] for i in range(len(sizes))}
    for epoch, shard, index in mixture.locate(range(3 * max(map(sum, sizes)) * len(sizes))).tolist():
        given[shards[shard][0]].append((epoch, shards[shard][1], index))
    for i, own in enumerate(sizes):
        everything = Counter((shard, k) for shard, size in enumerate(own) for k in range(size))
        for epoch in range(len(given[i]) // sum(own)):
            once = given[i][epoch * sum(own) : (epoch + 1) * sum(own)]
            assert {e for e, _, _ in once} == {epoch}
            assert Counter((shard, k) for _, shard, k in once) == everything
    again = pickle.loads(pickle.dumps(mixture))
    each = [mixture.locate([p]).tolist()[0] for p in range(start, start + 20)]
    assert again.locate(range(start, start + 20)).tolist() == each


@settings(max_examples=40, deadline=None)
@given(st.lists(st.floats(0.05, 20), min_size=1, max_size=8), st.integers(0, 10**9), st.integers(1, 3000))
def test_any_stretch_holds_its_share_of_every_source(weights: list[float], start: int, length: int) -> None:
    """To within two samples for each of the sources, and one in PERIOD for the rounding of the weights."""
    mixture = Mixture([[7]] * len(weights), 0, weights)
    assert int(mixture.counts.sum()) == PERIOD
    found = Counter(mixture.locate(range(start, start + length))[:, 1].tolist())
    for source, weight in enumerate(weights):
        share = weight / sum(weights) * length
        assert abs(found[source] - share) <= 2 * len(weights) + length / PERIOD


def test_one_source_is_ordered_as_without_a_mixture() -> None:
    order, mixture = Order([30, 0, 50, 7, 90], 3, 2), Mixture([[30, 0, 50, 7, 90]], 3, block=2)
    positions = [*range(400), 10**7, 10**12 + 5]
    assert mixture.locate(positions).tolist() == order.locate(positions).tolist()


def test_sources_of_one_size_are_not_in_step() -> None:
    mixture = Mixture([[200], [200]], 0, [1, 1])
    located = mixture.locate(range(400)).tolist()
    first, second = ([index for _, shard, index in located if shard == s] for s in (0, 1))
    assert sorted(first) == sorted(second) and first != second


def test_the_schedule_is_pinned() -> None:
    """A run under way would see other data if it changed."""
    mixture = Mixture([[5], [5], [5]], 0, [3, 1, 2])
    assert mixture.counts.tolist() == [5000, 1667, 3333]
    assert "".join("abc"[shard] for shard in mixture.locate(range(12))[:, 1]) == PINNED_SCHEDULE


PINNED_PERMUTATION = [2, 6, 7, 5, 4, 3, 0, 1]
PINNED_UNIFORMS = [0.813910240284, 0.752357396024]
PINNED_SCHEDULE = "acbacaacbaca"


@given(sizes, st.integers(1, 100))
def test_evenly_over_the_shards(sizes: list[int], count: int) -> None:
    """As many as were asked for, from the first to the last, at steps that differ by one at most; or all."""
    everything = [(shard, i) for shard, size in enumerate(sizes) for i in range(size)]
    places = [everything.index(place) for place in evenly(sizes, count)]
    assert len(places) == min(count, len(everything)) and places[0] == 0
    steps = {b - a for a, b in itertools.pairwise(places)}
    assert max(steps, default=0) - min(steps, default=0) <= 1
    if count > 1:
        assert places[-1] == len(everything) - 1


def test_evenly_over_nothing() -> None:
    assert evenly([], 5) == evenly([0, 0], 5) == []
