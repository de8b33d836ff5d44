"""Towers and heads under open_clip's names (open_clip 3.3: transformer.py, hf_model.py, model.py CustomTextCLIP).

Images: CLIP's and plain ViTs become its own ``VisionTransformer``. That one has no bias behind the patches; a ViT's is
added to the positions of the patches, which is the same sum. Text: CLIP's becomes its own ``TextTransformer``; its
adapter of Hugging Face models knows the BERT family (3.3 has no ModernBERT).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from longclip.errors import UserError
from longclip.experiment.schema import Model
from longclip.model.clip import DualEncoder
from longclip.model.towers import Pixels

_BERTS = ("bert", "roberta", "xlm-roberta")
_POOLERS = {"mean": "mean_pooler", "cls": "cls_last_hidden_state_pooler"}
_HINT = "longclip export --format transformers"
_ACTIVATIONS = {"gelu": False, "quick_gelu": True}
_MLP = {"mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj"}
_CLIP_LAYER = {"layer_norm1": "ln_1", "layer_norm2": "ln_2", "self_attn.out_proj": "attn.out_proj", **_MLP}


def config_of(model: DualEncoder, spec: Model, pixels: Pixels, text_name: str, eos: int | None) -> dict[str, Any]:
    """``open_clip_config.json``; ``eos`` is the tokenizer's end of text. Raises UserError where open_clip has no such
    model."""
    vision, text = _vision_config(model, spec, pixels), _text_config(model, spec, text_name, eos)
    bias = {} if model.bias is None else {"init_logit_bias": 0.0}  # so that there is one; its value is a weight
    return {
        "model_cfg": {
            "embed_dim": spec.embed_dim,
            "quick_gelu": _ACTIVATIONS[model.image.trunk.config.hidden_act],
            "custom_text": True,
            **bias,
            "vision_cfg": vision,
            "text_cfg": text,
        },
        "preprocess_cfg": {
            "mean": list(pixels.mean),
            "std": list(pixels.std),
            "interpolation": pixels.resample,
            "resize_mode": "squash" if pixels.whole else "shortest",
        },
    }


def _vision_config(model: DualEncoder, spec: Model, pixels: Pixels) -> dict[str, Any]:
    image = model.image.trunk.config
    if image.model_type not in ("clip_vision_model", "vit"):
        raise UserError(f"open_clip: no {image.model_type} image tower here; it has clip_vision_model, vit", _HINT)
    if spec.image.head != "linear":
        raise UserError(f"open_clip: its image tower ends in a linear head, this one in {spec.image.head}", _HINT)
    if image.hidden_act not in _ACTIVATIONS:
        raise UserError(f"open_clip: no {image.hidden_act} in its image tower; it has gelu, quick_gelu", _HINT)
    vit, mean = image.model_type == "vit", spec.image.pool == "mean"
    return {
        "image_size": pixels.size,
        "patch_size": image.patch_size,
        "head_width": image.hidden_size // image.num_attention_heads,
        **_stack(image),
        "no_ln_pre": vit,
        "pool_type": "avg" if mean else "tok",
        # CLIP's last norm comes behind the pooling, a ViT's before
        "final_ln_after_pool": mean and not vit,
    }


def _text_config(model: DualEncoder, spec: Model, name: str, eos: int | None) -> dict[str, Any]:
    text = model.text.trunk.config
    common = {"context_length": spec.context_length, "vocab_size": text.vocab_size, "hf_tokenizer_name": name}
    if text.model_type in _BERTS and spec.text.pool in _POOLERS:
        return {
            **common,
            "hf_model_name": name,
            "hf_model_pretrained": False,
            "hf_pooler_type": _POOLERS[spec.text.pool],
            "hf_proj_type": "linear" if spec.text.head == "linear" else "mlp",
        }
    if text.model_type != "clip_text_model" or spec.text.pool != "last" or spec.text.head != "linear":
        what = f"{text.model_type} text tower pooled by {spec.text.pool} with a {spec.text.head} head"
        raise UserError(f"open_clip: no {what}", _HINT)
    if text.hidden_act != model.image.trunk.config.hidden_act:
        raise UserError("open_clip: one activation for both towers, these have two", _HINT)
    if eos is None:
        raise UserError("open_clip: pools at the end of text, a token which this tokenizer does not have", _HINT)
    return {**common, "heads": text.num_attention_heads, **_stack(text), "pool_type": "eos", "eos_id": eos}


def _stack(config: Any) -> dict[str, Any]:
    return {
        "layers": config.num_hidden_layers,
        "width": config.hidden_size,
        "mlp_ratio": config.intermediate_size / config.hidden_size,
        "norm_kwargs": {"eps": config.layer_norm_eps},
    }


def weights_of(model: DualEncoder, spec: Model) -> dict[str, Tensor]:
    """``open_clip_model.safetensors``."""
    image = {name: tensor.detach() for name, tensor in model.image.trunk.state_dict().items()}
    found = _vit(image) if model.image.trunk.config.model_type == "vit" else _clip(image)
    named = {f"visual.{name}": tensor for name, tensor in found.items()}
    named["visual.proj"] = model.image.head.state_dict()["weight"].T
    text = {name: tensor.detach() for name, tensor in model.text.trunk.state_dict().items()}
    if model.text.trunk.config.model_type in _BERTS:
        named |= {f"text.transformer.{n}": t for n, t in text.items()}
        named |= {f"text.proj.{n}": t for n, t in model.text.head.state_dict().items()}
    else:
        named |= {f"text.{n}": t for n, t in _clip_text(text, spec.context_length).items()}
        named["text.text_projection"] = model.text.head.state_dict()["weight"].T
    named["logit_scale"] = model.log_scale.detach().reshape(())
    if model.bias is not None:
        named["logit_bias"] = model.bias.detach().reshape(())
    return {name: tensor.contiguous().clone() for name, tensor in named.items()}


def _clip(trunk: dict[str, Tensor]) -> dict[str, Tensor]:
    named = {
        "class_embedding": trunk["embeddings.class_embedding"],
        "positional_embedding": trunk["embeddings.position_embedding.weight"],
        "conv1.weight": trunk["embeddings.patch_embedding.weight"],
        **_pair(trunk, "pre_layrnorm", "ln_pre"),
        **_pair(trunk, "post_layernorm", "ln_post"),
    }
    return named | _layers(trunk, "encoder.layers", _CLIP_LAYER, "self_attn")


def _clip_text(trunk: dict[str, Tensor], window: int) -> dict[str, Tensor]:
    named = {
        "token_embedding.weight": trunk["embeddings.token_embedding.weight"],
        "positional_embedding": trunk["embeddings.position_embedding.weight"][:window],
        **_pair(trunk, "final_layer_norm", "ln_final"),
    }
    return named | _layers(trunk, "encoder.layers", _CLIP_LAYER, "self_attn")


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
