"""Retrieval on a run's own validation and test data: features by all ranks, then the ranks of the matches (ranking.py).

Suites have their own way (pairs.py), in which the towers run one at a time; here both run at once, as in training.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from longclip.data.loader import Reader, evaluation_batches
from longclip.evaluate.ranking import both_ways, retrieval
from longclip.run.evaluations import Scored
from longclip.run.folder import read_json
from longclip.train.ranks import Ranks


def evaluate(
    model: Callable[..., tuple[Tensor, ...]],
    module: nn.Module,
    reader: Reader,
    batch: int,
    ranks: Ranks,
    alive: Callable[[], None] = lambda: None,
    first: int | None = None,
) -> Scored:
    """Retrieval over a dataset, features computed by all ranks, the same numbers on any number of them.

    ``model`` is what is called (the DeepSpeed engine), ``module`` what is switched to evaluation. Samples that cannot
    be read are left out on all ranks. Captions of the same tokens have the features of the first of them: elsewhere in
    a batch they would differ in the last bit, and not tie. ``alive`` is called after every batch, and every block of
    queries that is ranked, equally often on all ranks, and may end it all by raising on all of them. All samples, or
    the ``first`` so many. Besides the scores there are ``pairs`` (how many counted) and ``waste`` at this window. The
    arrays are those of a record (run/evaluations.py).
    """
    was_training = module.training
    module.eval()
    images, texts, captions, kept, lost = [], [], [], 0, 0
    try:
        with torch.no_grad():
            for part, count in evaluation_batches(reader, batch, ranks.rank, ranks.size, first):
                image_BD, text_BD, *_ = model(part.images(ranks.device), part.text.to(ranks.device))
                use = part.valid[:count].nonzero()[:, 0].to(ranks.device)
                images.append(image_BD[:count][use].cpu())
                texts.append(text_BD[:count][use].cpu())
                digests = part.text.digests()
                captions.append([(part.full[i], digests[i]) for i in use.tolist()])
                if count:
                    kept, lost = kept + part.tokens, lost + part.tokens_cut
                alive()
    finally:
        module.train(was_training)
    pieces = ranks.gather((images, texts, kept, lost, captions))
    # Batches were dealt in turn: laid back in turn, the gallery is in the dataset's order on any number of ranks.
    rounds = len(images)
    image_ND = torch.cat([p[0][i] for i in range(rounds) for p in pieces])
    text_ND = torch.cat([p[1][i] for i in range(rounds) for p in pieces])
    every = [caption for i in range(rounds) for p in pieces for caption in p[4][i]]
    tokens = [length for length, _ in every]
    firsts: dict[bytes, int] = {}
    same = [firsts.setdefault(digest, i) for i, (_, digest) in enumerate(every)]
    if len(firsts) < len(same):
        text_ND = text_ND[same]
    kept, lost = sum(p[2] for p in pieces), sum(p[3] for p in pieces)
    i2t, t2i = both_ways(image_ND, text_ND, ranks, alive=alive)
    scores = {**retrieval(i2t, t2i), "pairs": float(len(image_ND)), "waste": lost / max(1, kept + lost)}
    return Scored(scores, {"i2t": i2t, "t2i": t2i, "tokens": np.array(tokens, dtype=np.int32)})


def ceiling(folder: Path, window: int) -> dict[str, float] | None:
    """The best possible Recall@1 at a window, where the dataset says so (``ceilings.json``, data/synthetic.py)."""
    file = folder / "ceilings.json"
    if not file.is_file():
        return None
    known = read_json(file)["windows"].get(str(window))
    return None if known is None else {"i2t": float(known["i2t"]), "t2i": float(known["t2i"])}
