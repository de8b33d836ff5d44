"""A two-tower model of odd sizes, its data, and the same training written once more in plain torch."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

BATCH = 24
"""global batch; divides by 1, 2, 3 and 4 ranks"""
STEPS = 24
LR, WARMUP, BETAS, EPS, DECAY = 2e-2, 3, (0.9, 0.95), 1e-6, 0.2
CLIP = 2.5
"""in the midst of the gradient norms"""


class TwoTowers(nn.Module):
    """Pixels [b, 37] and tokens [b, 5] to unit vectors [b, 13]; no tensor's elements divide by 2, 3 and 4 alike."""

    def __init__(self, width: int = 19, scale: float = 10.0) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.image = nn.Sequential(nn.Linear(37, width), nn.LayerNorm(width), nn.GELU(), nn.Linear(width, 13))
            self.words = nn.Embedding(41, 17)
            self.text = nn.Sequential(nn.LayerNorm(17), nn.Linear(17, 13))
        self.log_scale = nn.Parameter(torch.tensor([math.log(scale)]))

    def forward(self, pixels: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        image = functional.normalize(self.image(pixels), dim=-1)
        text = functional.normalize(self.text(self.words(tokens).mean(1)), dim=-1)
        return image, text, self.log_scale.exp()


def batch(step: int) -> tuple[Tensor, Tensor]:
    """The global batch of a step: [24, 37] and [24, 5], drawn from 96 pairs."""
    drawn = torch.Generator().manual_seed(1)
    tokens = torch.randint(41, (96, 5), generator=drawn)
    meaning = torch.randn(41, 37, generator=drawn)
    pixels = meaning[tokens].mean(1) + 0.1 * torch.randn(96, 37, generator=drawn)
    chosen = torch.randperm(96, generator=torch.Generator().manual_seed(100 + step))[:BATCH]
    return pixels[chosen], tokens[chosen]


def valid_mask(step: int) -> Tensor:
    """[24] bool; in some steps the whole last quarter, all that one of four ranks has, is bad."""
    valid = torch.rand(BATCH, generator=torch.Generator().manual_seed(200 + step)) > 0.2
    if step % 3 == 0:
        valid[-6:] = False
    return valid


def pushed(loss: Tensor, scale: Tensor, step: int) -> Tensor:
    """Another loss, that drives the scale of the logits up for eight steps, and then down."""
    return loss - scale.sum() if step < 8 else loss + scale.sum()


def experiment(stage: int, precision: str = "fp32") -> Any:
    from longclip.experiment.schema import Experiment

    return Experiment.model_validate(
        {
            "name": "tiny",
            "model": {
                "context_length": 5,
                "image": {"config": {"model_type": "vit"}},
                "text": {"config": {"model_type": "bert"}, "tokenizer": "none"},
            },
            "data": {"train": "none", "val": "none"},
            "train": {
                "samples": STEPS * BATCH,
                "global_batch": BATCH,
                "precision": precision,
                "lr": LR,
                "warmup_steps": WARMUP,
                "betas": BETAS,
                "eps": EPS,
                "weight_decay": DECAY,
                "grad_clip": CLIP,
            },
            "engine": {
                "zero_stage": stage,  # at stage 3 vectors stay whole on every rank, matrices do not
                "deepspeed": {"zero_optimization": {"stage3_param_persistence_threshold": 100}} if stage == 3 else {},
            },
        }
    )


def whole_loss(kind: str, image: torch.Tensor, text: torch.Tensor, scale: torch.Tensor, *bias: torch.Tensor) -> Any:
    """Both losses as their papers write them, over the whole matrix of similarities; 0 for no pairs."""
    logits, n = scale * image @ text.T, max(1, len(image))
    if kind == "sigmoid":
        sign = 2 * torch.eye(len(image), dtype=logits.dtype) - 1
        return -functional.logsigmoid(sign * (logits + bias[0])).sum() / n
    own = torch.arange(len(image))
    return sum(functional.cross_entropy(x, own, reduction="sum") for x in (logits, logits.T)) / (2 * n)


def plain_training(masked: bool = False, near_bound: bool = False) -> tuple[list[float], list[float], list[float]]:
    """Losses, gradient norms before clipping, and scales after each step, by nothing but torch: one process, B x B
    similarities. ``near_bound`` begins at a scale of 95, and it is pushed against its bound."""
    model = TwoTowers(scale=95.0) if near_bound else TwoTowers()
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in model.parameters() if p.ndim == 2], "weight_decay": DECAY},
            {"params": [p for p in model.parameters() if p.ndim == 1], "weight_decay": 0.0},
        ],
        betas=BETAS,
        eps=EPS,
    )
    losses, norms, scales = [], [], []
    for step in range(STEPS):
        pixels, tokens = batch(step)
        if masked:
            pixels, tokens = pixels[valid_mask(step)], tokens[valid_mask(step)]
        image, text, scale = model(pixels, tokens)
        loss = whole_loss("contrastive", image, text, scale)
        optimizer.zero_grad()
        if near_bound:
            loss = pushed(loss, scale, step)
        loss.backward()
        norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), CLIP)))
        for group in optimizer.param_groups:
            cosine = (1 + math.cos(math.pi * (step - WARMUP) / (STEPS - WARMUP))) / 2
            group["lr"] = LR * ((step + 1) / WARMUP if step < WARMUP else cosine)
        optimizer.step()
        with torch.no_grad():
            model.log_scale.clamp_(max=math.log(100))  # as CLIP does (arXiv 2103.00020, section 2.5)
        losses.append(loss.item())
        scales.append(model.log_scale.exp().item())
    return losses, norms, scales
