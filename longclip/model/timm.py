"""timm's image towers: a plain ViT saved for the hub becomes transformers', weight by weight.

The folder is as timm writes it: ``config.json``, which names the architecture, and ``model.safetensors``, of whose
shapes the tower's is read. A tower with a norm before its first layer (``norm_pre``, those trained as CLIP's) becomes
transformers' CLIP vision model, which has no bias behind the patches: it is added to their positions, which is the same
sum. One without becomes its ViT. The classifier (``head``) is left out.

Refused is what these two do not compute: register and distillation tokens, LayerScale, gated MLPs, norms of queries and
keys, pooling by attention, towers without a class token. Where the last norm is of the mean of the patches
(``fc_norm``), CLIP's, which norms what was pooled, can take it; a ViT's norms each patch before.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from longclip.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

WEIGHTS = "model.safetensors"
CONFIG = "config.json"

_HEADS = {1152: 16, 1280: 16, 1408: 16, 1664: 16}
"""of the widths whose heads are not 64 wide: so400m, huge, giant, gigantic"""
_SEEN = {
    *("in_chans", "img_size", "patch_size", "embed_dim", "depth", "mlp_ratio", "qkv_bias", "proj_bias", "qk_norm"),
    *("init_values", "class_token", "reg_tokens", "pos_embed", "no_embed_class", "pre_norm", "final_norm", "fc_norm"),
}
"""of ``model_args``, what the tensors show"""
_NO_MATTER = {
    *("num_classes", "global_pool", "weight_init", "fix_init", "strict_img_size", "dynamic_img_size"),
    *("drop_rate", "pos_drop_rate", "patch_drop_rate", "proj_drop_rate", "attn_drop_rate", "drop_path_rate"),
}
"""of ``model_args``, what is not the trunk's, or of no effect on its features"""
_LAYER = ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
_VIT = {
    "patch_embed.proj": "embeddings.patch_embeddings.projection",
    "norm": "layernorm",
    "norm1": "layernorm_before",
    "attn": "attention",
    "attn.proj": "attention.o_proj",
    "norm2": "layernorm_after",
    "blocks": "layers",
}
_CLIP = {
    "patch_embed.proj": "embeddings.patch_embedding",
    "norm_pre": "pre_layrnorm",
    "norm": "post_layernorm",
    "fc_norm": "post_layernorm",
    "norm1": "layer_norm1",
    "attn": "self_attn",
    "attn.proj": "self_attn.out_proj",
    "norm2": "layer_norm2",
    "blocks": "encoder.layers",
}


def wrote(folder: Path) -> bool:
    """Whether timm wrote it: its ``config.json`` names an architecture, and no ``model_type``."""
    try:
        content = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(content, dict) and "architecture" in content and "model_type" not in content


def vision_config(folder: Path) -> dict[str, Any]:
    """The tower in transformers' words, by the shapes of its weights. Raises UserError where it is no plain ViT."""
    said, shapes = _config(folder), _shapes(folder)
    name = str(said["architecture"])
    args = {k: v for k, v in (said.get("model_args") or {}).items() if v is not None}
    if other := sorted(args.keys() - _SEEN - _NO_MATTER - {"num_heads"}):
        raise UserError(f"{folder}: no plain ViT of timm's: {CONFIG} has model_args.{other[0]}")
    _check_names(folder, shapes)
    clip = "norm_pre.weight" in shapes
    width, channels, patch, _ = shapes["patch_embed.proj.weight"]
    if channels != 3:
        raise UserError(f"{folder}: takes images of {channels} channels; here they have three, RGB")
    side = math.isqrt(shapes["pos_embed"][-2] - 1)
    if side**2 + 1 != shapes["pos_embed"][-2]:
        raise UserError(
            f"{folder}: no plain ViT of timm's: pos_embed has {shapes['pos_embed'][-2]} positions, "
            "not those of a class token and a square of patches"
        )
    heads = args.get("num_heads", _HEADS.get(width, 0 if width % 64 else width // 64))
    if not heads or width % heads:
        raise UserError(f"{folder}: how many heads share a width of {width} is not known", f"{CONFIG}: model_args")
    return {
        "model_type": "clip_vision_model" if clip else "vit",
        "image_size": side * patch,
        "patch_size": patch,
        "hidden_size": width,
        "intermediate_size": shapes["blocks.0.mlp.fc1.weight"][0],
        "num_hidden_layers": _depth(shapes),
        "num_attention_heads": heads,
        "hidden_act": "quick_gelu" if "quickgelu" in name else "gelu",
        "layer_norm_eps": 1e-5 if "clip" in name else 1e-6,
    }


def preprocessing(folder: Path) -> dict[str, Any]:
    """What the folder says of how the tower was shown its images, by field of :class:`longclip.model.towers.Pixels`.

    timm's evaluation makes the shortest side ``size / crop_pct`` pixels and cuts out the middle. Here the whole middle
    square is taken: the same at a ``crop_pct`` of 1, a little more of the image at less. Raises UserError at a
    ``crop_mode`` that is not known here.
    """
    said: dict[str, Any] = _config(folder)["pretrained_cfg"]
    mode = said.get("crop_mode") or "center"
    if mode not in ("center", "squash"):
        raise UserError(f"{folder / CONFIG}: crop_mode {mode}; known here: center, squash")
    fields: dict[str, Any] = {name: tuple(said[name]) for name in ("mean", "std") if name in said}
    resample = "bilinear" if said.get("interpolation") == "bilinear" else "bicubic"
    return {**fields, "whole": mode == "squash", "resample": resample}


def trunk_weights(folder: Path) -> dict[str, Tensor]:
    """All but the head under the names of transformers' ViTModel or CLIPVisionModel."""
    from safetensors.torch import load_file

    saved = {n: w.float() for n, w in load_file(folder / WEIGHTS).items() if not n.startswith("head.")}
    positions = saved.pop("pos_embed")
    if "norm_pre.weight" not in saved:
        found = {"embeddings.cls_token": saved.pop("cls_token"), "embeddings.position_embeddings": positions}
        names = _VIT
    else:
        positions = positions[0].clone()
        if (bias := saved.pop("patch_embed.proj.bias", None)) is not None:
            positions[1:] += bias
        token = saved.pop("cls_token").flatten()
        found = {"embeddings.class_embedding": token, "embeddings.position_embedding.weight": positions}
        names = _CLIP
    for name, weight in saved.items():
        found.update(_renamed(name, weight, names))
    return found


def _renamed(name: str, weight: Tensor, names: dict[str, str]) -> dict[str, Tensor]:
    part, _, kind = name.rpartition(".")
    if not part.startswith("blocks."):
        return {f"{names[part]}.{kind}": weight}
    _, layer, part = part.split(".", 2)
    block = f"{names['blocks']}.{layer}"
    if part == "attn.qkv":  # one below the other
        split = zip("qkv", weight.chunk(3), strict=True)
        return {f"{block}.{names['attn']}.{x}_proj.{kind}": w for x, w in split}
    return {f"{block}.{names.get(part, part)}.{kind}": weight}


def _check_names(folder: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    """Raises UserError at the first tensor that a plain ViT does not have, or has and is not here."""
    clip = "norm_pre.weight" in shapes
    last = "norm" if "norm.weight" in shapes or not clip else "fc_norm"
    layers = [f"blocks.{i}.{part}" for i in range(_depth(shapes)) for part in _LAYER]
    parts = ["patch_embed.proj", *(["norm_pre"] if clip else []), *layers, last]
    wanted = ["cls_token", "pos_embed", *(f"{part}.{kind}" for part in parts for kind in ("weight", "bias"))]
    known = set(wanted)
    if clip:
        wanted.remove("patch_embed.proj.bias")
    for name in shapes:
        if name not in known and not name.startswith("head."):
            raise UserError(f"{folder}: no plain ViT of timm's: {WEIGHTS} has {name}")
    for name in wanted:
        if name not in shapes:
            raise UserError(f"{folder}: no plain ViT of timm's: {WEIGHTS} lacks {name}")


def _depth(shapes: dict[str, tuple[int, ...]]) -> int:
    layers = [name.split(".")[1] for name in shapes if name.startswith("blocks.")]
    return 1 + max((int(layer) for layer in layers if layer.isdecimal()), default=0)


def _shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """By name. A safetensors file begins with its header's length (8 bytes, little end first) and the header, JSON."""
    file = folder / WEIGHTS
    if not file.is_file():
        raise UserError(f"{folder}: no {WEIGHTS}; pickled weights are not read", "save them with safetensors")
    try:
        with file.open("rb") as opened:
            header = json.loads(opened.read(int.from_bytes(opened.read(8), "little")))
        return {name: tuple(header[name]["shape"]) for name in sorted(header.keys() - {"__metadata__"})}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, MemoryError) as error:
        raise UserError(f"{file} cannot be read: {error!r}") from None


def _config(folder: Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        content["architecture"], content["pretrained_cfg"].keys()
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{folder / CONFIG}: cannot be read: {error!r}") from None
    return content
