"""The dual encoder: two towers, one space, one temperature."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from longclip.experiment.schema import Model
from longclip.model.freeze import freeze
from longclip.model.packing import Packed
from longclip.model.towers import ImageEncoder, TextEncoder, draw
from longclip.model.window import extend

INITIAL_TEMPERATURE = 0.07
"""CLIP's (arXiv 2103.00020, section 2.5)"""
MAX_SCALE = 100.0
"""CLIP's bound on 1/temperature, for stability. The step holds it (train/engine.py): clamped in the forward pass, a
scale that had once passed it would have no gradient by which to come back."""
SIGMOID_SCALE, SIGMOID_BIAS = 10.0, -10.0
"""Where the sigmoid loss begins (arXiv 2303.15343, algorithm 1); its scale has no bound"""


class DualEncoder(nn.Module):
    """Images and captions -> unit vectors of one space, and the numbers that make logits of their similarities.

    ``loss`` is ``train.loss``: ``contrastive`` has a scale, ``sigmoid`` a scale and a bias.
    """

    def __init__(self, spec: Model, weights: bool = True, loss: str = "contrastive", padded: bool = False) -> None:
        super().__init__()
        self.image = ImageEncoder(spec.image, spec.embed_dim, weights)
        self.text = TextEncoder(spec.text, spec.embed_dim, weights, spec.context_length if padded else None)
        # Shape [1]: a 0-dim parameter crashes DeepSpeed's set-up.
        scale = SIGMOID_SCALE if loss == "sigmoid" else 1 / INITIAL_TEMPERATURE
        self.log_scale = nn.Parameter(torch.full((1,), math.log(scale)))
        self.bias = nn.Parameter(torch.full((1,), SIGMOID_BIAS)) if loss == "sigmoid" else None

    def forward(self, pixels_BCHW: Tensor | None, text: Packed | None) -> tuple[Tensor, ...]:
        """Unit features [B, embed_dim] of images and of captions, the scale [1], and the bias [1] if any; all fp32.

        With one side alone, the other being None, the features of that side and nothing else: the other tower does not
        run.
        """
        sides: list[Tensor] = []
        if pixels_BCHW is not None:
            sides.append(F.normalize(self.image(pixels_BCHW), dim=-1))
        if text is not None:
            sides.append(F.normalize(self.text(text), dim=-1))
        if pixels_BCHW is None or text is None:
            return tuple(sides)
        numbers = (self.log_scale,) if self.bias is None else (self.log_scale, self.bias)
        scale, *bias = (number.float() for number in numbers)
        return *sides, scale.exp(), *bias


def build(
    spec: Model, seed: int, activation_checkpointing: bool = False, loss: str = "contrastive", padded: bool = False
) -> DualEncoder:
    """The model at its initial weights: towers from disk as they are, all else drawn from ``seed``, in fp32.

    Positions are extended afterwards, so that arms with other windows share those that are kept. Raises UserError
    where they cannot be, or where more layers are to be frozen than a tower has.
    """
    model = DualEncoder(spec, loss=loss, padded=padded)
    loaded = [name for name, tower in (("image.trunk", spec.image), ("text.trunk", spec.text)) if tower.tower]
    draw(model, seed, skip=loaded)
    extend(model.text.trunk, spec.text, spec.context_length)
    if activation_checkpointing:
        model.text.trunk.config.use_cache = False  # BERT's default, of no use here; it would warn in every log
        for encoder in (model.image, model.text):
            # transformers' newer name; the older one warns in every log, and is to go in transformers 6
            enable = getattr(encoder.trunk, "activation_checkpointing_enable", None)
            (enable or encoder.trunk.gradient_checkpointing_enable)({"use_reentrant": False})
    for side, trunk, layers in (
        ("image", model.image.trunk, spec.image.freeze),
        ("text", model.text.trunk, spec.text.freeze),
    ):
        freeze(trunk, layers, f"model.{side}.freeze")
    return model


def as_bf16(model: DualEncoder) -> DualEncoder:
    """``model`` with its parameters in bf16, as DeepSpeed trains them; its buffers stay in fp32.

    ``model.bfloat16()`` would round the rotary frequencies among them: half a radian at position 511.
    """
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16()
    return model


def count_parameters(spec: Model) -> int:
    """Parameters of the whole model, without making it."""
    with torch.device("meta"):
        model = DualEncoder(spec, weights=False)
        extend(model.text.trunk, spec.text, spec.context_length)
    return sum(p.numel() for p in model.parameters())
