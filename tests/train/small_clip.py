"""A real dual encoder, small, with its batches; and its training written once more in plain torch, text padded."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional

from longclip.data.loader import Batch
from longclip.experiment.schema import Experiment
from longclip.model.clip import build
from longclip.model.packing import pack
from longclip.model.towers import Pixels
from tests.train.two_towers import whole_loss

BATCH, STEPS = 24, 6
LR, CLIP = 2e-3, 10.0
FORM = Pixels(16, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
SMALL: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 40,
    "initializer_range": 0.2,
}
VIT = {**SMALL, "model_type": "vit", "image_size": 16, "patch_size": 8}
MODERNBERT = {
    **SMALL,
    "model_type": "modernbert",
    "vocab_size": 70,
    "local_attention": 8,
    "global_attn_every_n_layers": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
BERT = {**SMALL, "model_type": "bert", "vocab_size": 70, "max_position_embeddings": 64}
DROPOUT = {"hidden_dropout_prob": 0.2, "attention_probs_dropout_prob": 0.2}


def experiment(job: dict[str, Any]) -> Experiment:
    """``job`` may set stage, micro, checkpointing, precision, loss, dropout, freeze and offload."""
    zero: dict[str, Any] = {}
    if job["stage"] == 3:  # small matrices are partitioned too
        zero["stage3_param_persistence_threshold"] = 100
    if job.get("offload"):
        zero["offload_optimizer"] = {"device": "cpu"}
    more = DROPOUT if job.get("dropout") else {}
    frozen = job.get("freeze", {})
    return Experiment.model_validate(
        {
            "name": "small",
            "model": {
                "context_length": 48,
                "embed_dim": 24,
                "image": {"config": {**VIT, **more}, "freeze": frozen.get("image")},
                "text": {
                    "config": {**BERT, **more} if more else MODERNBERT,
                    "tokenizer": "none",
                    "freeze": frozen.get("text"),
                },
            },
            "data": {"train": "none", "val": "none"},
            "train": {
                "samples": STEPS * BATCH,
                "global_batch": BATCH,
                "precision": job.get("precision", "fp32"),
                "loss": job.get("loss", "contrastive"),
                "lr": LR,
                "schedule": "constant",
                "grad_clip": CLIP,
            },
            "engine": {
                "zero_stage": job["stage"],
                "micro_batch": job.get("micro", "auto"),
                "activation_checkpointing": job.get("checkpointing", False),
                "compile": job.get("compile", False),
                "deepspeed": {"zero_optimization": zero} if zero else {},
            },
        }
    )


def pairs(step: int) -> tuple[torch.Tensor, list[list[int]]]:
    """The global batch of a step: pixels [24, 16, 16, 3] and captions of 1 to 48 tokens that say their brightness."""
    drawn = torch.Generator().manual_seed(step)
    pixels = torch.randint(0, 100, (BATCH, 16, 16, 3), dtype=torch.uint8, generator=drawn)
    lengths = torch.randint(1, 49, (BATCH,), generator=drawn).tolist()
    captions = [torch.randint(1, 70, (n,), generator=drawn).tolist() for n in lengths]
    for i, caption in enumerate(captions):
        pixels[i] += 2 * caption[0]
    return pixels, captions


def part(step: int, rank: int, size: int) -> Batch:
    pixels, captions = pairs(step)
    share = BATCH // size
    mine = slice(rank * share, (rank + 1) * share)
    tokens = sum(map(len, captions[mine]))
    return Batch(pixels[mine], FORM, pack(captions[mine]), torch.ones(share, dtype=torch.bool), (), tokens, 0)


def plain_training(**job: Any) -> tuple[list[float], list[float]]:
    """Losses and gradient norms before clipping: one process, no DeepSpeed, no packing, no tiles."""
    asked = experiment({"stage": 0, **job})
    model = build(asked.model, asked.train.seed, loss=asked.train.loss, padded=True)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in trained if p.ndim > 1], "weight_decay": asked.train.weight_decay},
            {"params": [p for p in trained if p.ndim == 1], "weight_decay": 0.0},
        ],
        lr=LR,
        betas=asked.train.betas,
        eps=asked.train.eps,
    )
    losses, norms = [], []
    for step in range(STEPS):
        pixels, captions = pairs(step)
        image = functional.normalize(model.image((pixels.permute(0, 3, 1, 2) / 255 - 0.5) / 0.5), dim=-1)
        text = functional.normalize(model.text(pack(captions)), dim=-1)
        numbers = [model.log_scale.exp(), *([] if model.bias is None else [model.bias])]
        loss = whole_loss(asked.train.loss, image, text, *numbers)
        optimizer.zero_grad()
        loss.backward()
        norms.append(float(nn.utils.clip_grad_norm_(trained, CLIP)))
        optimizer.step()
        losses.append(loss.item())
    return losses, norms
