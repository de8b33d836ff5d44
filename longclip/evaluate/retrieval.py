"""Recall@K between images and captions, exact, in bounded memory, ties counted as misses.

Convention: caption i belongs to image i and to no other. The rank of a query's match is the number of other
candidates that score at least as high: a tie is a miss, so a collapsed model, whose scores are all equal, gets 0 and
not the 100 % that breaking ties by index could give it. A score that is not a number is a miss too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from longclip.data.loader import Reader, evaluation_batches
from longclip.run.folder import read_json
from longclip.train.ranks import Ranks

KS = (1, 5, 10)
CHUNK = 2048
"""Queries scored at a time; memory is CHUNK x gallery x 4 bytes"""


def ranks_of_matches(queries_ND: Tensor, gallery_ND: Tensor, rows: Sequence[int] | None = None) -> Tensor:
    """For each query (or those of ``rows``) how many others score at least as high as its match; [N] int64."""
    places = torch.arange(len(queries_ND)) if rows is None else torch.as_tensor(rows, dtype=torch.long)
    results = []
    for chunk in torch.split(places, CHUNK):
        scores = queries_ND[chunk] @ gallery_ND.T
        own = scores.gather(1, chunk.to(scores.device)[:, None])
        # `not less` counts NaN candidates too; the match itself is taken off again.
        results.append((~(scores < own)).sum(dim=1) - 1)
    return torch.cat(results) if results else torch.zeros(0, dtype=torch.long)


def recalls(ranks_N: Tensor, prefix: str) -> dict[str, float]:
    """``{"i2t_recall_at_1": share in [0, 1], ...}``"""
    return {f"{prefix}_recall_at_{k}": float((ranks_N < k).double().mean()) for k in KS}


def retrieval(image_ND: Tensor, text_ND: Tensor) -> dict[str, float]:
    """Recall@1/5/10 both ways, and the mean of the two at 1."""
    return _summary(ranks_of_matches(image_ND, text_ND), ranks_of_matches(text_ND, image_ND))


def _summary(i2t_N: Tensor, t2i_N: Tensor) -> dict[str, float]:
    scores = {**recalls(i2t_N, "i2t"), **recalls(t2i_N, "t2i")}
    scores["mean_recall_at_1"] = (scores["i2t_recall_at_1"] + scores["t2i_recall_at_1"]) / 2
    return scores


def evaluate(
    model: Callable[..., tuple[Tensor, ...]],
    module: nn.Module,
    reader: Reader,
    batch: int,
    ranks: Ranks,
    alive: Callable[[], None] = lambda: None,
    first: int | None = None,
) -> dict[str, float]:
    """Retrieval over a dataset, features computed by all ranks, the same numbers on any number of them.

    ``model`` is what is called (the DeepSpeed engine), ``module`` what is switched to evaluation. Samples that cannot
    be read are left out on all ranks. ``alive`` is called after every batch. All samples, or the ``first`` so many.
    Also returns ``pairs`` (how many counted) and ``waste`` at this window.
    """
    was_training = module.training
    module.eval()
    images, texts, kept, lost = [], [], 0, 0
    with torch.no_grad():
        for part, count in evaluation_batches(reader, batch, ranks.rank, ranks.size, first):
            image_BD, text_BD, *_ = model(part.images(ranks.device), part.text.to(ranks.device))
            use = part.valid[:count].nonzero()[:, 0].to(ranks.device)
            images.append(image_BD[:count][use].cpu())
            texts.append(text_BD[:count][use].cpu())
            if count:
                kept, lost = kept + part.tokens, lost + part.tokens_cut
            alive()
    module.train(was_training)
    pieces = ranks.gather((images, texts, kept, lost))
    # Batches were dealt in turn: laid back in turn, the gallery is in the dataset's order on any number of ranks.
    rounds = len(images)
    image_ND = torch.cat([p[0][i] for i in range(rounds) for p in pieces])
    text_ND = torch.cat([p[1][i] for i in range(rounds) for p in pieces])
    kept, lost = sum(p[2] for p in pieces), sum(p[3] for p in pieces)
    scores = retrieval(image_ND, text_ND)
    return {**scores, "pairs": float(len(image_ND)), "waste": lost / max(1, kept + lost)}


def ceiling(folder: Path, window: int) -> dict[str, float] | None:
    """The best possible Recall@1 at a window, where the dataset says so (``ceilings.json``, data/synthetic.py)."""
    file = folder / "ceilings.json"
    if not file.is_file():
        return None
    known = read_json(file)["windows"].get(str(window))
    return None if known is None else {"i2t": float(known["i2t"]), "t2i": float(known["t2i"])}
