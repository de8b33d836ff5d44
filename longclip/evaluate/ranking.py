"""The rank of each query's match in a gallery, exact, in bounded memory, by a stated convention.

Published Recall@K figures follow different conventions, which tell models apart that others hold equal:

- ``strict``, the default: a tie with a wrong candidate is a miss, and so is a score that is not a number. A collapsed
  model, whose scores are all equal, gets 0 and not the 100 % that breaking ties by index could give it.
- ``open_clip`` (its ``get_clip_metrics``): only an image's first caption counts, and ties go to the lower index.
- ``clip_benchmark`` (its ``recall_at_k``): a hit if any caption of an image is among the first K; ties by index.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from longclip.evaluate.conventions import Convention
from longclip.train.ranks import Ranks

KS = (1, 5, 10)
CELLS = 2**26
"""scores held at a time: 256 MiB"""
EXACT = 2**24
"""up to here fp32 counts exactly"""


def match_table(image_of_caption: Tensor, images: int) -> Tensor:
    """For each image the places of its captions, [images, most captions of one] int64, filled up with -1.

    Raises ValueError for an image without a caption.
    """
    counts = torch.bincount(image_of_caption, minlength=images)
    if len(counts) > images or not bool((counts > 0).all()):
        raise ValueError("every image has a caption, and every caption an image of the gallery")
    order = torch.argsort(image_of_caption, stable=True)
    column = torch.arange(len(order)) - torch.repeat_interleave(torch.cumsum(counts, 0) - counts, counts)
    table = torch.full((images, int(counts.max())), -1)
    table[image_of_caption[order], column] = order
    return table


def ranks_of(
    queries_QD: Tensor,
    gallery_GD: Tensor,
    matches_QC: Tensor,
    ranks: Ranks,
    convention: Convention = "strict",
    alive: Callable[[], None] = lambda: None,
) -> NDArray[np.int32]:
    """How many wrong candidates come before each query's best match, [Q]; 0 is a hit at 1. Collective.

    ``matches_QC`` holds the places in the gallery that are right for a query, -1 where there are fewer: at least one a
    query. The other matches of a query are never counted against it.

    All ranks hold all of it, on the CPU. Blocks of queries, the same on any number of ranks, are dealt to them in turn;
    ``alive`` is called after each turn.
    """
    rows = max(1, min(len(queries_QD), CELLS // max(1, len(gallery_GD))))
    blocks = list(zip(torch.split(queries_QD, rows), torch.split(matches_QC, rows), strict=True))
    gallery_GD = gallery_GD.to(ranks.device)
    scores_buffer = torch.empty(rows, len(gallery_GD), device=ranks.device)
    count = _misses if convention == "strict" else _before
    mine = []
    for turn in range(0, len(blocks), ranks.size):
        if turn + ranks.rank < len(blocks):
            queries_bD, matches_bC = (part.to(ranks.device) for part in blocks[turn + ranks.rank])
            scores_bG = torch.matmul(queries_bD, gallery_GD.T, out=scores_buffer[: len(queries_bD)])
            mine.append(count(scores_bG, matches_bC.clamp(min=0), matches_bC < 0).cpu())
        alive()
    parts = ranks.gather(mine)
    return torch.cat([parts[i % ranks.size][i // ranks.size] for i in range(len(blocks))]).numpy().astype(np.int32)


def _misses(scores_bG: Tensor, places_bC: Tensor, absent_bC: Tensor) -> Tensor:
    """Wrong candidates that score at least as high as the best match; not a number counts against the query.

    The scores are used up.
    """
    # Taken from the same product as all others: computed apart, the last bit of a tie could differ.
    own_bC = scores_bG.gather(1, places_bC)
    best_b1 = own_bC.masked_fill(absent_bC | own_bC.isnan(), -torch.inf).amax(dim=1, keepdim=True)
    # In place, as 0.0 and 1.0 (0.0 for NaN on either side): counting bools takes several times as long.
    lower = sum(part.sum(dim=1).long() for part in torch.split(scores_bG.lt_(best_b1), EXACT, dim=1))
    rights_b1 = (~(own_bC < best_b1) & ~absent_bC).sum(dim=1)
    return scores_bG.shape[1] - lower - rights_b1


def _before(scores_bG: Tensor, places_bC: Tensor, absent_bC: Tensor) -> Tensor:
    """Candidates that a stable descending sort (NaN first, as torch's) puts before the first of the matches."""
    scores_bG.masked_fill_(scores_bG.isnan(), torch.inf)
    own_bC = scores_bG.gather(1, places_bC).masked_fill(absent_bC, -torch.inf)
    best_b1 = own_bC.amax(dim=1, keepdim=True)
    last = scores_bG.shape[1]
    first_b1 = places_bC.masked_fill(absent_bC | (own_bC < best_b1), last).amin(dim=1, keepdim=True)
    higher = (scores_bG > best_b1).count_nonzero(dim=1)
    index_G = torch.arange(last, device=scores_bG.device)
    return higher + ((scores_bG == best_b1) & (index_G < first_b1)).count_nonzero(dim=1)


def both_ways(
    image_ID: Tensor,
    text_TD: Tensor,
    ranks: Ranks,
    image_of_caption: Tensor | None = None,
    convention: Convention = "strict",
    alive: Callable[[], None] = lambda: None,
) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Ranks of images among captions, [I], and of captions among images, [T]. Without ``image_of_caption`` caption i
    belongs to image i. Collective; as :func:`ranks_of`."""
    owner_T = torch.arange(len(text_TD)) if image_of_caption is None else image_of_caption
    table = match_table(owner_T, len(image_ID)) if len(image_ID) else torch.zeros(0, 1, dtype=torch.long)
    if convention == "open_clip":
        firsts = table[:, 0]
        text_TD, owner_T, table = text_TD[firsts], torch.arange(len(firsts)), torch.arange(len(firsts))[:, None]
    i2t = ranks_of(image_ID, text_TD, table, ranks, convention, alive)
    return i2t, ranks_of(text_TD, image_ID, owner_T[:, None], ranks, convention, alive)


def summary(ranks_N: Tensor | NDArray[np.integer], direction: str) -> dict[str, float]:
    """``{"i2t_recall_at_1": share in [0, 1], ..., "i2t_median_rank": 1 is first, "i2t_mean_rank": ...}``"""
    ranks = np.asarray(ranks_N, dtype=np.float64)
    found = {f"{direction}_recall_at_{k}": float((ranks < k).mean()) for k in KS}
    return {
        **found,
        f"{direction}_median_rank": float(np.median(ranks)) + 1,
        f"{direction}_mean_rank": float(ranks.mean()) + 1,
    }


def retrieval(i2t_I: Tensor | NDArray[np.integer], t2i_T: Tensor | NDArray[np.integer]) -> dict[str, float]:
    """The summaries both ways, and the mean of the two Recall@1."""
    scores = {**summary(i2t_I, "i2t"), **summary(t2i_T, "t2i")}
    return {**scores, "mean_recall_at_1": (scores["i2t_recall_at_1"] + scores["t2i_recall_at_1"]) / 2}
