"""How large a tower is, and what it computes, from its configuration alone: no torch, so that submit can say it too.

Counts are those of the modules in ``model/towers.py`` (a test compares them). FLOPs are those that the mathematics
needs, a multiplication and an addition counting as two: matrix products and attention over the positions that see each
other; norms, activations and what an implementation computes beyond it (masked scores, recomputation) do not count.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from longclip.errors import UserError
from longclip.experiment import kinds
from longclip.experiment.schema import Model

_VISION = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
_BERT = {**_VISION, "vocab_size": 30522, "max_position_embeddings": 512, "type_vocab_size": 2}
_DEFAULTS: dict[str, dict[str, Any]] = {
    "vit": {**_VISION, "image_size": 224, "patch_size": 16, "hidden_act": "gelu"},
    "clip_vision_model": {**_VISION, "image_size": 224, "patch_size": 32, "hidden_act": "quick_gelu"},
    "siglip_vision_model": {**_VISION, "image_size": 224, "patch_size": 16, "hidden_act": "gelu_pytorch_tanh"},
    "bert": {**_BERT, "hidden_act": "gelu", "hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1},
    "roberta": {
        **_BERT,
        "vocab_size": 50265,
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.1,
        "attention_probs_dropout_prob": 0.1,
    },
    "modernbert": {
        **_VISION,
        "intermediate_size": 1152,
        "num_hidden_layers": 22,
        "vocab_size": 50368,
        "max_position_embeddings": 8192,
        "hidden_activation": "gelu",
        "global_attn_every_n_layers": 3,
        "local_attention": 128,
    },
    "clip_text_model": {
        "hidden_size": 512,
        "intermediate_size": 2048,
        "num_hidden_layers": 12,
        "num_attention_heads": 8,
        "vocab_size": 49408,
        "max_position_embeddings": 77,
        "hidden_act": "quick_gelu",
    },
}
_DEFAULTS["xlm-roberta"] = {**_DEFAULTS["roberta"], "vocab_size": 30522}
"""What transformers takes where a configuration is silent"""


@dataclass(frozen=True)
class Tower:
    """One tower's trunk, in the numbers that size, memory and time follow from."""

    kind: str
    layers: int
    width: int
    heads: int
    inner: int
    """width of the MLP's hidden layer"""
    gated: bool
    """the MLP multiplies two such layers (ModernBERT's GLU)"""
    activation: str
    dropout: float
    """of the residual branches"""
    embedding: int
    """parameters before the first layer"""
    norms: int
    """parameters behind the last layer, and of CLIP's norm before the first"""
    layer: int
    """parameters of a layer (ModernBERT's first has one norm less: see ``parameters``)"""
    tokens: int = 0
    """positions of an image; 0 for text"""
    patches: int = 0
    """of these, without the class token"""
    patch: int = 0
    """numbers in a patch, of which the image tower's first matrix makes a position; 0 for text"""
    local: int = 0
    """a position of a local layer sees those at a distance of up to this; 0 where all layers are global"""
    global_every: int = 1
    causal: bool = False
    largest: int = 0
    """elements of the largest parameter"""
    pixels: int = 0
    """of an image; 0 for text"""
    frozen: int = 0
    """lowest layers that are not trained, nor anything before them"""

    @property
    def parameters(self) -> int:
        first = self.width if self.kind == "modernbert" else 0
        return self.embedding + self.norms + self.layers * self.layer - first

    @property
    def trained(self) -> int:
        """Of ``parameters``, those that are trained."""
        if not self.frozen:
            return self.parameters
        return self.norms * (self.frozen < self.layers) + (self.layers - self.frozen) * self.layer

    @property
    def matrix(self) -> int:
        """Weights of a layer that every token is multiplied with."""
        return 4 * self.width**2 + (3 if self.gated else 2) * self.width * self.inner

    def forward_flops(self, lengths: Iterable[int]) -> int:
        """FLOPs of one forward over sequences of ``lengths`` tokens."""
        whole = -(-self.layers // self.global_every)
        total = 0
        for n in lengths:
            total += 2 * n * self.layers * self.matrix + 2 * self.patches * self.width * self.patch
            seen = n * (n + 1) // 2 if self.causal else n * n
            total += 4 * self.width * (whole * seen + (self.layers - whole) * _pairs(n, self.local))
        return total

    def step_flops(self, lengths: Iterable[int]) -> float:
        """FLOPs of forward and backward, which costs twice as much as the forward of the layers that are trained."""
        return self.forward_flops(lengths) * (1 + 2 * (self.layers - self.frozen) / self.layers)


def _pairs(n: int, reach: int) -> int:
    """Pairs of positions of ``n`` that are at most ``reach`` apart."""
    far = min(reach, n - 1)
    return n * (2 * far + 1) - far * (far + 1)


@dataclass(frozen=True)
class Shape:
    """The dual encoder."""

    image: Tower
    text: Tower
    image_head: int
    """parameters, each of which is a multiplication and an addition for every image"""
    text_head: int
    embed_dim: int
    numbers: int = 1
    """temperature, and the sigmoid loss's bias"""

    def parameters(self) -> dict[str, int]:
        """By part, in the order of the model."""
        return {
            "image trunk": self.image.parameters,
            "image head": self.image_head,
            "text trunk": self.text.parameters,
            "text head": self.text_head,
            "temperature" if self.numbers == 1 else "temperature, bias": self.numbers,
        }

    @property
    def total(self) -> int:
        return sum(self.parameters().values())

    @property
    def trained(self) -> int:
        heads = self.image_head + self.text_head
        return self.image.trained + self.text.trained + heads + self.numbers

    def step_flops(self, lengths: Iterable[int], images: int) -> float:
        """FLOPs of forward and backward over captions of ``lengths`` tokens and ``images`` images.

        The similarities are left out: they belong to the batch, not to a sample.
        """
        captions = list(lengths)
        image = images * self.image.step_flops([self.image.tokens])
        heads = 6 * (images * self.image_head + len(captions) * self.text_head)
        return image + self.text.step_flops(captions) + heads


def shape_of(model: Model, image: Mapping[str, Any], text: Mapping[str, Any], loss: str = "contrastive") -> Shape:
    """Of a model with towers of these transformers configurations (``config.json``'s content); ``train.loss``.

    Raises UserError where a kind of tower is not known here.
    """
    of_text = dict(text)
    if model.text.positions and text.get("model_type") in kinds.TEXT and not kinds.TEXT[text["model_type"]].rotary:
        longest = max(kinds.reach(text), model.context_length)
        of_text["max_position_embeddings"] = longest + kinds.offset(text)
    towers = {"image": tower_of(image, model.image.pool), "text": tower_of(of_text)}
    towers = {side: replace(t, frozen=_frozen(getattr(model, side).freeze, t)) for side, t in towers.items()}
    heads = {side: _head(getattr(model, side).head, t.width, model.embed_dim) for side, t in towers.items()}
    numbers = 2 if loss == "sigmoid" else 1
    return Shape(towers["image"], towers["text"], heads["image"], heads["text"], model.embed_dim, numbers)


def _frozen(freeze: int | str | None, tower: Tower) -> int:
    return tower.layers if freeze == "all" else min(int(freeze or 0), tower.layers)


def _head(kind: str, width: int, embed_dim: int) -> int:
    hidden = (width + embed_dim) // 2
    return width * embed_dim if kind == "linear" else width * hidden + hidden * embed_dim


def tower_of(config: Mapping[str, Any], pool: str = "") -> Tower:
    """A trunk as ``model/towers.py`` makes it: without task head, and of poolers only SigLIP's own (``map``)."""
    kind = str(config.get("model_type"))
    if kind not in _DEFAULTS:
        raise UserError(f"the size of a {kind} tower is not known here; known: {', '.join(_DEFAULTS)}")
    c = {**_DEFAULTS[kind], **{k: v for k, v in config.items() if v is not None}}
    d, inner, layers = int(c["hidden_size"]), int(c["intermediate_size"]), int(c["num_hidden_layers"])
    biased = 4 * (d * d + d) + 2 * d * inner + inner + d + 4 * d
    common: dict[str, Any] = {"kind": kind, "layers": layers, "width": d, "heads": int(c["num_attention_heads"])}
    common |= {"inner": inner, "gated": kind == "modernbert", "layer": biased}
    common["activation"] = str(c.get("hidden_activation") if kind == "modernbert" else c["hidden_act"])
    common["dropout"] = float(c.get("hidden_dropout_prob", 0.0))
    if "patch_size" in c:
        size, side = int(c["image_size"]), int(c["patch_size"])
        patches, patch = (size // side) ** 2, int(c.get("num_channels", 3)) * side * side
        classes = 0 if kind == "siglip_vision_model" else 1
        # A ViT's and SigLIP's first matrix has a bias, CLIP's a norm behind it.
        first = d * patch + (0 if kind == "clip_vision_model" else d)
        embedding = first + (patches + 2 * classes) * d
        norms = 4 * d if kind == "clip_vision_model" else 2 * d
        if pool == "map":  # a probe that attends to all positions, a norm and an MLP
            norms += d + 4 * (d * d + d) + 2 * d + 2 * d * inner + inner + d
        return Tower(
            **common,
            embedding=embedding,
            norms=norms,
            tokens=patches + classes,
            patches=patches,
            patch=patch,
            largest=max(d * inner, d * patch),
            pixels=size * size,
        )
    rows = int(c["vocab_size"])
    table = rows * d
    if kind == "modernbert":
        layer = 4 * d * d + 3 * d * inner + 2 * d
        reach = int(c["local_attention"]) // 2
        common |= {"layer": layer, "local": reach, "global_every": int(c["global_attn_every_n_layers"])}
        return Tower(**common, embedding=table + d, norms=d, largest=max(table, 2 * d * inner))
    positions = int(c["max_position_embeddings"]) * d
    if kind == "clip_text_model":
        return Tower(**common, embedding=table + positions, norms=2 * d, causal=True, largest=max(table, d * inner))
    types = int(c["type_vocab_size"]) * d
    return Tower(**common, embedding=table + positions + types + 2 * d, norms=0, largest=max(table, d * inner))
