"""Probes: is the tail of a caption really used, does its order matter, and is the model alive at all."""

from __future__ import annotations

from torch import Tensor

from longclip.data.order import permutation
from longclip.data.sentences import sentences
from longclip.evaluate.suite import KEPT


def kept(window: int) -> list[int]:
    """How many tokens of a caption are kept, special ones included: up to the model's own ``window``, and that."""
    return [*(k for k in KEPT if k < window), window]


def shuffled(text: str, i: int) -> str:
    """The sentences of caption ``i`` of a gallery in an order that is drawn for it, the same for every model."""
    parts = [text[start:end] for start, end in sentences(text)]
    return " ".join(parts[k] for k in permutation(len(parts), "evaluate", "sentences", i).tolist())


def first(text: str) -> str:
    """The first sentence alone."""
    parts = sentences(text)
    return text[slice(*parts[0])] if parts else text


def shape(image_ID: Tensor, text_TD: Tensor) -> dict[str, float]:
    """How two sets of unit features lie.

    ``modality_gap``: the distance of their means (Liang et al. 2022, arXiv 2203.02053), 0 to 2. ``image_spread`` and
    ``text_spread``: root mean square distance from the own mean, 0 for a collapsed model and 1 at most.
    """
    means = [side.double().mean(dim=0) for side in (image_ID, text_TD)]
    spreads = [
        float((side.double() - mean).square().sum(dim=1).mean().sqrt())
        for side, mean in zip((image_ID, text_TD), means, strict=True)
    ]
    return {
        "modality_gap": float((means[0] - means[1]).norm()),
        "image_spread": spreads[0],
        "text_spread": spreads[1],
    }
