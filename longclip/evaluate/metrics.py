"""What a classifier's predictions and scores are worth. Plain numpy, exact with ties.

Classes are counted from 0; ``C`` of them, ``L`` labels where an image may have several, ``N`` images. A share that is
not defined, as an AUC where all images are positive, is NaN: whoever averages leaves it out, and says so here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.integer[Any]]
Floats = NDArray[np.floating[Any]]


def confusion(labels_N: Ints, predicted_N: Ints, classes: int) -> NDArray[np.int64]:
    """How many images of class r were taken for class c, [C, C] at (r, c)."""
    cells = np.asarray(labels_N, dtype=np.int64) * classes + np.asarray(predicted_N, dtype=np.int64)
    return np.bincount(cells, minlength=classes * classes).reshape(classes, classes).astype(np.int64)


def predicted(labels_N: Ints, scores_NC: Floats) -> NDArray[np.int64]:
    """The class that scores highest, [N]; where a wrong one scores as high as the right one, or is not a number, or the
    right one is not, a wrong one: guessing by index would flatter a model whose scores are all equal."""
    labels, rows = np.asarray(labels_N, dtype=np.int64), np.arange(len(labels_N))
    wrong_NC = np.where(np.isnan(scores_NC), np.inf, scores_NC)
    wrong_NC[rows, labels] = -np.inf
    own_N, best_N = np.asarray(scores_NC)[rows, labels], wrong_NC.argmax(axis=1)
    return np.where(own_N > wrong_NC[rows, best_N], labels, best_N)


def accuracy(table_CC: Ints) -> float:
    """Share of images taken for what they are, from their :func:`confusion`; NaN of no images."""
    return _share(int(np.trace(table_CC)), int(table_CC.sum()))


def balanced_accuracy(table_CC: Ints) -> float:
    """Mean over classes of the share of their images that are found. A class without images has no part in it."""
    images_C = table_CC.sum(axis=1)
    there = images_C > 0
    return float((np.diag(table_CC)[there] / images_C[there]).mean()) if there.any() else float("nan")


def macro_f1(table_CC: Ints) -> float:
    """Mean over classes of F1 = 2 TP / (2 TP + FP + FN).

    A class that neither has images nor is ever predicted has no part in it; one without images that is predicted, or
    with images that is never predicted, counts 0.
    """
    both_C = table_CC.sum(axis=0) + table_CC.sum(axis=1)
    there = both_C > 0
    return float((2 * np.diag(table_CC)[there] / both_C[there]).mean()) if there.any() else float("nan")


def auc(positive_N: NDArray[np.bool_], scores_N: Floats) -> float:
    """How often a positive image scores above a negative one, a tie counting one half: the area under the ROC curve.

    By midranks (Mann and Whitney). A score that is not a number loses against every other image of the other kind.
    NaN where all images are positive, or none.
    """
    positive = np.asarray(positive_N, dtype=bool)
    p, n = int(positive.sum()), int((~positive).sum())
    if not p or not n:
        return float("nan")
    ranks = midranks(_nan_is_wrong(positive, scores_N))
    return float((ranks[positive].sum() - p * (p + 1) / 2) / (p * n))


def midranks(scores_N: Floats) -> NDArray[np.float64]:
    """Ranks from 1 for the lowest, equal scores sharing the mean of theirs."""
    _, group, counts = np.unique(scores_N, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    return np.asarray((ends - (counts - 1) / 2)[group], dtype=np.float64)


def auc_one_vs_rest(labels_N: Ints, scores_NC: Floats) -> float:
    """Mean over classes of the AUC of their images against all others, by the class's score; of two classes their AUC.

    A class without images, or with all of them, has no part in it. NaN where that leaves none.
    """
    return _mean([auc(np.asarray(labels_N) == c, scores_NC[:, c]) for c in range(scores_NC.shape[1])])


def average_precision(positive_N: NDArray[np.bool_], scores_N: Floats) -> float:
    """Sum over the scores that occur, high to low, of the recall that each adds times the precision down to it.

    Images that tie come in together, so their order does not matter. A score that is not a number is the worst
    possible one. NaN where all images are positive, or none.
    """
    positive = np.asarray(positive_N, dtype=bool)
    if positive.all() or not positive.any():
        return float("nan")
    scores = _nan_is_wrong(positive, scores_N)
    order = np.argsort(-scores, kind="stable")
    down = scores[order]
    last_of_tie = np.append(np.flatnonzero(down[1:] != down[:-1]), len(down) - 1)
    found = np.cumsum(positive[order])[last_of_tie]
    precision = found / (last_of_tie + 1)
    return float((np.diff(found, prepend=0) * precision).sum() / positive.sum())


def multi_label(present_NL: NDArray[np.bool_], scores_NL: Floats, names: Sequence[str]) -> dict[str, float]:
    """``auc`` and ``mean_average_precision``, means over the labels that some images have and some have not, and
    ``auc/<name>`` of each of these. A label that all images have, or none, is in neither. Nothing where that leaves
    none."""
    aucs = {name: auc(present_NL[:, i], scores_NL[:, i]) for i, name in enumerate(names)}
    precisions = [average_precision(present_NL[:, i], scores_NL[:, i]) for i in range(len(names))]
    found = {"auc": _mean(list(aucs.values())), "mean_average_precision": _mean(precisions)}
    return defined({**found, **{f"auc/{name}": value for name, value in aucs.items()}})


def single_label(labels_N: Ints, predicted_N: Ints, scores_NC: Floats) -> dict[str, float]:
    """``accuracy``, ``balanced_accuracy``, ``macro_f1`` and ``auc`` (one against the rest), those that are defined."""
    table = confusion(labels_N, predicted_N, scores_NC.shape[1])
    return defined(
        {
            "accuracy": accuracy(table),
            "balanced_accuracy": balanced_accuracy(table),
            "macro_f1": macro_f1(table),
            "auc": auc_one_vs_rest(labels_N, scores_NC),
        }
    )


def defined(metrics: dict[str, float]) -> dict[str, float]:
    """Without those that are NaN: a record says nothing about what is not defined."""
    return {name: value for name, value in metrics.items() if value == value}


def _nan_is_wrong(positive_N: NDArray[np.bool_], scores_N: Floats) -> NDArray[np.float64]:
    scores = np.asarray(scores_N, dtype=np.float64)
    return np.where(np.isnan(scores), np.where(positive_N, -np.inf, np.inf), scores)


def _mean(values: Sequence[float]) -> float:
    there = [value for value in values if value == value]
    return float(np.mean(there)) if there else float("nan")


def _share(part: int, whole: int) -> float:
    return part / whole if whole else float("nan")
