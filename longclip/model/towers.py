"""Towers: transformers' vision and text models, from weights (hub id or folder) or from a config.

A tower made from a config draws its weights module by module from hash(seed, name), so that two models that differ
in one place share every other initial weight.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    AutoConfig,
    BertModel,
    CLIPVisionModel,
    ModernBertModel,
    PreTrainedConfig,
    PreTrainedModel,
    ViTModel,
)

from longclip.errors import UserError
from longclip.experiment.schema import ImageTower, TextTower
from longclip.model.packing import PACKED, Packed

VISION: dict[str, type[PreTrainedModel]] = {
    "clip_vision_model": CLIPVisionModel,
    "clip": CLIPVisionModel,
    "vit": ViTModel,
}
TEXT: dict[str, type[PreTrainedModel]] = {"modernbert": ModernBertModel, "bert": BertModel}

_CLIP_MEAN_STD = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
"""openai/CLIP's normalisation, as its processors carry it"""
_HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


@dataclass(frozen=True)
class Pixels:
    """What an image tower wants to see: square images of ``size`` pixels, normalised per channel."""

    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]


class ImageEncoder(nn.Module):
    """[B, 3, H, W] pixels -> [B, embed_dim] features (fp32, not normalised)."""

    def __init__(self, spec: ImageTower, embed_dim: int, weights: bool = True) -> None:
        super().__init__()
        self.trunk = _trunk(spec.tower, spec.config, VISION, "sdpa", weights)
        self.pool = spec.pool
        self.head = _head(spec.head, self.trunk.config.hidden_size, embed_dim)

    def forward(self, pixels_BCHW: Tensor) -> Tensor:
        out = self.trunk(pixel_values=pixels_BCHW.to(next(self.trunk.parameters()).dtype))
        hidden = out.last_hidden_state
        # CLIP leaves the last norm to the pooled token; ViT has applied it to all.
        norm = self.trunk.post_layernorm if isinstance(self.trunk, CLIPVisionModel) else nn.Identity()
        pooled = hidden[:, 0] if self.pool == "cls" else hidden[:, 1:].mean(dim=1)
        features: Tensor = self.head(norm(pooled))
        return features.float()


class TextEncoder(nn.Module):
    """Packed captions -> [B, embed_dim] features (fp32, not normalised)."""

    def __init__(self, spec: TextTower, embed_dim: int, weights: bool = True) -> None:
        super().__init__()
        self.trunk = _trunk(spec.tower, spec.config, TEXT, PACKED, weights)
        self.pool = spec.pool
        self.head = _head(spec.head, self.trunk.config.hidden_size, embed_dim)

    def forward(self, text: Packed) -> Tensor:
        no_mask: Any = {"full_attention": None, "sliding_attention": None}
        hidden_TD = self.trunk(
            input_ids=text.ids_T[None],
            position_ids=text.positions_T()[None],
            attention_mask=no_mask if isinstance(self.trunk, ModernBertModel) else None,
            groups=text.groups(),
        ).last_hidden_state[0]
        pooled = text.mean_BD(hidden_TD) if self.pool == "mean" else text.first_BD(hidden_TD)
        return self._project(pooled)

    def padded(self, captions: Sequence[Tensor], length: int | None = None) -> Tensor:
        """The same features the usual way: padded to ``length`` (or the longest), masked. The reference for packing."""
        lengths = torch.tensor([len(c) for c in captions])
        ids_BL = pad_sequence(list(captions), batch_first=True)
        if length is not None:
            ids_BL = nn.functional.pad(ids_BL, (0, length - ids_BL.shape[1]))
        mask_BL = torch.arange(ids_BL.shape[1])[None] < lengths[:, None]
        self.trunk.set_attn_implementation("sdpa")
        try:
            hidden_BLD = self.trunk(input_ids=ids_BL, attention_mask=mask_BL.long()).last_hidden_state
        finally:
            self.trunk.set_attn_implementation(PACKED)
        if self.pool == "cls":
            return self._project(hidden_BLD[:, 0].float())
        summed = (hidden_BLD.float() * mask_BL[..., None]).sum(1)
        return self._project(summed / lengths[:, None])

    def _project(self, pooled_BD: Tensor) -> Tensor:
        features: Tensor = self.head(pooled_BD.to(next(self.head.parameters()).dtype))
        return features.float()


def _head(kind: str, width: int, embed_dim: int) -> nn.Module:
    """Projection into the joint space, without biases, as in open_clip's text heads."""
    if kind == "linear":
        return nn.Linear(width, embed_dim, bias=False)
    hidden = (width + embed_dim) // 2
    return nn.Sequential(nn.Linear(width, hidden, bias=False), nn.GELU(), nn.Linear(hidden, embed_dim, bias=False))


def _trunk(
    tower: str | None,
    config: dict[str, Any] | None,
    known: dict[str, type[PreTrainedModel]],
    attention: str,
    weights: bool,
) -> PreTrainedModel:
    """The tower without pooler or task head, in fp32."""
    options: dict[str, Any] = {"attn_implementation": attention}
    settings = _config(tower, config)
    if settings.model_type not in known:
        raise UserError(f"{tower}: a {settings.model_type} model; known here: {', '.join(known)}")
    cls = known[settings.model_type]
    if cls in (ViTModel, BertModel):
        options["add_pooling_layer"] = False
    if tower is not None and weights:
        return cls.from_pretrained(tower, dtype=torch.float32, **options)
    if settings.model_type == "clip":
        settings = settings.vision_config
    options.pop("attn_implementation")
    model = cls(settings, **options)
    model.set_attn_implementation(attention)
    return model


def _config(tower: str | None, config: dict[str, Any] | None) -> PreTrainedConfig:
    if config is None:
        return AutoConfig.from_pretrained(tower)
    values = dict(config)
    try:
        return AutoConfig.for_model(values.pop("model_type"), **values)
    except (TypeError, ValueError, KeyError) as error:
        raise UserError(f"config of a {config['model_type']} tower: {error}") from None


def pixels_of(spec: ImageTower) -> Pixels:
    """What the tower wants to see, from its processor's file where it has one."""
    config = _config(spec.tower, spec.config)
    if config.model_type == "clip":
        config = config.vision_config
    mean, std = _CLIP_MEAN_STD if config.model_type == "clip_vision_model" else _HALF
    processor = Path(spec.tower or "") / "preprocessor_config.json"
    if spec.tower and processor.is_file():
        settings = json.loads(processor.read_text(encoding="utf-8"))
        mean, std = settings.get("image_mean", mean), settings.get("image_std", std)
    size = config.image_size
    return Pixels(size if isinstance(size, int) else size[0], tuple(mean), tuple(std))


def draw(module: nn.Module, seed: int, skip: Sequence[str] = ()) -> None:
    """Draws the weights of ``module``, each submodule's from hash(seed, its name); ``skip`` names loaded submodules."""
    for name, child in reversed(list(module.named_modules())):  # children before parents, as transformers does
        if any(name == s or name.startswith(s + ".") for s in skip):
            continue
        trunk = next(
            (m for n, m in module.named_modules() if isinstance(m, PreTrainedModel) and _inside(name, n)), None
        )
        digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(int.from_bytes(digest[:7], "big"))
            if trunk is not None:
                trunk._init_weights(child)
            elif isinstance(child, nn.Linear):
                nn.init.normal_(child.weight, std=child.in_features**-0.5)


def _inside(name: str, parent: str) -> bool:
    return name == parent or name.startswith(parent + ".")
