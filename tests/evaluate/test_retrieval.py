"""Recall@K against brute force in float64, with ties, duplicates and NaN."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from longclip.evaluate import retrieval as module
from longclip.evaluate.retrieval import ranks_of_matches, retrieval


def brute_force(queries: torch.Tensor, gallery: torch.Tensor) -> list[int]:
    """Rank of each match by definition: others that score at least as high, or whose score is not a number."""
    ranks = []
    for i, query in enumerate(queries.double()):
        scores = [float((query * other).sum()) for other in gallery.double()]
        ranks.append(sum(1 for j, s in enumerate(scores) if j != i and not s < scores[i]))
    return ranks


@pytest.mark.parametrize("seed", range(5))
def test_equals_brute_force(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHUNK", 7)  # several chunks, the last one short
    random = np.random.default_rng(seed)
    # Small integers: scores are exact in fp32, so planted ties are ties.
    images = torch.from_numpy(random.integers(-2, 3, (40, 6)).astype(np.float32))
    texts = torch.from_numpy(random.integers(-2, 3, (40, 6)).astype(np.float32))
    texts[3] = texts[4]
    images[10] = images[11]
    texts[20] = float("nan")
    assert ranks_of_matches(images, texts).tolist() == brute_force(images, texts)
    assert ranks_of_matches(texts, images).tolist() == brute_force(texts, images)
    assert ranks_of_matches(texts, images, [5, 39, 0]).tolist() == [brute_force(texts, images)[i] for i in (5, 39, 0)]


def test_a_collapsed_model_gets_nothing() -> None:
    same = torch.ones(10, 4)
    assert retrieval(same, same)["mean_recall_at_1"] == 0.0
    assert retrieval(same, same)["t2i_recall_at_10"] == 1.0  # nine others tie: within the first ten anyhow


def test_a_perfect_model_gets_all() -> None:
    eye = torch.eye(12)
    assert set(retrieval(eye, eye).values()) == {1.0}
