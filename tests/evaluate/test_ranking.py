"""Ranks against brute force in float64, and the conventions of others against their definitions, written out again."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from longclip.evaluate import ranking
from longclip.evaluate.conventions import CONVENTIONS
from longclip.evaluate.ranking import both_ways, match_table, ranks_of, retrieval
from longclip.train.ranks import Ranks
from tests.forked import fork_ranks

ALONE = Ranks(0, 1, 0, torch.device("cpu"))


@st.composite
def galleries(draw: st.DrawFn, most: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    """Images, captions, and whose caption each is. Of small integers: scores are exact, so that planted ties are."""
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    images = draw(st.integers(1, 30))
    owners = np.concatenate([np.arange(images), random.integers(0, images, draw(st.integers(0, most - 1)) * images)])
    random.shuffle(owners)
    image, text = (random.integers(-2, 3, (n, 5)).astype(np.float32) for n in (images, len(owners)))
    for side in (image, text):
        side[random.integers(len(side))] = side[random.integers(len(side))]
        if draw(st.booleans()):
            side[random.integers(len(side))] = np.nan
    return torch.from_numpy(image), torch.from_numpy(text), torch.from_numpy(owners)


def brute_force(queries: Tensor, gallery: Tensor, right: list[set[int]]) -> list[int]:
    """By definition: wrong candidates that score at least as high as the best match, or are not a number."""
    ranks = []
    for query, matches in zip(queries.double(), right, strict=True):
        scores = [float((query * other).sum()) for other in gallery.double()]
        own = max((scores[j] for j in matches if scores[j] == scores[j]), default=-np.inf)
        ranks.append(sum(1 for j, s in enumerate(scores) if j not in matches and not s < own))
    return ranks


@settings(max_examples=150, deadline=None)
@given(galleries(), st.integers(1, 2000))
def test_equals_brute_force(made: tuple[Tensor, Tensor, Tensor], cells: int) -> None:
    images, texts, owners = made
    captions = [{t for t, o in enumerate(owners.tolist()) if o == i} for i in range(len(images))]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ranking, "CELLS", cells)  # blocks of one row or of many, the last one short
        i2t, t2i = both_ways(images, texts, ALONE, owners)
    assert i2t.tolist() == brute_force(images, texts, captions)
    assert t2i.tolist() == brute_force(texts, images, [{o} for o in owners.tolist()])


@settings(max_examples=60, deadline=None)
@given(galleries())
def test_open_clip_s_convention(made: tuple[Tensor, Tensor, Tensor]) -> None:
    """One caption an image; where its own is found in the list sorted by score, what ties in order of index."""
    images, texts, owners = made
    found = both_ways(images, texts, ALONE, owners, "open_clip")
    texts = texts[[owners.tolist().index(i) for i in range(len(images))]]
    for queries, gallery, ranks in ((images, texts, found[0]), (texts, images, found[1])):
        ranking_QG = torch.sort(queries @ gallery.T, dim=1, descending=True, stable=True).indices
        places = torch.where(ranking_QG == torch.arange(len(queries))[:, None])[1]
        assert ranks.tolist() == places.tolist()


@settings(max_examples=60, deadline=None)
@given(galleries(), st.sampled_from((1, 2, 5)))
def test_clip_benchmark_s_convention(made: tuple[Tensor, Tensor, Tensor], k: int) -> None:
    """A hit where any of the first k is right."""
    images, texts, owners = made
    right_IT = owners[None] == torch.arange(len(images))[:, None]
    found = both_ways(images, texts, ALONE, owners, "clip_benchmark")
    for scores, right, ranks in ((images @ texts.T, right_IT, found[0]), (texts @ images.T, right_IT.T, found[1])):
        first = torch.sort(scores, dim=1, descending=True, stable=True).indices[:, :k]
        assert (ranks < k).tolist() == right.gather(1, first).any(dim=1).tolist()


def test_without_ties_all_conventions_agree() -> None:
    random = torch.Generator().manual_seed(0)
    images, texts = (torch.randn(50, 8, generator=random) for _ in range(2))
    for convention in CONVENTIONS:
        for a, b in zip(
            both_ways(images, texts, ALONE), both_ways(images, texts, ALONE, None, convention), strict=True
        ):
            assert a.tolist() == b.tolist()


def test_a_gallery_beyond_what_fp32_counts_is_counted_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    random = torch.Generator().manual_seed(0)
    images, texts = (torch.randn(50, 8, generator=random) for _ in range(2))
    whole = both_ways(images, texts, ALONE)
    monkeypatch.setattr(ranking, "EXACT", 7)
    assert all(np.array_equal(a, b) for a, b in zip(both_ways(images, texts, ALONE), whole, strict=True))


@pytest.mark.parametrize("size", [2, 3])
def test_blocks_are_dealt_to_the_ranks(size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each rank computes its share, all have all of the result, and each turn is a sign of life."""
    monkeypatch.setattr(ranking, "CELLS", 5 * 50)  # ten blocks each way
    random = torch.Generator().manual_seed(0)
    images, texts = (torch.randint(-2, 3, (50, 4), generator=random).float() for _ in range(2))
    torch.set_num_threads(1)  # a forked process has none of this one's
    expected, beats, blocks = both_ways(images, texts, ALONE), [], []
    count = ranking._misses
    monkeypatch.setattr(ranking, "_misses", lambda *args: blocks.append(len(args[0])) or count(*args))

    def check(me: Ranks) -> None:
        found = both_ways(images, texts, me, alive=lambda: beats.append(me.rank))
        assert all(np.array_equal(a, b) for a, b in zip(found, expected, strict=True))
        turns = -(-10 // size)
        assert len(beats) == 2 * turns
        assert blocks == [5] * 2 * len(range(me.rank, 10, size))

    assert fork_ranks(tmp_path / "meeting", ["a"] * size, check) == [0] * size


def test_a_collapsed_model_gets_nothing() -> None:
    same = torch.ones(10, 4)
    scores = retrieval(*both_ways(same, same, ALONE))
    assert scores["mean_recall_at_1"] == 0.0
    assert scores["t2i_recall_at_10"] == 1.0  # nine others tie: within the first ten anyhow
    assert scores["i2t_median_rank"] == 10.0
    assert (
        retrieval(*both_ways(same, same, ALONE, None, "open_clip"))["mean_recall_at_1"] == 0.1
    )  # what ties by index would say


def test_a_perfect_model_gets_all() -> None:
    eye = torch.eye(12)
    assert set(retrieval(*both_ways(eye, eye, ALONE)).values()) == {1.0}


def test_an_image_without_a_caption_is_refused() -> None:
    with pytest.raises(ValueError, match="every image has a caption"):
        match_table(torch.tensor([0, 0, 2]), 3)
    with pytest.raises(ValueError, match="every caption an image"):
        match_table(torch.tensor([0, 1, 5]), 3)


def test_no_queries_at_all() -> None:
    assert ranks_of(torch.zeros(0, 4), torch.zeros(3, 4), torch.zeros(0, 1, dtype=torch.long), ALONE).tolist() == []
