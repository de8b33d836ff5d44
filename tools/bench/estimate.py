#!/usr/bin/env python
"""What `longclip estimate` says of memory against what a step takes, on CPU ranks of this machine.

    python tools/bench/estimate.py            all, of models above 50 M parameters: 15 minutes on 2 cores
    python tools/bench/estimate.py --quick    a few of them

Each configuration runs in processes of its own, forked from one that has imported everything. Measured is the growth of
a rank's peak resident memory (VmHWM) over what it had at the fork, in two steps of the real model, engine and loss
on drawn batches; the largest of the ranks counts.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import json
import os
import platform
import sys
import tempfile
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

STEPS = 2
CLIP: dict[str, Any] = {
    "model_type": "clip_vision_model",
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "image_size": 112,
    "patch_size": 16,
}
VIT: dict[str, Any] = {**CLIP, "model_type": "vit", "num_hidden_layers": 6}
MODERNBERT: dict[str, Any] = {
    "model_type": "modernbert",
    "hidden_size": 512,
    "intermediate_size": 768,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "vocab_size": 30000,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "cls_token_id": 1,
    "sep_token_id": 2,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
BERT: dict[str, Any] = {
    "model_type": "bert",
    "hidden_size": 640,
    "intermediate_size": 2560,
    "num_hidden_layers": 6,
    "num_attention_heads": 10,
    "vocab_size": 10000,
}
MODELS = {"clip+modernbert": (CLIP, MODERNBERT), "vit+bert": (VIT, BERT)}


def configurations(quick: bool) -> Iterator[dict[str, Any]]:
    for model, precision, stage, ranks, checkpointing in itertools.product(
        MODELS, ("fp32", "bf16"), range(4), (1, 2), (False, True)
    ):
        if precision == "bf16" and stage == 0:  # refused: DeepSpeed gets it wrong
            continue
        if quick and (model != "clip+modernbert" or (precision, stage, ranks, checkpointing) not in QUICK):
            continue
        yield {
            "model": model,
            "precision": precision,
            "stage": stage,
            "ranks": ranks,
            "checkpointing": checkpointing,
            "batch": 16,
        }


QUICK = (("fp32", 0, 1, False), ("fp32", 2, 2, True), ("bf16", 1, 1, False), ("bf16", 3, 2, False))


def experiment_of(c: dict[str, Any]) -> Any:
    from longclip.experiment.schema import Experiment

    image, text = MODELS[c["model"]]
    towers = {"image": {"config": image}, "text": {"config": text, "tokenizer": "none"}}
    return Experiment.model_validate(
        {
            "name": "bench",
            "model": {"context_length": 512, "embed_dim": 256, **towers},
            "data": {"train": "none", "val": "none"},
            "train": {"samples": 10**6, "global_batch": c["batch"], "precision": c["precision"], "lr": 1e-4},
            "engine": {"zero_stage": c["stage"], "activation_checkpointing": c["checkpointing"]},
            "slurm": {"tasks_per_node": c["ranks"]},
        }
    )


def lengths_of(count: int) -> list[int]:
    """Captions of the published distribution, within 512 tokens; the same mean on every rank."""
    from longclip.train.estimate import published

    quantiles = published().within(512)
    return [quantiles[(2 * k + 1) * len(quantiles) // (2 * count)] for k in range(count)]


def memory_of(key: str) -> int:
    """VmRSS or VmHWM of this process in bytes."""
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"no {key} in /proc/self/status")


def measure(c: dict[str, Any], me: Any) -> int:
    """Growth of this rank's peak memory in bytes."""
    import torch

    from longclip.data.loader import Batch
    from longclip.model.clip import build
    from longclip.model.packing import pack
    from longclip.model.towers import pixels_of
    from longclip.train import engine as engines
    from longclip.train.loop import take_step

    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # VmHWM begins again (proc(5))
    before = memory_of("VmRSS")
    experiment = experiment_of(c)
    model = build(experiment.model, 0, experiment.engine.activation_checkpointing)
    engine = engines.start(model, experiment, me)
    share = c["batch"] // c["ranks"]
    captions = [[5] * n for n in lengths_of(share)]
    size = experiment.model.image.config["image_size"]
    for _ in range(STEPS):
        pixels = torch.randint(0, 256, (share, size, size, 3), dtype=torch.uint8)
        good = torch.ones(share, dtype=torch.bool)
        part = Batch(pixels, pixels_of(experiment.model.image), pack(captions), good, (), 0, 0)
        take_step(engine, part, experiment.train.loss, me)
    return memory_of("VmHWM") - before


def run_rank(rank: int, c: dict[str, Any], folder: Path) -> None:
    from longclip.train import ranks

    os.environ.update(RANK=str(rank), WORLD_SIZE=str(c["ranks"]), LOCAL_RANK=str(rank))
    me = ranks.start(f"file://{folder}/meet")
    peaks = me.gather(measure(c, me))
    if rank == 0:
        (folder / "peaks.json").write_text(json.dumps(peaks), encoding="utf-8")
    ranks.stop()


def measured(c: dict[str, Any]) -> int:
    """The largest peak of the configuration's ranks, each in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        children = []
        for rank in range(c["ranks"]):
            child = os.fork()
            if child == 0:
                code = 1
                try:
                    run_rank(rank, c, Path(folder))
                    code = 0
                except BaseException:
                    traceback.print_exc()
                finally:
                    os._exit(code)
            children.append(child)
        codes = [os.waitpid(child, 0)[1] for child in children]
        if any(codes):
            sys.exit(f"a rank of {c} failed")
        return int(max(json.loads((Path(folder) / "peaks.json").read_text(encoding="utf-8"))))


def estimated(c: dict[str, Any]) -> tuple[int, int]:
    """Parameters, and peak bytes of a rank."""
    from longclip.model.shape import shape_of
    from longclip.train.memory import memory

    experiment = experiment_of(c)
    shape = shape_of(experiment.model, *MODELS[c["model"]])
    share = c["batch"] // c["ranks"]
    found = memory(
        shape,
        lengths_of(share),
        micro_batch=share,
        global_batch=c["batch"],
        precision=c["precision"],
        stage=c["stage"],
        ranks=c["ranks"],
        checkpointing=c["checkpointing"],
        on_gpu=False,
    )
    return shape.total, found.peak


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true")
    chosen = list(configurations(parser.parse_args().quick))
    os.environ["DS_ACCELERATOR"] = "cpu"
    import torch

    torch.set_num_threads(1)
    # What the first step imports would count as its memory.
    for late in ("deepspeed", "torch._dynamo", "torch._inductor.compile_fx", "longclip.train.loop"):
        importlib.import_module(late)
    machine = platform.processor() or platform.machine()
    print(f"{machine}, {os.cpu_count()} cores, torch {torch.__version__}; {STEPS} steps")
    print("model              parameters  precision  ZeRO  ranks  checkpointing  estimate MiB  measured MiB  ratio")
    ratios = []
    for c in chosen:
        parameters, guess = estimated(c)
        took = measured(c)
        ratio = guess / took
        ratios.append(ratio)
        print(
            f"{c['model']:18s} {parameters / 1e6:8.1f} M  {c['precision']:9s}  {c['stage']:4d}  {c['ranks']:5d}  "
            f"{'on' if c['checkpointing'] else 'off':13s}  {guess / 2**20:12.0f}  {took / 2**20:12.0f}  {ratio:5.2f}",
            flush=True,
        )
    print(f"{len(ratios)} configurations: {min(ratios):.3f} to {max(ratios):.3f} of what was measured")


if __name__ == "__main__":
    main()
