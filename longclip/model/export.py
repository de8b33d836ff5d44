"""A trained model as folders that others load without this package.

``transformers``: each tower as transformers saves it, with its tokenizer or image processor, and the heads beside them.
No class of transformers holds the pair: ``VisionTextDualEncoderModel`` projects its text tower's ``pooler_output``,
which passes a tanh for BERT and is not there for ModernBERT, so neither mean pooling nor the plain first token fits it.
The lines that put towers and heads together stand in the README, and a test runs them.

    image/             config.json model.safetensors preprocessor_config.json
    text/              config.json model.safetensors, the tokenizer
    heads.safetensors  image.*, text.*, log_scale
    README.md          the model card

``open_clip``: its layout for a local folder or the hub; see ``to_openclip.py``.
"""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from longclip.experiment.schema import Model
from longclip.model.clip import DualEncoder
from longclip.model.to_openclip import config_of, weights_of
from longclip.model.towers import Pixels, pixels_of


def write_transformers(folder: Path, model: DualEncoder, spec: Model, tokenizer: str) -> str:
    """Writes towers and heads; ``spec`` has folders of this machine. Returns the lines of Python that use them."""
    for side in ("image", "text"):
        _quietly(getattr(model, side).trunk.save_pretrained, folder / side)
    _save_tokenizer(folder / "text", spec, tokenizer)
    _write(folder / "image" / "preprocessor_config.json", _processor(pixels_of(spec.image)))
    heads: dict[str, Tensor] = {
        f"{side}.{name}": tensor
        for side in ("image", "text")
        for name, tensor in getattr(model, side).head.state_dict().items()
    }
    alone = {name: p.detach() for name, p in model.named_parameters() if "." not in name}  # the temperature
    save_file({**heads, **alone}, folder / "heads.safetensors")
    return _recipe(model, spec)


def write_openclip(folder: Path, model: DualEncoder, spec: Model, tokenizer: str, name: str) -> str:
    """Writes open_clip's two files, and the text tower's config and tokenizer.

    ``name`` is the text tower's hub id, or the path that ``folder/text`` will have. Returns the lines of Python that
    use them. Raises UserError where open_clip has no such towers.
    """
    config = config_of(model, spec, pixels_of(spec.image), name)
    _quietly(model.text.trunk.config.save_pretrained, folder / "text")
    _save_tokenizer(folder / "text", spec, tokenizer)
    _write(folder / "open_clip_config.json", config)
    save_file(weights_of(model), folder / "open_clip_model.safetensors")
    return _OPENCLIP


def _save_tokenizer(folder: Path, spec: Model, source: str) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(source)
    tokenizer.model_max_length = spec.context_length
    tokenizer.save_pretrained(folder)


def _processor(pixels: Pixels) -> dict[str, Any]:
    """Evaluation's preprocessing in the words of transformers: shortest side, middle square, normalised."""
    return {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": pixels.size},
        "resample": 3,
        "do_center_crop": True,
        "crop_size": {"height": pixels.size, "width": pixels.size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(pixels.mean),
        "image_std": list(pixels.std),
    }


def _write(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _quietly(save: Any, folder: Path) -> None:
    """transformers draws a progress bar even for one small file."""
    with contextlib.redirect_stderr(io.StringIO()):
        save(folder)


# ---- the lines of the model card ---------------------------------------------------------------------------------

_RECIPE = """\
import torch
from safetensors.torch import load_file
from torch.nn import functional as F
from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

folder = "."  # where this file lies
heads = load_file(f"{{folder}}/heads.safetensors")
image_tower = AutoModel.from_pretrained(f"{{folder}}/image"{image_options}).eval()
text_tower = AutoModel.from_pretrained(f"{{folder}}/text"{text_options}).eval()
processor = AutoImageProcessor.from_pretrained(f"{{folder}}/image")
tokenizer = AutoTokenizer.from_pretrained(f"{{folder}}/text")


@torch.no_grad()
def embed_images(pixel_values):  # [B, 3, {size}, {size}] -> [B, {dim}], unit length
    hidden = image_tower(pixel_values=pixel_values).last_hidden_state
    pooled = {image_pool}
    return F.normalize({image_head}, dim=-1)


@torch.no_grad()
def embed_texts(input_ids, attention_mask):  # [B, L] -> [B, {dim}], unit length
    hidden = text_tower(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
    pooled = {text_pool}
    return F.normalize({text_head}, dim=-1)


# images: list of PIL images; captions: list of str
def similarities(images, captions):  # cosine, [images, captions]
    pixels = processor(images, return_tensors="pt")["pixel_values"]
    tokens = tokenizer(captions, padding=True, truncation=True, max_length={window}, return_tensors="pt")
    return embed_images(pixels) @ embed_texts(tokens["input_ids"], tokens["attention_mask"]).T
"""

_TEXT_POOLS = {
    "mean": "(hidden * attention_mask[..., None]).sum(1) / attention_mask.sum(1, keepdim=True)",
    "cls": "hidden[:, 0]",
}
_HEADS = {
    "linear": 'F.linear(pooled, heads["{side}.weight"])',
    "mlp2": 'F.linear(F.gelu(F.linear(pooled, heads["{side}.0.weight"])), heads["{side}.2.weight"])',
}
_WITHOUT_POOLER = ("vit", "bert")


def _recipe(model: DualEncoder, spec: Model) -> str:
    kinds = {side: getattr(model, side).trunk.config.model_type for side in ("image", "text")}
    options = {
        f"{side}_options": ", add_pooling_layer=False" if kind in _WITHOUT_POOLER else ""
        for side, kind in kinds.items()
    }
    pooled = "hidden[:, 0]" if spec.image.pool == "cls" else "hidden[:, 1:].mean(1)"
    return _RECIPE.format(
        **options,
        size=pixels_of(spec.image).size,
        dim=spec.embed_dim,
        window=spec.context_length,
        image_pool=f"image_tower.post_layernorm({pooled})" if kinds["image"] == "clip_vision_model" else pooled,
        text_pool=_TEXT_POOLS[spec.text.pool],
        image_head=_HEADS[spec.image.head].format(side="image"),
        text_head=_HEADS[spec.text.head].format(side="text"),
    )


_OPENCLIP = """\
import open_clip

folder = "."  # where this file lies
model, preprocess = open_clip.create_model_from_pretrained(f"local-dir:{folder}")
tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
"""
