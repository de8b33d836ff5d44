"""Towers and heads under open_clip's names (open_clip 3.3: transformer.py, hf_model.py, model.py CustomTextCLIP).

Images: CLIP's and plain ViTs become its own ``VisionTransformer``. That one has no bias behind the patches; a ViT's is
added to the positions of the patches, which is the same sum. Text: its adapter of Hugging Face models knows the BERT
family (3.3 has no ModernBERT).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from longclip.errors import UserError
from longclip.experiment.schema import Model
from longclip.model.clip import DualEncoder
from longclip.model.towers import Pixels

_TEXT = ("bert", "roberta", "xlm-roberta")
_POOLERS = {"mean": "mean_pooler", "cls": "cls_last_hidden_state_pooler"}
_HINT = "longclip export --format transformers"
_ACTIVATIONS = {"gelu": False, "quick_gelu": True}
_MLP = {"mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj"}


def config_of(model: DualEncoder, spec: Model, pixels: Pixels, text_name: str) -> dict[str, Any]:
    """``open_clip_config.json``. Raises UserError where open_clip has no such model."""
    image, text = model.image.trunk.config, model.text.trunk.config
    if image.model_type not in ("clip_vision_model", "vit"):
        raise UserError(f"open_clip: no {image.model_type} image tower; it has clip_vision_model, vit", _HINT)
    if text.model_type not in _TEXT or spec.text.pool not in _POOLERS:
        raise UserError(f"open_clip: no {text.model_type} text tower pooled by {spec.text.pool}", _HINT)
    if spec.image.head != "linear":
        raise UserError(f"open_clip: its image tower ends in a linear head, this one in {spec.image.head}", _HINT)
    if image.hidden_act not in _ACTIVATIONS:
        raise UserError(f"open_clip: no {image.hidden_act} in its image tower; it has gelu, quick_gelu", _HINT)
    vit = image.model_type == "vit"
    mean = spec.image.pool == "mean"
    return {
        "model_cfg": {
            "embed_dim": spec.embed_dim,
            "quick_gelu": _ACTIVATIONS[image.hidden_act],
            "custom_text": True,
            "vision_cfg": {
                "image_size": pixels.size,
                "patch_size": image.patch_size,
                "layers": image.num_hidden_layers,
                "width": image.hidden_size,
                "head_width": image.hidden_size // image.num_attention_heads,
                "mlp_ratio": image.intermediate_size / image.hidden_size,
                "no_ln_pre": vit,
                "pool_type": "avg" if mean else "tok",
                # CLIP's last norm comes behind the pooling, a ViT's before
                "final_ln_after_pool": mean and not vit,
                "norm_kwargs": {"eps": image.layer_norm_eps},
            },
            "text_cfg": {
                "context_length": spec.context_length,
                "vocab_size": text.vocab_size,
                "hf_model_name": text_name,
                "hf_model_pretrained": False,
                "hf_tokenizer_name": text_name,
                "hf_pooler_type": _POOLERS[spec.text.pool],
                "hf_proj_type": "linear" if spec.text.head == "linear" else "mlp",
            },
        },
        "preprocess_cfg": {
            "mean": list(pixels.mean),
            "std": list(pixels.std),
            "interpolation": "bicubic",
            "resize_mode": "shortest",
        },
    }


def weights_of(model: DualEncoder) -> dict[str, Tensor]:
    """``open_clip_model.safetensors``."""
    trunk = {name: tensor.detach() for name, tensor in model.image.trunk.state_dict().items()}
    found = _vit(trunk) if model.image.trunk.config.model_type == "vit" else _clip(trunk)
    found["proj"] = model.image.head.state_dict()["weight"].T
    named = {f"visual.{name}": tensor for name, tensor in found.items()}
    named |= {f"text.transformer.{n}": t for n, t in model.text.trunk.state_dict().items()}
    named |= {f"text.proj.{n}": t for n, t in model.text.head.state_dict().items()}
    named["logit_scale"] = model.log_scale.detach().reshape(())
    return {name: tensor.contiguous().clone() for name, tensor in named.items()}


def _clip(trunk: dict[str, Tensor]) -> dict[str, Tensor]:
    named = {
        "class_embedding": trunk["embeddings.class_embedding"],
        "positional_embedding": trunk["embeddings.position_embedding.weight"],
        "conv1.weight": trunk["embeddings.patch_embedding.weight"],
        **_pair(trunk, "pre_layrnorm", "ln_pre"),
        **_pair(trunk, "post_layernorm", "ln_post"),
    }
    names = {"layer_norm1": "ln_1", "layer_norm2": "ln_2", "self_attn.out_proj": "attn.out_proj", **_MLP}
    return named | _layers(trunk, "encoder.layers", names, "self_attn")


def _vit(trunk: dict[str, Tensor]) -> dict[str, Tensor]:
    positions = trunk["embeddings.position_embeddings"][0].clone()
    positions[1:] += trunk["embeddings.patch_embeddings.projection.bias"]
    named = {
        "class_embedding": trunk["embeddings.cls_token"][0, 0],
        "positional_embedding": positions,
        "conv1.weight": trunk["embeddings.patch_embeddings.projection.weight"],
        **_pair(trunk, "layernorm", "ln_post"),
    }
    names = {"layernorm_before": "ln_1", "layernorm_after": "ln_2", "attention.o_proj": "attn.out_proj", **_MLP}
    return named | _layers(trunk, "layers", names, "attention")


def _layers(trunk: dict[str, Tensor], stack: str, names: dict[str, str], attention: str) -> dict[str, Tensor]:
    """All layers of ``stack``; q, k and v become the one matrix and bias of torch's MultiheadAttention."""
    found: dict[str, Tensor] = {}
    count = 1 + max(int(name.removeprefix(f"{stack}.").split(".")[0]) for name in trunk if name.startswith(stack))
    for layer in range(count):
        ours, theirs = f"{stack}.{layer}", f"transformer.resblocks.{layer}"
        for name, new in names.items():
            found |= _pair(trunk, f"{ours}.{name}", f"{theirs}.{new}")
        qkv = [f"{ours}.{attention}.{x}_proj" for x in "qkv"]
        weights = [trunk[f"{name}.weight"] for name in qkv]
        biases = [trunk.get(f"{name}.bias", w.new_zeros(len(w))) for name, w in zip(qkv, weights, strict=True)]
        found[f"{theirs}.attn.in_proj_weight"] = torch.cat(weights)
        found[f"{theirs}.attn.in_proj_bias"] = torch.cat(biases)
    return found


def _pair(trunk: dict[str, Tensor], ours: str, theirs: str) -> dict[str, Tensor]:
    return {f"{theirs}.{kind}": trunk[f"{ours}.{kind}"] for kind in ("weight", "bias")}
