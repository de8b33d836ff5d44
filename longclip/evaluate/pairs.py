"""A retrieval task of a suite: one gallery, one model, at its own window and at others, whole and probed."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from longclip.data.decode import square
from longclip.data.loader import patiently
from longclip.data.tokens import waste
from longclip.errors import UserError
from longclip.evaluate import probe
from longclip.evaluate.conventions import Convention
from longclip.evaluate.embed import Embedder
from longclip.evaluate.gallery import Gallery, Shards
from longclip.evaluate.ranking import both_ways, retrieval
from longclip.evaluate.suite import Retrieval
from longclip.run.evaluations import Scored

Ranks = NDArray[np.int32]


@dataclass(frozen=True)
class Pairs:
    """What can be used of a gallery."""

    image_ID: Tensor
    texts: list[str]
    owner_T: Tensor
    """whose caption each text is"""
    unreadable: int
    """images that cannot be decoded, or have no caption"""


def retrieve(embedder: Embedder, task: Retrieval, gallery: Gallery) -> Scored:
    """Scores the model on a gallery. Collective.

    Raises UserError where nothing in it can be used.
    """
    pairs = read_pairs(embedder, gallery)
    if not pairs.texts:
        raise UserError(f"none of {len(gallery):,} images can be used: not decoded, or without a caption")
    own = embedder.context_length
    lengths_T = np.array(embedder.lengths(pairs.texts), dtype=np.int32)
    # The captions that are queries, and whose they are.
    asked = _queries(pairs.owner_T, task.convention)
    tokens = lengths_T[asked]
    also = [int(window) for window in task.windows if window != "own"]
    skipped = {f"w{w}": f"the text tower has {embedder.reach} positions" for w in also if w > embedder.reach}
    kept = probe.kept(own) if "kept" in task.probes else []
    metrics: dict[str, float] = {}
    arrays: dict[str, NDArray[np.int32]] = {"tokens": tokens}

    def ranks(text_TD: Tensor) -> tuple[Ranks, Ranks]:
        return both_ways(pairs.image_ID, text_TD, embedder.ranks, pairs.owner_T, task.convention, embedder.alive)

    for window in sorted({own, *also, *kept} - {w for w in also if w > embedder.reach}):
        text_TD = embedder.texts(pairs.texts, window)
        i2t, t2i = ranks(text_TD)
        wasted = {"waste": waste(lengths_T.tolist(), window)}
        if window == own:
            metrics |= {**retrieval(i2t, t2i), **wasted, **probe.shape(pairs.image_ID, text_TD)}
            metrics |= _strata(task.strata, i2t, t2i, tokens, pairs.owner_T[asked].numpy())
            arrays |= {"i2t": i2t, "t2i": t2i}
        if window in also:
            metrics |= _under(f"w{window}", {**retrieval(i2t, t2i), **wasted})
            arrays |= {f"w{window}/i2t": i2t, f"w{window}/t2i": t2i}
        if window in kept:
            metrics |= _under(f"kept{window}", _at_1(i2t, t2i))
    if "shuffled" in task.probes:
        mixed = [probe.shuffled(text, i) for i, text in enumerate(pairs.texts)]
        metrics |= _under("shuffled", _at_1(*ranks(embedder.texts(mixed))))
    if "first" in task.probes:
        metrics |= _under("first", _at_1(*ranks(embedder.texts([probe.first(text) for text in pairs.texts]))))
    facts = {
        "kind": task.kind,
        "data": gallery.hash,
        # The hash of shards is that of their content whole: which text of it the captions were, it does not say.
        **({"text": gallery.text.long} if isinstance(gallery, Shards) else {}),
        "images": len(pairs.image_ID),
        "captions": len(pairs.texts),
        "pairs": len(asked),
        "unreadable": pairs.unreadable,
        "convention": task.convention,
        "metrics": metrics,
        "skipped": skipped,
    }
    return Scored(facts, dict(arrays))


def read_pairs(embedder: Embedder, gallery: Gallery) -> Pairs:
    """Features of the images, and all captions; each image is read on one rank. Collective."""
    mine: dict[int, list[str]] = {}

    def picture(i: int) -> NDArray[np.uint8]:
        image, captions = patiently(lambda: gallery.read(i))
        pixels = square(image, embedder.pixels, None)
        mine[i] = captions
        return pixels

    image_ID, usable = embedder.images(len(gallery), picture)
    captions = {i: texts for part in embedder.ranks.gather(mine) for i, texts in part.items()}
    use = usable.nonzero()[:, 0].tolist()
    owner = torch.tensor([place for place, i in enumerate(use) for _ in captions[i]], dtype=torch.long)
    return Pairs(image_ID[use], [t for i in use for t in captions[i]], owner, len(gallery) - len(use))


def _queries(owner_T: Tensor, convention: Convention) -> NDArray[np.int64]:
    """Places of the captions that are queries: open_clip knows an image's first only."""
    if convention != "open_clip":
        return np.arange(len(owner_T))
    return np.unique(owner_T.numpy(), return_index=True)[1]


def _strata(
    bounds: tuple[int, ...], i2t: Ranks, t2i: Ranks, tokens: NDArray[np.int32], owner: NDArray[np.int64]
) -> dict[str, float]:
    """The same scores of the queries whose captions have so many tokens, among the whole gallery.

    ``len77-154`` is more than 77 and up to 154. An image belongs where its longest caption does. Of an empty stratum
    there is its size and nothing else.
    """
    if not bounds:
        return {}
    longest = np.zeros(len(i2t), dtype=np.int32)
    np.maximum.at(longest, owner, tokens)
    found: dict[str, float] = {}
    for low, high in zip((0, *bounds), (*bounds, None), strict=True):
        image, text = ((n > low) & (n <= high) if high else n > low for n in (longest, tokens))
        name = f"len{low}-{high}" if high else f"len{low}-"
        found[f"{name}/pairs"] = float(text.sum())
        if text.any() and image.any():
            found |= _under(name, retrieval(i2t[image], t2i[text]))
    return found


def _at_1(i2t: Ranks, t2i: Ranks) -> dict[str, float]:
    scores = retrieval(i2t, t2i)
    return {f"{side}_recall_at_1": scores[f"{side}_recall_at_1"] for side in ("i2t", "t2i", "mean")}


def _under(name: str, scores: dict[str, float]) -> dict[str, float]:
    return {f"{name}/{key}": value for key, value in scores.items()}
