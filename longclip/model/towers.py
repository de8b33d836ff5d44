"""Towers: transformers' vision and text models, from weights (hub id or folder) or from a config.

A tower made from a config draws its weights module by module from hash(seed, name), so that two models that differ
in one place share every other initial weight.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    BertModel,
    CLIPTextModel,
    CLIPVisionModel,
    ModernBertModel,
    PreTrainedConfig,
    PreTrainedModel,
    RobertaModel,
    SiglipVisionModel,
    ViTModel,
    XLMRobertaModel,
)

from longclip.errors import UserError
from longclip.experiment import kinds
from longclip.experiment.schema import ImageTower, TextTower
from longclip.model.layouts import Layout, layout_of
from longclip.model.packing import PACKED, Packed, runs_varlen

CLASSES: dict[str, type[PreTrainedModel]] = {
    "clip_vision_model": CLIPVisionModel,
    "siglip_vision_model": SiglipVisionModel,
    "vit": ViTModel,
    "modernbert": ModernBertModel,
    "bert": BertModel,
    "roberta": RobertaModel,
    "xlm-roberta": XLMRobertaModel,
    "clip_text_model": CLIPTextModel,
}
_HAVE_POOLER = (ViTModel, BertModel, RobertaModel, XLMRobertaModel)
"""would make a task's head, unless told not to"""

_CLIP_MEAN_STD = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
"""openai/CLIP's normalisation, as its processors carry it"""
_HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
_FILTERS = {2: "bilinear", 3: "bicubic"}


@dataclass(frozen=True)
class Pixels:
    """What an image tower wants to see: square images of ``size`` pixels, normalised per channel."""

    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    whole: bool = False
    """the whole image is squeezed into the square, as SigLIP's and ViT's towers know it; else the middle of it is cut
    out. (Training crops at random, in either case.)"""
    resample: str = "bicubic"
    """or bilinear"""


class ImageEncoder(nn.Module):
    """[B, 3, H, W] pixels -> [B, embed_dim] features (fp32, not normalised)."""

    def __init__(self, spec: ImageTower, embed_dim: int, weights: bool = True) -> None:
        super().__init__()
        settings = _settings(spec.tower, spec.config, "image")
        if why := kinds.image_pool(settings.model_type, spec.pool):
            raise UserError(f"model.image.pool: {why}")
        if isinstance(settings, SiglipVisionModel.config_class):
            settings.vision_use_head = spec.pool == "map"  # else weights that no gradient reaches
        self.trunk = _trunk(spec.tower, settings, "sdpa", weights)
        self.pool = spec.pool
        self.head = _head(spec.head, self.trunk.config.hidden_size, embed_dim)

    def forward(self, pixels_BCHW: Tensor) -> Tensor:
        out = self.trunk(pixel_values=pixels_BCHW.to(next(self.trunk.parameters()).dtype))
        features: Tensor = self.head(self._pooled(out))
        return features.float()

    def _pooled(self, out: Any) -> Tensor:
        """[B, width]; what is pooled has been through the tower's last norm."""
        if self.pool == "map":
            mapped: Tensor = out.pooler_output
            return mapped
        hidden_BND = out.last_hidden_state
        if isinstance(self.trunk, SiglipVisionModel):  # patches only
            return torch.mean(hidden_BND, dim=1)
        pooled_BD: Tensor = hidden_BND[:, 0] if self.pool == "cls" else hidden_BND[:, 1:].mean(dim=1)
        # CLIP leaves the last norm to the pooled token; ViT has applied it to all.
        return self.trunk.post_layernorm(pooled_BD) if isinstance(self.trunk, CLIPVisionModel) else pooled_BD


class TextEncoder(nn.Module):
    """Packed captions -> [B, embed_dim] features (fp32, not normalised)."""

    def __init__(self, spec: TextTower, embed_dim: int, weights: bool = True, pad_to: int | None = None) -> None:
        """``pad_to`` is for comparison: captions are padded to that length inside, instead of running packed."""
        super().__init__()
        settings = _settings(spec.tower, spec.config, "text")
        if why := kinds.text_pool(settings.model_type, spec.pool):
            raise UserError(f"model.text.pool: {why}")
        self.trunk = _trunk(spec.tower, settings, PACKED if pad_to is None else "sdpa", weights)
        self.pool = spec.pool
        self.pad_to = pad_to
        self.offset = kinds.offset(self.trunk.config.to_dict())
        self.head = _head(spec.head, self.trunk.config.hidden_size, embed_dim)

    def forward(self, text: Packed) -> Tensor:
        hidden_TD = self._packed(text) if self.pad_to is None else self._padded(text, self.pad_to)
        pool = {"mean": text.mean_BD, "cls": text.first_BD, "last": text.last_BD}[self.pool]
        features: Tensor = self.head(pool(hidden_TD).to(next(self.head.parameters()).dtype))
        return features.float()

    def attention(self, device: torch.device, dtype: torch.dtype) -> str:
        """How captions are kept apart there, in words: on a GPU in fp32, or with dropout, it is not the fast way."""
        if self.pad_to is not None:
            return f"text padded to {self.pad_to}"
        config = self.trunk.config.to_dict()
        dropout = config.get("attention_dropout") or config.get("attention_probs_dropout_prob") or 0.0
        head_dim = config["hidden_size"] // config["num_attention_heads"]
        return f"text packed, attention {'varlen' if runs_varlen(device, dtype, head_dim, dropout) else 'by length'}"

    def _packed(self, text: Packed) -> Tensor:
        """Hidden states of the tokens, [T, width]."""
        if not len(text.ids_T):  # no tower takes that, and all its weights shall have a gradient: zero
            return self._packed(Packed(text.ids_T.new_zeros(1), (1,), (0,)))[:0]
        ids_1T, positions_1T = text.ids_T[None], (text.positions_T() + self.offset)[None]
        if isinstance(self.trunk, CLIPTextModel):  # its forward refuses more tokens than one caption may have
            rows = self.trunk.embeddings
            embedded_1TD = rows.token_embedding(ids_1T) + rows.position_embedding(positions_1T)
            out = self.trunk.encoder(embedded_1TD, attention_mask=None, is_causal=True, bounds=text.bounds())
            clip_TD: Tensor = self.trunk.final_layer_norm(out.last_hidden_state)[0]
            return clip_TD
        no_mask: Any = {"full_attention": None, "sliding_attention": None}
        hidden_TD: Tensor = self.trunk(
            input_ids=ids_1T,
            position_ids=positions_1T,
            attention_mask=no_mask if isinstance(self.trunk, ModernBertModel) else None,
            bounds=text.bounds(),
        ).last_hidden_state[0]
        return hidden_TD

    def _padded(self, text: Packed, length: int) -> Tensor:
        """The same the usual way, by transformers' own attention and masks over [B, length]: packing's reference."""
        at = text.segments_T(), text.positions_T()
        ids_BL = text.ids_T.new_zeros(len(text), length).index_put(at, text.ids_T)
        mask_BL = torch.zeros_like(ids_BL).index_put(at, torch.ones_like(text.ids_T))
        positions_1L = (torch.arange(length, device=ids_BL.device) + self.offset)[None]
        out = self.trunk(input_ids=ids_BL, attention_mask=mask_BL, position_ids=positions_1L)
        hidden_TD: Tensor = out.last_hidden_state[at]
        return hidden_TD


def _head(kind: str, width: int, embed_dim: int) -> nn.Module:
    """Projection into the joint space, without biases, as in open_clip's text heads."""
    if kind == "linear":
        return nn.Linear(width, embed_dim, bias=False)
    hidden = (width + embed_dim) // 2
    return nn.Sequential(nn.Linear(width, hidden, bias=False), nn.GELU(), nn.Linear(hidden, embed_dim, bias=False))


def _trunk(tower: str | None, settings: PreTrainedConfig, attention: str, weights: bool) -> PreTrainedModel:
    """The tower without pooler or task head, in fp32. Raises UserError where weights are missing."""
    cls = CLASSES[settings.model_type]
    options = {"add_pooling_layer": False} if cls in _HAVE_POOLER else {}
    layout = _layout(tower)
    if tower is not None and weights and layout is None:
        loaded, info = cls.from_pretrained(
            tower,
            config=settings,
            dtype=torch.float32,
            attn_implementation=attention,
            output_loading_info=True,
            **options,
        )
        if missing := sorted(info["missing_keys"]):  # transformers would draw them, and only log it
            raise UserError(
                f"{tower}: its weights lack {len(missing)} of the tower's parameters, such as {missing[0]}",
                f"a folder or hub id with all weights of a {settings.model_type}",
            )
        return loaded
    model = cls(settings, **options)
    if tower is not None and weights and layout is not None:
        try:
            model.load_state_dict(layout.trunk_weights(Path(tower)))
        except RuntimeError as error:
            raise UserError(f"{tower}: {layout.WEIGHTS} is not of its config's shape: {error}") from None
    model.set_attn_implementation(attention)
    return model


def _settings(tower: str | None, config: dict[str, Any] | None, side: str) -> PreTrainedConfig:
    """The configuration of one tower; of a checkpoint with both that of this ``side``."""
    if config is None and tower is not None and side == "image" and (layout := _layout(tower)) is not None:
        config = layout.vision_config(Path(tower))
    if config is None:
        settings = AutoConfig.from_pretrained(tower)
        if settings.model_type not in kinds.known(side):
            raise UserError(f"{tower}: a {settings.model_type} model; known here: {', '.join(kinds.known(side))}")
        return getattr(settings, "vision_config" if side == "image" else "text_config", settings)
    values = dict(config)
    try:
        return AutoConfig.for_model(values.pop("model_type"), **values)
    except (TypeError, ValueError, KeyError) as error:
        raise UserError(f"config of a {config['model_type']} tower: {error}") from None


def _layout(tower: str | None) -> Layout | None:
    """In which the tower lies; None where it is transformers', or has no weights."""
    return None if tower is None else layout_of(Path(tower))


def pixels_of(spec: ImageTower) -> Pixels:
    """What the tower wants to see: from its processor's file where it has one, else as its kind is usually trained.

    A tower without weights has seen nothing yet, and is shown the middle of the image.
    """
    config = _settings(spec.tower, spec.config, "image")
    clip = config.model_type == "clip_vision_model"
    mean, std = _CLIP_MEAN_STD if clip else _HALF
    size = config.image_size if isinstance(config.image_size, int) else config.image_size[0]
    usual = Pixels(size, mean, std)
    if spec.tower is None:
        return usual
    folder = Path(spec.tower)
    if (layout := _layout(spec.tower)) is not None:
        return replace(usual, **layout.preprocessing(folder))
    usual = replace(usual, whole=not clip, resample="bilinear" if config.model_type == "vit" else "bicubic")
    processor = folder / "preprocessor_config.json"
    return replace(usual, **_said(json.loads(processor.read_text("utf-8")))) if processor.is_file() else usual


def _said(processor: dict[str, Any]) -> dict[str, Any]:
    """What a file of transformers' image processors says of :class:`Pixels`. (2 and 3 are Pillow's filters.)"""
    said: dict[str, Any] = {}
    if "image_mean" in processor and "image_std" in processor:
        said |= {"mean": tuple(processor["image_mean"]), "std": tuple(processor["image_std"])}
    size = processor.get("size") or {}
    if processor.get("do_center_crop") or (isinstance(size, dict) and "shortest_edge" in size):
        said["whole"] = False
    elif isinstance(size, int) or "height" in size:  # one number, in older files: both sides
        said["whole"] = True
    if processor.get("resample") in _FILTERS:
        said["resample"] = _FILTERS[processor["resample"]]
    return said


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
