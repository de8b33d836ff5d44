"""Metrics against their definitions, written out again over pairs and classes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from longclip.evaluate import metrics

SCORES = st.sampled_from([-1.0, -0.5, 0.0, 0.25, 0.25000003, 1.0, float("nan")])
"""few values, so that most scores tie"""


def pairs_auc(positive: list[bool], scores: list[float]) -> float:
    """Over all pairs of a positive and a negative: won 1, drawn 1/2, lost or not a number 0."""
    won = [
        1.0 if p > n else 0.5 if p == n else 0.0
        for yes, p in zip(positive, scores, strict=True)
        for no, n in zip(positive, scores, strict=True)
        if yes and not no
    ]
    return sum(won) / len(won) if won else float("nan")


def mean_of_precisions(positive: list[bool], scores: list[float]) -> float:
    """Average precision: over the positives, the precision among all that score at least as high."""
    worst = [(-np.inf if yes else np.inf) if s != s else s for yes, s in zip(positive, scores, strict=True)]
    found = []
    for yes, threshold in zip(positive, worst, strict=True):
        if yes:
            above = [y for y, s in zip(positive, worst, strict=True) if s >= threshold]
            found.append(sum(above) / len(above))
    return sum(found) / len(found) if found and len(found) < len(positive) else float("nan")


def same(found: float, expected: float) -> bool:
    return found == pytest.approx(expected, abs=1e-12, nan_ok=True)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(st.booleans(), SCORES), min_size=1, max_size=30))
def test_auc_and_average_precision(drawn: list[tuple[bool, float]]) -> None:
    positive, scores = [p for p, _ in drawn], [s for _, s in drawn]
    assert same(metrics.auc(np.array(positive), np.array(scores)), pairs_auc(positive, scores))
    assert same(metrics.average_precision(np.array(positive), np.array(scores)), mean_of_precisions(positive, scores))


@st.composite
def tables(draw: st.DrawFn) -> tuple[NDArray[Any], NDArray[Any]]:
    """Labels and scores of 1 to 20 images in 2 to 5 classes; some classes without images."""
    classes, count = draw(st.integers(2, 5)), draw(st.integers(1, 20))
    labels = draw(st.lists(st.integers(0, classes - 1), min_size=count, max_size=count))
    rows = st.lists(SCORES, min_size=classes, max_size=classes)
    return np.array(labels), np.array(draw(st.lists(rows, min_size=count, max_size=count)))


@settings(max_examples=200, deadline=None)
@given(tables())
def test_of_one_label(drawn: tuple[NDArray[Any], NDArray[Any]]) -> None:
    labels, scores = drawn
    classes = range(scores.shape[1])
    right = [
        all(row[own] > s for c, s in enumerate(row) if c != own)
        for own, row in zip(labels, scores.tolist(), strict=True)
    ]
    guess = metrics.predicted(labels, scores)
    assert (guess == labels).tolist() == right
    found = metrics.single_label(labels, guess, scores)
    assert same(found["accuracy"], sum(right) / len(right))
    recalls = [np.mean([r for r, own in zip(right, labels, strict=True) if own == c]) for c in classes if c in labels]
    assert same(found["balanced_accuracy"], float(np.mean(recalls)))
    f1s = []
    for c in classes:
        hits = sum(g == c == own for g, own in zip(guess, labels, strict=True))
        named, there = int((guess == c).sum()), int((labels == c).sum())
        if named or there:
            f1s.append(0.0 if not hits else 2 / (named / hits + there / hits))
    assert same(found["macro_f1"], float(np.mean(f1s)))
    aucs = [pairs_auc((labels == c).tolist(), scores[:, c].tolist()) for c in classes]
    defined = [a for a in aucs if a == a]
    assert same(found.get("auc", float("nan")), float(np.mean(defined)) if defined else float("nan"))


@settings(max_examples=60, deadline=None)
@given(tables(), st.integers(0, 2**32 - 1))
def test_of_several_labels(drawn: tuple[NDArray[Any], NDArray[Any]], seed: int) -> None:
    _, scores = drawn
    present = np.random.default_rng(seed).random(scores.shape) < 0.5
    names = [f"n{i}" for i in range(scores.shape[1])]
    found = metrics.multi_label(present, scores, names)
    aucs = {n: pairs_auc(present[:, i].tolist(), scores[:, i].tolist()) for i, n in enumerate(names)}
    mixed = {n: a for n, a in aucs.items() if a == a}
    assert {k for k in found if "/" in k} == {f"auc/{n}" for n in mixed}
    if not mixed:
        assert found == {}
        return
    assert same(found["auc"], float(np.mean(list(mixed.values()))))
    precisions = [mean_of_precisions(present[:, i].tolist(), scores[:, i].tolist()) for i in range(len(names))]
    assert same(found["mean_average_precision"], float(np.nanmean(precisions)))


def test_two_classes_have_one_auc() -> None:
    """Where their scores are each other's opposites, which shares of two are."""
    random = np.random.default_rng(0)
    labels, score = random.integers(0, 2, 50), random.integers(0, 6, 50).astype(float)
    both = metrics.auc_one_vs_rest(labels, np.stack([-score, score], axis=1))
    assert both == pytest.approx(pairs_auc((labels == 1).tolist(), score.tolist()))


def test_a_collapsed_model_gets_nothing_and_an_auc_of_chance() -> None:
    labels, scores = np.arange(12) % 3, np.full((12, 3), 0.7)
    found = metrics.single_label(labels, metrics.predicted(labels, scores), scores)
    assert found == {"accuracy": 0.0, "balanced_accuracy": 0.0, "macro_f1": 0.0, "auc": 0.5}


def test_of_100000_images_without_a_table_of_pairs() -> None:
    random = np.random.default_rng(1)
    scores = random.integers(0, 1000, 100_000).astype(float)
    positive = random.random(100_000) < scores / 2000
    wins = np.searchsorted(np.sort(scores[~positive]), scores[positive], "left")
    draws = np.searchsorted(np.sort(scores[~positive]), scores[positive], "right") - wins
    assert metrics.auc(positive, scores) == pytest.approx(
        float((wins + draws / 2).mean() / (~positive).sum()), abs=1e-13
    )
