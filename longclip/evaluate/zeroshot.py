"""Zero-shot classification: images told apart by the texts that they are closest to, with no training.

A class is the mean of the unit features of its sentences (every template with every wording), of unit length again
(Radford et al. 2021, arXiv 2103.00020, section 3.1.4). An image counts as right where its own class's cosine is
strictly the highest; a tie with a wrong class is a miss, as in ranking.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from longclip.data.decode import square, square_of
from longclip.errors import UserError
from longclip.evaluate import metrics
from longclip.evaluate.classes import Classification
from longclip.evaluate.embed import Embedder
from longclip.evaluate.readers import Labelled
from longclip.run.evaluations import Scored

CONVENTION = "ties = misses"
SCALE = 100.0
"""of cosines, where the AUC of one class against the rest wants its share among all: CLIP's largest, which open_clip's
and CLIP_benchmark's zero-shot classifiers use for every model"""
CELLS = 2**24
"""scores computed at a time: 128 MiB in fp64"""
QUESTIONS = 1024
"""images whose own candidates are embedded together"""
NAMED = 20
"""images that a record names among those left out"""

Arrays = dict[str, NDArray[Any]]


def classify(embedder: Embedder, task: Classification, found: Labelled) -> Scored:
    """Metrics, and what came of each image, in the dataset's order; the same on any number of ranks.

    Arrays: ``correct`` [N] int8 (1, 0, or -1 for an image that could not be read), ``label`` and ``predicted`` [N]
    int32. With several labels instead ``scores`` [N, L] fp32 (NaN where unread) and ``label`` [N, L] int8.

    Collective. Raises UserError where no image can be read; broken ones are left out, counted and named.
    """
    why: dict[int, str] = {}

    def picture(i: int) -> NDArray[np.uint8]:
        try:
            data = found.image(i)
            form = embedder.pixels
            return square(data, form, None) if isinstance(data, bytes) else square_of(data, form)
        except ValueError as error:
            why[i] = str(error)
            raise

    image_ND, usable_N = embedder.images(len(found), picture)
    ranks = embedder.ranks
    broken = {i: said for part in ([why] if ranks.size == 1 else ranks.gather(why)) for i, said in part.items()}
    left_out = [*found.left_out, *(f"{found.keys[i]}: {broken[i]}" for i in sorted(broken))]
    if not bool(usable_N.any()):
        raise UserError(f"none of the {len(found)} images can be read; {left_out[-1]}")
    usable = usable_N.numpy()
    if found.candidates is not None:
        scores, arrays = _own_candidates(embedder, task, found, image_ND, usable)
    elif task.multi_label:
        scores, arrays = _several_labels(embedder, task, found, image_ND, usable)
    else:
        scores, arrays = _one_of_the_classes(embedder, task, found, image_ND, usable)
    facts = {
        "kind": "classification",
        "data": found.hash,
        "images": int(usable.sum()),
        "left_out": len(left_out),
        "left_out_named": left_out[:NAMED],
        "convention": CONVENTION,
        "metrics": scores,
    }
    return Scored(facts, arrays)


def _one_of_the_classes(
    embedder: Embedder, task: Classification, found: Labelled, image_ND: Tensor, usable: NDArray[np.bool_]
) -> tuple[dict[str, float], Arrays]:
    text_CD = class_features(embedder, list(task.classes.values()), task.templates)
    scores_NC = cosines(image_ND, text_CD)
    predicted = metrics.predicted(found.labels, scores_NC)
    shares_NC = _log_odds(scores_NC[usable])
    return metrics.single_label(found.labels[usable], predicted[usable], shares_NC), _told(found, predicted, usable)


def _several_labels(
    embedder: Embedder, task: Classification, found: Labelled, image_ND: Tensor, usable: NDArray[np.bool_]
) -> tuple[dict[str, float], Arrays]:
    wordings = list(task.classes.values())
    scores_NL = cosines(image_ND, class_features(embedder, wordings, task.templates))
    if task.negative:
        scores_NL = scores_NL - cosines(image_ND, class_features(embedder, wordings, task.negative))
    scores_NL[~usable] = np.nan
    present_NL = found.labels.astype(bool)
    scores = metrics.multi_label(present_NL[usable], scores_NL[usable], list(task.classes))
    return scores, {"scores": scores_NL, "label": found.labels.astype(np.int8)}


def _own_candidates(
    embedder: Embedder, task: Classification, found: Labelled, image_ND: Tensor, usable: NDArray[np.bool_]
) -> tuple[dict[str, float], Arrays]:
    candidates = found.candidates or ()
    predicted = np.zeros(len(found), dtype=np.int64)
    for start in range(0, len(found), QUESTIONS):
        span = range(start, min(start + QUESTIONS, len(found)))
        places = {text: k for k, text in enumerate(dict.fromkeys(t for i in span for t in candidates[i]))}
        text_KD = class_features(embedder, [(text,) for text in places], task.templates)
        scores_bK = cosines(image_ND[start : span.stop], text_KD)
        for i in span:
            own_1C = scores_bK[i - start, [places[text] for text in candidates[i]]][None]
            predicted[i] = metrics.predicted(found.labels[i : i + 1], own_1C)[0]
    right = (predicted == found.labels)[usable]
    return {"accuracy": float(right.mean())}, _told(found, predicted, usable)


def _told(found: Labelled, predicted_N: NDArray[np.int64], usable: NDArray[np.bool_]) -> Arrays:
    return {
        "correct": np.where(usable, predicted_N == found.labels, -1).astype(np.int8),
        "label": found.labels.astype(np.int32),
        "predicted": np.where(usable, predicted_N, -1).astype(np.int32),
    }


def class_features(embedder: Embedder, wordings: Sequence[Sequence[str]], templates: Sequence[str]) -> Tensor:
    """One unit feature for each class, [C, D]: the mean over its wordings in all templates, normalised. Collective."""
    prompts = [template.replace("{}", word) for words in wordings for word in words for template in templates]
    text_TD = embedder.texts(prompts)
    counts = torch.tensor([len(words) * len(templates) for words in wordings])
    class_T = torch.repeat_interleave(torch.arange(len(wordings)), counts)
    sums_CD = torch.zeros(len(wordings), text_TD.shape[1]).index_add_(0, class_T, text_TD)
    return F.normalize(sums_CD / counts[:, None], dim=-1)


def cosines(image_ND: Tensor, text_CD: Tensor) -> NDArray[np.float32]:
    """Scores [N, C], a block of images at a time.

    Computed in fp64 and rounded to fp32, so that equal texts tie: in fp32 the last bit depends on where in the matrix a
    column stands.
    """
    scores = np.empty((len(image_ND), len(text_CD)), dtype=np.float32)
    rows, text_DC = max(1, CELLS // max(1, len(text_CD))), text_CD.double().T
    for start in range(0, len(image_ND), rows):
        scores[start : start + rows] = (image_ND[start : start + rows].double() @ text_DC).float().numpy()
    return scores


def _log_odds(scores_NC: NDArray[np.float32]) -> NDArray[np.float64]:
    """log(p / (1 - p)) of p = softmax(SCALE x cosine): the order of the shares p, without their rounding to 0 and 1."""
    odds_NC = np.empty(scores_NC.shape)
    rows = max(1, CELLS // scores_NC.shape[1])
    for start in range(0, len(scores_NC), rows):
        scores_bC = scores_NC[start : start + rows].astype(np.float64)
        best_b1 = scores_bC.max(axis=1, keepdims=True)
        best_bC = scores_bC == best_b1
        # Of differences, so that images of which no class is told apart have the same odds to the last bit.
        logs_bC = SCALE * (scores_bC - best_b1)
        shares_bC = np.exp(logs_bC)
        # Those of the best, 1 each, are counted apart: beside them what the others have would lose its digits.
        others_b1 = np.where(best_bC, 0.0, shares_bC).sum(axis=1, keepdims=True)
        ties_b1 = best_bC.sum(axis=1, keepdims=True)
        rest_bC = np.where(best_bC, (ties_b1 - 1) + others_b1, ties_b1 + (others_b1 - shares_bC))
        with np.errstate(divide="ignore"):  # of a single class
            odds_NC[start : start + rows] = logs_bC - np.log(rest_bC)
    return odds_NC
