"""The loss in tiles against the whole matrix of similarities: growth of peak memory, time, and how far they differ.

    python tools/bench/loss.py --pairs 8192 65536 --dim 512 --kind contrastive

One process per measurement, one rank, fp32, forward and backward from features of unit length that stand already.
Growth is the peak after, less what was resident before; it includes the gathered features and all gradients. The whole
matrix is left out, by name, where it would take more than half of the memory that is available.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import resource
import statistics
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

GIB = 2**30
WHOLE_MATRICES = 6
"""matrices of pairs x pairs alive at a time when torch computes the whole loss and its gradient, at least"""


def measure(method: str, kind: str, pairs: int, dim: int, threads: int, repeats: int) -> dict[str, Any]:
    """Median seconds of forward and backward, growth in bytes, and the loss."""
    import torch
    from torch.nn import functional

    from longclip.train import loss, ranks

    torch.set_num_threads(threads)
    me = ranks.start()
    drawn = torch.Generator().manual_seed(0)
    image = functional.normalize(torch.randn(pairs, dim, generator=drawn), dim=-1)
    text = functional.normalize(torch.randn(pairs, dim, generator=drawn).add_(image), dim=-1)
    numbers = [torch.tensor([20.0]), *([torch.tensor([-10.0])] if kind == "sigmoid" else [])]
    inputs = [x.to(me.device).requires_grad_() for x in (image, text, *numbers)]

    def whole(image: Any, text: Any, scale: Any, *bias: Any) -> Any:
        logits = scale * image @ text.T
        if kind == "sigmoid":
            sign = 2 * torch.eye(pairs, device=me.device) - 1
            return -functional.logsigmoid(sign * (logits + bias[0])).sum() / pairs
        own = torch.arange(pairs, device=me.device)
        return (functional.cross_entropy(logits, own) + functional.cross_entropy(logits.T, own)) / 2

    before, seconds, value = _resident(me.device), [], 0.0
    for _ in range(repeats):
        for x in inputs:
            x.grad = None
        begun = time.perf_counter()
        result = whole(*inputs) if method == "whole" else loss.LOSSES[kind](*inputs, me)
        result.backward()
        value = result.item()
        seconds.append(time.perf_counter() - begun)
    return {"seconds": statistics.median(seconds), "growth": _peak(me.device) - before, "loss": value}


def _resident(device: Any) -> int:
    import torch

    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def _peak(device: Any) -> int:
    import torch

    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, nargs="+", default=[4096, 8192, 65536])
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--kind", choices=["contrastive", "sigmoid"], default="contrastive")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--repeats", type=int, default=1)
    args = parser.parse_args()
    available = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    cpu = Path("/proc/cpuinfo").read_text().split("model name", 1)[-1].partition("\n")[0].strip("\t: ")
    machine = f"{args.threads} threads of {cpu}, torch {version('torch')}"
    print(f"{args.kind}, forward and backward, fp32, dim {args.dim}, median of {args.repeats}; {machine}")
    print(f"{'pairs':>8} {'method':8} {'seconds':>9} {'growth GiB':>11} {'loss':>12}")
    for pairs in args.pairs:
        found = {}
        for method in ("tiles", "whole"):
            if method == "whole" and WHOLE_MATRICES * 4 * pairs**2 > available / 2:
                print(f"{pairs:8,} {method:8} left out: takes over {WHOLE_MATRICES * 4 * pairs**2 / GIB:.0f} GiB")
                continue
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                job = (method, args.kind, pairs, args.dim, args.threads, args.repeats)
                found[method] = pool.apply(measure, job)
            got = found[method]
            print(f"{pairs:8,} {method:8} {got['seconds']:9.2f} {got['growth'] / GIB:11.3f} {got['loss']:12.7f}")
        if "whole" in found:
            differs = abs(found["tiles"]["loss"] / found["whole"]["loss"] - 1)
            print(f"{pairs:8,} tiles differ by {differs:.1e} of the loss")


if __name__ == "__main__":
    main()
