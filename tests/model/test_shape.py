"""Sizes and FLOPs said without torch are those of the modules that torch makes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModel

from longclip.errors import UserError
from longclip.experiment.schema import Model
from longclip.model.clip import DualEncoder, build
from longclip.model.shape import shape_of, tower_of
from tests.model.test_packing import BERT, CLIP, MODERNBERT, VIT, spec

KINDS = ("vit", "clip_vision_model", "siglip_vision_model", "bert", "roberta", "modernbert", "clip_text_model")
SMALL = {"hidden_size": 96, "num_hidden_layers": 3, "intermediate_size": 200, "num_attention_heads": 4}


def reference(kind: str, **settings: Any) -> Any:
    """The model that transformers makes of the configuration; poolers, which our towers have not, taken off."""
    model = AutoModel.from_config(AutoConfig.for_model(kind, **settings), attn_implementation="eager")
    for name in ("pooler", "head"):
        if getattr(model, name, None) is not None:
            setattr(model, name, None)
    model.use_head = False  # SigLIP's
    return model


@pytest.mark.parametrize("settings", [{}, SMALL], ids=["defaults", "small"])
@pytest.mark.parametrize("kind", KINDS)
def test_parameters_are_counted_exactly(kind: str, settings: dict[str, Any]) -> None:
    with torch.device("meta"):
        model = reference(kind, **settings)
    tower = tower_of({"model_type": kind, **settings})
    assert tower.parameters == sum(p.numel() for p in model.parameters())
    assert tower.largest == max(p.numel() for p in model.parameters())


def test_siglip_s_own_pooling_counts() -> None:
    with torch.device("meta"):
        model = AutoModel.from_config(AutoConfig.for_model("siglip_vision_model", **SMALL))
    tower = tower_of({"model_type": "siglip_vision_model", **SMALL}, "map")
    assert tower.parameters == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_flops_are_those_that_torch_counts(kind: str) -> None:
    """By torch's own counter, on unfused attention. It counts what a causal mask hides, too."""
    settings = {**SMALL, "num_attention_heads": 4}
    tower = tower_of({"model_type": kind, **settings})
    model = reference(kind, **settings).eval()
    if tower.tokens:
        inputs: dict[str, Any] = {"pixel_values": torch.randn(1, 3, 224, 224)}
        n = tower.tokens
    else:
        n = 40
        inputs = {"input_ids": torch.full((1, n), 7)}
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(**inputs)
    hidden = 4 * tower.layers * tower.width * n * (n - 1) // 2 if tower.causal else 0
    assert tower.forward_flops([n]) + hidden == counter.get_total_flops()


def test_local_layers_see_their_neighbourhood() -> None:
    """Every third layer of ModernBERT is global; the others see 64 positions to each side."""
    tower = tower_of({"model_type": "modernbert", "num_hidden_layers": 4})
    n = 512
    seen = sum(min(n - 1, i + 64) - max(0, i - 64) + 1 for i in range(n))
    attention = 4 * 768 * (2 * n * n + 2 * seen)
    assert tower.forward_flops([n]) == 2 * n * 4 * tower.matrix + attention


@pytest.mark.parametrize("image", [VIT, CLIP])
@pytest.mark.parametrize("text", [BERT, MODERNBERT])
def test_the_parts_of_the_dual_encoder(image: dict[str, Any], text: dict[str, Any]) -> None:
    model = DualEncoder(spec(image, text), weights=False)
    shape = shape_of(spec(image, text), image, text)
    assert shape.total == sum(p.numel() for p in model.parameters())
    assert shape.parameters()["text head"] == sum(p.numel() for p in model.text.head.parameters())


@pytest.mark.parametrize("freeze", [None, 1, 2, "all"])
@pytest.mark.parametrize("text", [BERT, MODERNBERT])
def test_what_is_frozen_is_not_trained(freeze: Any, text: dict[str, Any]) -> None:
    """Nor has it a backward pass."""
    model = spec(CLIP, text)
    model = model.model_copy(update={"text": model.text.model_copy(update={"freeze": freeze})})
    shape = shape_of(model, CLIP, text, loss="sigmoid")
    made = build(model, 0, loss="sigmoid")
    assert shape.trained == sum(p.numel() for p in made.parameters() if p.requires_grad)
    assert shape.total == sum(p.numel() for p in made.parameters())
    layers = shape.text.layers
    passes = 1 + 2 * (layers - {None: 0, "all": layers}.get(freeze, freeze)) / layers
    assert shape.text.step_flops([9]) == pytest.approx(passes * shape.text.forward_flops([9]))


def test_positions_are_carried_on_to_the_window() -> None:
    text = {**BERT, "max_position_embeddings": 128, "model_type": "roberta", "pad_token_id": 1}
    towers = {"image": {"config": CLIP}, "text": {"config": text, "tokenizer": "x", "positions": "stretch"}}
    stretched = Model.model_validate({"context_length": 200, "embed_dim": 24, **towers})
    assert shape_of(stretched, CLIP, text).total == sum(p.numel() for p in build(stretched, 0).parameters())


def test_a_tower_of_another_kind_is_an_error() -> None:
    with pytest.raises(UserError, match=r"size of a t5 tower is not known here; known: vit, "):
        tower_of({"model_type": "t5"})
