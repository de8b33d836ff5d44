"""What is frozen has no gradient, what is not has one; activation checkpointing changes memory and nothing else."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch

from longclip.errors import UserError
from longclip.experiment.schema import Model
from longclip.model.clip import DualEncoder, build
from longclip.model.packing import pack
from tests.model.test_packing import BERT, CLIP, MODERNBERT, VIT, spec

TOWERS = [(VIT, MODERNBERT), (CLIP, BERT)]


def frozen(image: dict[str, Any], text: dict[str, Any], at: Any) -> Model:
    whole = spec(image, text)
    sides = {side: getattr(whole, side).model_copy(update={"freeze": at}) for side in ("image", "text")}
    return whole.model_copy(update=sides)


def step(model: DualEncoder) -> tuple[dict[str, torch.Tensor], int]:
    """Gradients by parameter, and the bytes kept between forward and backward."""
    captions = [torch.randint(1, 70, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in (3, 9, 30)]
    pixels = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    kept = 0

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal kept
        kept += tensor.numel() * tensor.element_size()
        return tensor

    torch.manual_seed(0)  # BERT's dropout
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        image, text, scale = model.train()(pixels, pack(captions))
    (scale * image @ text.T).softmax(1).diagonal().sum().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}, kept


@pytest.mark.parametrize(("image", "text"), TOWERS)
def test_frozen_parts_have_no_gradient(image: dict[str, Any], text: dict[str, Any]) -> None:
    every = set(step(build(spec(image, text), 0))[0])
    heads = {name for name in every if ".trunk." not in name}
    assert set(step(build(frozen(image, text, "all"), 0))[0]) == heads
    for layers in (1, 2):
        trained = set(step(build(frozen(image, text, layers), 0))[0])
        assert heads < trained < every
        for name in every - trained:  # embeddings, and layers 0 to layers - 1
            numbers = [int(part) for part in name.split(".") if part.isdigit()]
            assert "embeddings" in name or "pre_l" in name or numbers[0] < layers, name
        assert all("norm" in name or int(next(p for p in name.split(".") if p.isdigit())) >= layers
                   for name in trained - heads)  # fmt: skip


def test_frozen_weights_are_those_of_the_seed() -> None:
    model, whole = build(frozen(VIT, BERT, 1), 5), build(spec(VIT, BERT), 5)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), whole.parameters(), strict=True))


def test_more_layers_than_there_are() -> None:
    with pytest.raises(UserError, match=r"model\.image\.freeze is 3, but the tower has 2 layers; at most 2, or all"):
        build(frozen(VIT, MODERNBERT, 3), 0)


@pytest.mark.parametrize(("image", "text"), TOWERS)
def test_activation_checkpointing_changes_memory_and_nothing_else(image: dict[str, Any], text: dict[str, Any]) -> None:
    with_all, all_bytes = step(build(spec(image, text), 0))
    with_some, some_bytes = step(build(spec(image, text), 0, activation_checkpointing=True))
    assert some_bytes < all_bytes / 2
    assert with_all.keys() == with_some.keys()
    assert all(torch.equal(with_all[name], with_some[name]) for name in with_all)


def test_activation_checkpointing_says_nothing_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    transformers = logging.getLogger("transformers")
    transformers.addHandler(caplog.handler)  # it does not pass on to the root
    try:
        step(build(spec(CLIP, BERT), 0, activation_checkpointing=True))
    finally:
        transformers.removeHandler(caplog.handler)
    assert not caplog.messages
