"""What memory is said to hold is what autograd and a step hold."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from longclip.experiment.schema import ImageTower, Model
from longclip.model.packing import pack
from longclip.model.shape import Tower, shape_of
from longclip.model.towers import ImageEncoder, TextEncoder
from longclip.train import memory as memories
from longclip.train.memory import memory
from tests.model.test_packing import BERT, CLIP, MODERNBERT, VIT, spec

ROOT = Path(__file__).parents[2]
WIDE = {"hidden_size": 128, "intermediate_size": 320, "num_attention_heads": 4}
PLAIN = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
LENGTHS = [20, 20, 40, 40, 80]


def saved_bytes(module: torch.nn.Module, run: Callable[[], Any]) -> int:
    """Bytes of all storages that autograd keeps for the backward pass, each once, without the weights."""
    weights = {p.untyped_storage().data_ptr() for p in module.parameters()}
    kept: dict[int, torch.Tensor] = {}  # the tensors too, or a storage's address would be used again

    def pack_hook(x: torch.Tensor) -> torch.Tensor:
        if x.untyped_storage().data_ptr() not in weights:
            kept[x.untyped_storage().data_ptr()] = x
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack_hook, lambda x: x):
        _out = run()
    return sum(x.untyped_storage().nbytes() for x in kept.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    "config",
    [
        {**VIT, **PLAIN},
        CLIP,
        {**CLIP, "hidden_act": "gelu"},
        {**CLIP, "model_type": "siglip_vision_model"},
        {**BERT, **PLAIN},
        BERT,
        {**BERT, **PLAIN, "model_type": "roberta", "max_position_embeddings": 514},
        MODERNBERT,
        {**BERT, "model_type": "clip_text_model"},
    ],
    ids=["vit", "clip", "clip-gelu", "siglip", "bert", "bert-dropout", "roberta", "modernbert", "clip-text"],
)
def test_a_layer_keeps_what_is_said(config: dict[str, Any], dtype: torch.dtype) -> None:
    """Of two towers that differ in their depth alone, so that what stands around the layers drops out."""
    kept, said = [], []
    for layers in (2, 4):
        made = {**config, **WIDE, "num_hidden_layers": layers}
        if "patch_size" in config:
            model = Model(
                context_length=77,
                image=ImageTower(config=made, pool="mean"),
                text=spec(VIT, BERT).text,
                embed_dim=64,
            )
            image = ImageEncoder(model.image, 64).to(dtype).train()
            kept.append(saved_bytes(image, lambda image=image: image(torch.randn(4, 3, 16, 16))))  # type: ignore[misc]
            tower = shape_of(model, made, BERT).image
            said.append(tower_bytes(tower, 4 * tower.tokens, tower.tokens, dtype))
        else:
            model = spec(VIT, {**made, "global_attn_every_n_layers": 1})
            text = TextEncoder(model.text, 64).to(dtype).train()
            packed = pack([[3] * n for n in LENGTHS])
            kept.append(saved_bytes(text, lambda text=text, packed=packed: text(packed)))  # type: ignore[misc]
            tower = shape_of(model, VIT, made).text
            seen = sum(n * n for n in LENGTHS) / sum(LENGTHS)
            said.append(tower_bytes(tower, sum(LENGTHS), seen, dtype))
    # What dropout keeps is not the same for every group of lengths; without it only statistics are left out.
    tolerance = 0.1 if tower.dropout else 0.02
    assert said[1] - said[0] == pytest.approx(kept[1] - kept[0], rel=tolerance)


def tower_bytes(tower: Tower, tokens: int, seen: float, dtype: torch.dtype) -> float:
    return memories.kept_by(tower, tokens, seen, dtype.itemsize, checkpointing=False, on_gpu=False)


def test_what_is_frozen_keeps_nothing() -> None:
    """No activations, no gradients, no moments; its weights stay."""
    all_, half = (peak(1, 1, freeze=f) for f in (None, 11))
    assert half.weights == all_.weights and half.optimizer < 0.6 * all_.optimizer
    assert half.activations == pytest.approx(all_.activations / 2, rel=0.05)


def peak(stage: int, ranks: int, precision: str = "bf16", freeze: Any = None, **other: Any) -> memories.Memory:
    large = {**MODERNBERT, "hidden_size": 768, "intermediate_size": 1152, "num_hidden_layers": 22, "vocab_size": 50368}
    model = spec(CLIP, large)
    model = model.model_copy(update={"text": model.text.model_copy(update={"freeze": freeze})})
    shape = shape_of(model, CLIP, large)
    how = {"micro_batch": 64 // ranks, "checkpointing": False, "on_gpu": True, **other}
    return memory(shape, [100], global_batch=64, precision=precision, stage=stage, ranks=ranks, **how)


def test_states_are_shared_among_ranks_and_weights_at_stage_3_too() -> None:
    one, four = peak(1, 1), peak(1, 4)
    assert four.optimizer == pytest.approx(one.optimizer / 4, rel=1e-6)
    assert four.weights == one.weights
    assert peak(3, 4).weights == pytest.approx(one.weights / 4, rel=1e-6)
    assert peak(3, 4).peak < four.peak < one.peak


def test_checkpointing_and_small_micro_batches_need_less() -> None:
    assert peak(1, 1, checkpointing=True).activations < 0.3 * peak(1, 1).activations
    assert peak(1, 1, micro_batch=16).activations == pytest.approx(peak(1, 1).activations / 4, rel=1e-3)


@pytest.mark.slow
def test_measured_on_this_machine() -> None:
    """Models of 50 M parameters, measured: within 15 %."""
    command = [sys.executable, str(ROOT / "tools" / "bench" / "estimate.py"), "--quick"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stderr[-3000:]
    ratios = re.search(r"4 configurations: ([\d.]+) to ([\d.]+) of what was measured", done.stdout)
    assert ratios is not None and float(ratios[1]) >= 1 / 1.15 and float(ratios[2]) <= 1.15, done.stdout
