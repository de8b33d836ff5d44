"""The dual encoder: two towers, one space, one temperature."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from longclip.experiment.schema import Model
from longclip.model.packing import Packed
from longclip.model.towers import ImageEncoder, TextEncoder, draw
from longclip.model.window import extend

INITIAL_TEMPERATURE = 0.07
"""CLIP's (arXiv 2103.00020, section 2.5)"""
MAX_SCALE = 100.0
"""CLIP's bound on 1/temperature, for stability"""


class DualEncoder(nn.Module):
    """Images and captions -> unit vectors of one space, and the scale of their similarities."""

    def __init__(self, spec: Model, weights: bool = True, padded: bool = False) -> None:
        super().__init__()
        self.image = ImageEncoder(spec.image, spec.embed_dim, weights)
        self.text = TextEncoder(spec.text, spec.embed_dim, weights, spec.context_length if padded else None)
        # Shape [1]: a 0-dim parameter crashes DeepSpeed's set-up.
        self.log_scale = nn.Parameter(torch.full((1,), math.log(1 / INITIAL_TEMPERATURE)))

    def forward(self, pixels_BCHW: Tensor, text: Packed) -> tuple[Tensor, Tensor, Tensor]:
        """Unit features [B, embed_dim] of images and of captions, and the scale [1]; all fp32."""
        image_BD = F.normalize(self.image(pixels_BCHW), dim=-1)
        text_BD = F.normalize(self.text(text), dim=-1)
        return image_BD, text_BD, self.log_scale.float().exp().clamp(max=MAX_SCALE)


def build(spec: Model, seed: int, activation_checkpointing: bool = False, padded: bool = False) -> DualEncoder:
    """The model at its initial weights: towers from disk as they are, all else drawn from ``seed``, in fp32.

    Positions are extended afterwards, so that arms with other windows share those that are kept.
    """
    model = DualEncoder(spec, padded=padded)
    loaded = [name for name, tower in (("image.trunk", spec.image), ("text.trunk", spec.text)) if tower.tower]
    draw(model, seed, skip=loaded)
    extend(model.text.trunk, spec.text, spec.context_length)
    if activation_checkpointing:
        for encoder in (model.image, model.text):
            encoder.trunk.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def count_parameters(spec: Model) -> int:
    """Parameters of the whole model, without making it."""
    with torch.device("meta"):
        model = DualEncoder(spec, weights=False)
        extend(model.text.trunk, spec.text, spec.context_length)
    return sum(p.numel() for p in model.parameters())
