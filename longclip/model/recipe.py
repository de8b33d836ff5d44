"""The lines of Python in a model card: how an export is used without this package. A test runs them."""

from __future__ import annotations

from longclip.experiment.schema import Model
from longclip.model.clip import DualEncoder
from longclip.model.towers import pixels_of

_TOWERS = """\
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
    out = image_tower(pixel_values=pixel_values)
    pooled = {image_pool}
    return F.normalize({image_head}, dim=-1)


@torch.no_grad()
def embed_texts(input_ids, attention_mask):  # [B, L] -> [B, {dim}], unit length
    hidden = text_tower(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
    pooled = {text_pool}
    return F.normalize({text_head}, dim=-1)
"""
_SIMILARITIES = """

# images: list of PIL images; captions: list of str
def similarities(images, captions):  # cosine, [images, captions]
    pixels = processor(images, return_tensors="pt")["pixel_values"]
    tokens = tokenizer(captions, padding=True, truncation=True, max_length={window}, return_tensors="pt")
    return embed_images(pixels) @ embed_texts(tokens["input_ids"], tokens["attention_mask"]).T
"""
_WHOLE = """\
import torch
from torch.nn import functional as F
from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel

folder = "."  # where this file lies
model = CLIPModel.from_pretrained(folder).eval()
processor = AutoImageProcessor.from_pretrained(folder)
tokenizer = AutoTokenizer.from_pretrained(folder)


@torch.no_grad()
def embed_images(pixel_values):
    return F.normalize(model.get_image_features(pixel_values=pixel_values).pooler_output, dim=-1)


@torch.no_grad()
def embed_texts(input_ids, attention_mask):
    features = model.get_text_features(input_ids=input_ids, attention_mask=attention_mask)
    return F.normalize(features.pooler_output, dim=-1)
"""

_TEXT_POOLS = {
    "mean": "(hidden * attention_mask[..., None]).sum(1) / attention_mask.sum(1, keepdim=True)",
    "cls": "hidden[:, 0]",
    "last": "hidden[torch.arange(len(hidden)), attention_mask.sum(1) - 1]",
}
_HEADS = {
    "linear": 'F.linear(pooled, heads["{side}.weight"])',
    "mlp2": 'F.linear(F.gelu(F.linear(pooled, heads["{side}.0.weight"])), heads["{side}.2.weight"])',
}
_WITHOUT_POOLER = ("vit", "bert", "roberta", "xlm-roberta")


def of_towers(model: DualEncoder, spec: Model) -> str:
    """For towers in folders of their own and ``heads.safetensors``."""
    kinds = {side: getattr(model, side).trunk.config.model_type for side in ("image", "text")}
    options = {
        f"{side}_options": ", add_pooling_layer=False" if kind in _WITHOUT_POOLER else ""
        for side, kind in kinds.items()
    }
    pooled = {
        "cls": "out.last_hidden_state[:, 0]",
        "mean": "out.last_hidden_state[:, 1:].mean(1)",
        "map": "out.pooler_output",
    }[spec.image.pool]
    if kinds["image"] == "siglip_vision_model" and spec.image.pool == "mean":  # it has no class token
        pooled = "out.last_hidden_state.mean(1)"
    return (_TOWERS + _SIMILARITIES).format(
        **options,
        size=pixels_of(spec.image).size,
        dim=spec.embed_dim,
        window=spec.context_length,
        image_pool=f"image_tower.post_layernorm({pooled})" if kinds["image"] == "clip_vision_model" else pooled,
        text_pool=_TEXT_POOLS[spec.text.pool],
        image_head=_HEADS[spec.image.head].format(side="image"),
        text_head=_HEADS[spec.text.head].format(side="text"),
    )


OPEN_CLIP = """\
import open_clip

folder = "."  # where this file lies
model, preprocess = open_clip.create_model_from_pretrained(f"local-dir:{folder}")
tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
"""


def of_clip(spec: Model) -> str:
    """For a ``CLIPModel``."""
    return _WHOLE + _SIMILARITIES.format(window=spec.context_length)
