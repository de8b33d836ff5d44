"""What packing saves: one text tower, forward + backward, on captions as long as the paper's.

    python tools/bench/text_tower.py                               window 512, three layers of ModernBERT-base's width
    python tools/bench/text_tower.py --width 1024 --inner 2624     of ModernBERT-large's

Ways, all with the same weights and captions, taken in turn so that a slow minute of the machine hits all of them:

    packed      as longclip trains: the captions' own tokens, end to end
    longest     padded to the longest caption of the batch
    window      padded to the window, as the published code does
    linear      the tower's linear layers alone on the same tokens: F.linear, forward + backward, nothing else

Lengths are quantiles, evenly spaced, of the distribution that wastes 55 % of the tokens at 77 and 2.2 % at 512 and has
131 tokens a caption, the published figures (arXiv 2510.03978, `longclip.train.estimate`), cut to the window: so few
captions, drawn, would waste anything. Medians and ratios are printed, with the machine and the method.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from longclip.data.tokens import waste
from longclip.experiment.schema import TextTower
from longclip.model.packing import Packed, pack
from longclip.model.towers import TextEncoder
from longclip.train.estimate import published

VOCABULARY = 1000
"""small: looking tokens up is no matrix product, and is not what is measured"""


def tower(width: int, inner: int, layers: int, window: int, pad_to: int | None) -> TextEncoder:
    config = {
        "model_type": "modernbert",
        "vocab_size": VOCABULARY,
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": max(1, width // 64),
        "max_position_embeddings": max(window, 512),
        "pad_token_id": 0,
        **dict.fromkeys(("bos_token_id", "cls_token_id"), 1),
        **dict.fromkeys(("eos_token_id", "sep_token_id"), 2),
    }
    torch.manual_seed(0)
    return TextEncoder(TextTower(config=config, tokenizer="-"), width, pad_to=pad_to)


def linear_layers(encoder: TextEncoder) -> list[nn.Linear]:
    return [module for module in encoder.trunk.modules() if isinstance(module, nn.Linear)]


def bare(layers: list[nn.Linear], tokens: int) -> Callable[[], None]:
    """Forward and backward of the linear layers on as many tokens, each by itself."""
    inputs = {n: torch.randn(tokens, n, requires_grad=True) for n in {layer.in_features for layer in layers}}
    slopes = {n: torch.randn(tokens, n) for n in {layer.out_features for layer in layers}}

    def run() -> None:
        for layer in layers:
            out = F.linear(inputs[layer.in_features], layer.weight, layer.bias)
            torch.autograd.backward(out, slopes[layer.out_features])

    return run


def step(encoder: TextEncoder, text: Packed) -> Callable[[], None]:
    def run() -> None:
        features: Tensor = encoder(text)
        torch.autograd.backward(features.square().mean())

    return run


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "?")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--captions", type=int, default=16, help="captions of the batch (default 16)")
    parser.add_argument("--window", type=int, default=512, help="tokens at which captions are cut (default 512)")
    parser.add_argument("--width", type=int, default=768, help="hidden size; heads are 64 wide (default 768)")
    parser.add_argument("--inner", type=int, default=1152, help="width of the MLPs (default 1152)")
    parser.add_argument(
        "--layers", type=int, default=3, help="layers, every third of them global (default 3 of its 22)"
    )
    parser.add_argument("--rounds", type=int, default=5, help="rounds of which the medians are (default 5)")
    parser.add_argument("--threads", type=int, default=1, help="threads (default 1)")
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)

    random = torch.Generator().manual_seed(0)
    all_of = published().lengths
    drawn = [all_of[(2 * k + 1) * len(all_of) // (2 * asked.captions)] for k in range(asked.captions)]
    kept = [min(n, asked.window) for n in drawn]
    text = pack([torch.randint(3, VOCABULARY, (n,), generator=random).tolist() for n in kept])
    tokens, longest = sum(kept), max(kept)

    shape = asked.width, asked.inner, asked.layers, asked.window
    packed = tower(*shape, pad_to=None)
    ways = {
        "packed": step(packed, text),
        "longest": step(tower(*shape, pad_to=longest), text),
        "window": step(tower(*shape, pad_to=asked.window), text),
        "linear": bare(linear_layers(packed), tokens),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(asked.rounds + 1):  # the first warms up
        for name, run in ways.items():
            begun = time.perf_counter()
            run()
            if turn:
                seconds[name].append(time.perf_counter() - begun)

    print(f"text tower, forward + backward, fp32, {asked.threads} thread(s); torch {torch.__version__}")
    print(f"machine: {processor()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f} at the end")
    print(f"ModernBERT shape: width {asked.width}, MLPs {asked.inner}, {asked.layers} layers, window {asked.window}")
    print(
        f"{asked.captions} captions, mean {sum(drawn) / asked.captions:.0f} tokens, longest {longest} after the cut; "
        f"these waste {waste(drawn, 77):.1%} at 77, {waste(drawn, 512):.1%} at 512 (published: 131, 55 %, 2.2 %); "
        f"{1 - tokens / asked.captions / asked.window:.0%} of the window is padding"
    )
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    for name, median in medians.items():
        spread = f"{min(seconds[name]):.3f} .. {max(seconds[name]):.3f}"
        print(f"  {name:8} {median:7.3f} s  ({spread})  {tokens / median:8,.0f} real tokens/s")
    print(f"padded to the window / packed   {medians['window'] / medians['packed']:.2f}  (asked: at least 4)")
    print(f"padded to the longest / packed  {medians['longest'] / medians['packed']:.2f}  (asked: at least 2)")
    print(f"packed / linear layers bare     {medians['packed'] / medians['linear']:.2f}  (asked: at most 1.25)")


if __name__ == "__main__":
    main()
