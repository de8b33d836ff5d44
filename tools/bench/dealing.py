"""What dealing a global batch to ranks by the length of its texts saves, and what it costs.

    python tools/bench/dealing.py SHARDS --tokenizer FOLDER [--text txt] [--window 512] [--share 64] [--ranks 2 8 64]

All ranks wait for the one with the most tokens. For each number of ranks: the tokens of that rank over the mean, with
the batch dealt by the bytes that the index knows (as training does) and with it cut into stretches, over batches of the
real order; medians and the worst. The cost is the time that one worker takes to find its places in a global batch of
32,768 in an index of 24,000,000 samples in 2,400 shards, of which 32 are open.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import time
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from longclip.data.counter import TokenCounter
from longclip.data.loader import Reader, deal
from longclip.data.order import Mixture
from longclip.data.shards import open_dataset
from longclip.data.text import Text, render
from longclip.data.tokens import Tokenizer
from longclip.model.towers import Pixels

BATCHES = 50


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("shards", type=Path)
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--text", default="txt")
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--share", type=int, default=64, help="pairs a rank (default 64)")
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 8, 64])
    asked = parser.parse_args()

    dataset = open_dataset(asked.shards)
    text = Text(asked.text)
    reader = Reader(dataset, Tokenizer(asked.tokenizer, asked.window), Pixels(224, (0.5,) * 3, (0.5,) * 3), text)
    ends = np.cumsum([0, *dataset.sizes])
    places = [(shard, i) for shard, size in enumerate(dataset.sizes) for i in range(size)]
    texts = [
        render(text.long, {**fields, "txt": txt})
        for _, txt, fields in (dataset.fields_and_text(*place) for place in places)
    ]
    tokens = np.minimum(np.array(TokenCounter(asked.tokenizer).many(texts)), asked.window)
    order = Mixture([dataset.sizes], 0)
    print(f"{platform.machine()}, {os.cpu_count()} cores, numpy {np.__version__}")
    print(
        f"{len(tokens):,} texts of {asked.shards}, mean {tokens.mean():.0f} tokens at window {asked.window}; "
        f"{asked.share} pairs a rank; {BATCHES} batches; tokens of the fullest rank over the mean, median (worst)"
    )
    for ranks in asked.ranks:
        dealt, cut = [], []
        for step in range(BATCHES):
            batch = ranks * asked.share
            located = order.locate(range(step * batch, (step + 1) * batch))
            mine = tokens[ends[located[:, 1]] + located[:, 2]]
            cut.append(fullest(mine.reshape(ranks, -1)))
            dealt.append(fullest(mine[deal(reader.text_bytes(located[:, 1:]), ranks)]))
        print(
            f"  {ranks:3} ranks: in stretches {statistics.median(cut):.3f} ({max(cut):.3f}), "
            f"dealt {statistics.median(dealt):.3f} ({max(dealt):.3f})"
        )

    far, sizes = Mixture([[10_000] * 2400], 0), np.random.default_rng(0).integers(50, 3000, (2400, 10_000))
    far.locate([10_000_000])  # the permutation of the block, which is made once in 160,000 samples
    begun = time.perf_counter()
    located = far.locate(range(10_000_000, 10_000_000 + 32_768))
    deal(sizes[located[:, 1], located[:, 2]], 512)
    print(f"places of a global batch of 32,768: {1000 * (time.perf_counter() - begun):.1f} ms")


def fullest(tokens: NDArray[np.int64]) -> float:
    """Of [ranks, share]."""
    sums = tokens.sum(axis=1)
    return float(sums.max() / sums.mean())


if __name__ == "__main__":
    main()
