"""open_clip's image towers: a ViT saved as ``visual.*`` becomes transformers' CLIP vision model, weight by weight.

The folder is as open_clip writes it for the hub: ``open_clip_config.json`` and ``open_clip_model.safetensors``
(DFN-2B's ViT-L/14, the paper's, has this form). Only the trunk is taken: ``visual.proj``, the text tower and the
temperature belong to another joint space.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from longclip.errors import UserError
from longclip.experiment.identity import OPEN_CLIP

if TYPE_CHECKING:
    from torch import Tensor

WEIGHTS = "open_clip_model.safetensors"

_SHAPE = {"image_size", "layers", "width", "patch_size", "head_width", "mlp_ratio", "norm_kwargs"}
_NO_MATTER = {"patch_dropout", "output_tokens", "pool_type", "final_ln_after_pool"}
"""of no effect on the features of whole images, or on the trunk: how it is pooled, the experiment says"""
_NAMES = (
    ("conv1.", "embeddings.patch_embedding."),
    ("ln_pre.", "pre_layrnorm."),
    ("ln_post.", "post_layernorm."),
    ("transformer.resblocks.", "encoder.layers."),
    (".ln_1.", ".layer_norm1."),
    (".ln_2.", ".layer_norm2."),
    (".attn.out_proj.", ".self_attn.out_proj."),
    (".mlp.c_fc.", ".mlp.fc1."),
    (".mlp.c_proj.", ".mlp.fc2."),
)


def wrote(folder: Path) -> bool:
    """Whether open_clip wrote it, and transformers did not."""
    return (folder / OPEN_CLIP).is_file() and not (folder / "config.json").is_file()


def vision_config(folder: Path) -> dict[str, Any]:
    """The tower in transformers' words. Raises UserError where it is no plain ViT."""
    model = _config(folder)["model_cfg"]
    vision: dict[str, Any] = model["vision_cfg"]
    other = sorted(k for k, v in vision.items() if k not in _SHAPE | _NO_MATTER and v not in (None, False))
    norm: dict[str, Any] = vision.get("norm_kwargs") or {}
    other += sorted(f"norm_kwargs.{k}" for k in norm.keys() - {"eps"})
    if other or not isinstance(vision.get("layers"), int):
        raise UserError(
            f"{folder}: no plain ViT of open_clip's ({', '.join(other) or 'a ResNet'}); known here: {_SHAPE}"
        )
    width = vision["width"]
    return {
        "model_type": "clip_vision_model",
        "image_size": vision["image_size"],
        "patch_size": vision["patch_size"],
        "hidden_size": width,
        "intermediate_size": int(width * vision.get("mlp_ratio", 4.0)),
        "num_hidden_layers": vision["layers"],
        "num_attention_heads": width // vision.get("head_width", 64),
        "hidden_act": "quick_gelu" if model.get("quick_gelu") else "gelu",
        "layer_norm_eps": norm.get("eps", 1e-5),
    }


def preprocessing(folder: Path) -> dict[str, Any]:
    """What the folder says of how the tower was shown its images, by field of :class:`longclip.model.towers.Pixels`.

    Raises UserError where that cannot be done here.
    """
    said = _config(folder).get("preprocess_cfg") or {}
    mode, resample = said.get("resize_mode", "shortest"), said.get("interpolation", "bicubic")
    if mode not in ("shortest", "squash"):
        raise UserError(f"{folder / OPEN_CLIP}: resize_mode {mode}; known here: shortest, squash")
    fields = {name: tuple(said[name]) for name in ("mean", "std") if name in said}
    return {**fields, "whole": mode == "squash", "resample": "bilinear" if resample == "bilinear" else "bicubic"}


def trunk_weights(folder: Path) -> dict[str, Tensor]:
    """``visual.*`` under the names of transformers' CLIPVisionModel. Raises UserError without a safetensors file."""
    from safetensors import safe_open

    file = folder / WEIGHTS
    if not file.is_file():
        raise UserError(f"{folder}: no {WEIGHTS}; pickled weights are not read", "save them with safetensors")
    found: dict[str, Tensor] = {}
    with safe_open(file, framework="pt") as saved:
        for name in saved.keys():  # noqa: SIM118  (no mapping)
            if name.startswith("visual.") and name != "visual.proj":
                found.update(_renamed(name.removeprefix("visual."), saved.get_tensor(name).float()))
    return found


def _renamed(name: str, weight: Tensor) -> dict[str, Tensor]:
    if name == "class_embedding":
        return {"embeddings.class_embedding": weight}
    if name == "positional_embedding":
        return {"embeddings.position_embedding.weight": weight}
    for theirs, ours in _NAMES:
        name = name.replace(theirs, ours, 1)
    if ".attn.in_proj_" in name:  # q, k and v, one below the other
        block, kind = name.split(".attn.in_proj_")
        return {f"{block}.self_attn.{x}_proj.{kind}": w for x, w in zip("qkv", weight.chunk(3), strict=True)}
    return {name: weight}


def _config(folder: Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads((folder / OPEN_CLIP).read_text(encoding="utf-8"))
        content["model_cfg"]["vision_cfg"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder / OPEN_CLIP}: cannot be read: {error!r}") from None
    return content
