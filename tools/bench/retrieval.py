"""Recall@K over a large gallery: what counting ranks costs over the matrix products that it cannot do without.

    python tools/bench/retrieval.py                    100,000 images x 100,000 captions, dim 512, both ways
    python tools/bench/retrieval.py --pairs 20000

The bound is the same products in blocks of the same rows, both ways, and nothing else. Both take turns; medians over
the rounds are compared. Memory is the growth of the process's peak over what it held with the features drawn.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import time
from collections.abc import Callable

import torch
from text_tower import processor
from torch import Tensor
from torch.nn.functional import normalize

from longclip.evaluate import ranking
from longclip.train.ranks import Ranks


def bare(image_ND: Tensor, text_ND: Tensor) -> None:
    rows = max(1, ranking.CELLS // len(text_ND))
    scores = torch.empty(rows, len(text_ND))
    for queries, gallery in ((image_ND, text_ND), (text_ND, image_ND)):
        for part in torch.split(queries, rows):
            torch.matmul(part, gallery.T, out=scores[: len(part)])


def seconds(act: Callable[[], object]) -> float:
    begun = time.perf_counter()
    act()
    return time.perf_counter() - begun


def peak() -> float:
    """MiB"""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--pairs", type=int, default=100_000)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    alone = Ranks(0, 1, 0, torch.device("cpu"))
    random = torch.Generator().manual_seed(0)
    image_ND = normalize(torch.randn(asked.pairs, asked.dim, generator=random), dim=1)
    text_ND = normalize(image_ND + 1.5 * torch.randn(image_ND.shape, generator=random) / asked.dim**0.5, dim=1)
    before = peak()
    scores = ranking.retrieval(*ranking.both_ways(image_ND, text_ND, alone))
    grown = peak() - before
    bounds, ours = [], []
    for _ in range(asked.rounds):
        bounds.append(seconds(lambda: bare(image_ND, text_ND)))
        ours.append(seconds(lambda: ranking.both_ways(image_ND, text_ND, alone)))
    print(f"machine: {processor()}, {asked.threads} threads; torch {torch.__version__}")
    print(
        f"{asked.pairs:,} x {asked.pairs:,}, dim {asked.dim}, both ways, median of {asked.rounds}; "
        f"i2t R@1 {scores['i2t_recall_at_1']:.3f}"
    )
    for name, times in (("products", bounds), ("ranks", ours)):
        print(f"  {name:9} {statistics.median(times):8.1f} s  ({min(times):.1f} .. {max(times):.1f})")
    ratio = statistics.median(ours) / statistics.median(bounds)
    print(f"ranks / bare products {ratio:.2f} (asked: at most 1.5); growth of peak memory {grown:,.0f} MiB (2,048)")


if __name__ == "__main__":
    main()
