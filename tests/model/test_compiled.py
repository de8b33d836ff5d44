"""Compiled layers: the same features and gradients, whatever the lengths, and compiled once for all of them."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.utils import counters

from longclip.errors import UserError
from longclip.model.clip import build
from longclip.model.compiled import compile_layers
from longclip.model.packing import pack
from tests.model.test_packing import MODERNBERT, VIT, spec

LENGTHS = ([40, 7], [40, 7, 3, 3], [512, 1, 77, 30], [5, 9])


@pytest.mark.slow
def test_the_same_for_any_lengths_compiled_once() -> None:
    asked = spec({**VIT, "num_hidden_layers": 1}, {**MODERNBERT, "num_hidden_layers": 2})
    plain, compiled = build(asked, seed=0), build(asked, seed=0)
    assert compile_layers(compiled) == 3
    graphs = []
    for lengths in LENGTHS:
        random = torch.Generator().manual_seed(sum(lengths))
        text = pack([torch.randint(3, 70, (n,), generator=random).tolist() for n in lengths])
        images = torch.randn(len(lengths), 3, 16, 16, generator=random)
        gradients = []
        outputs = []
        for model in (plain, compiled):
            image, caption, scale = model(images, text)
            loss = (image @ caption.T * scale).logsumexp(1).sum()
            outputs.append((image.detach(), caption.detach()))
            gradients.append(torch.autograd.grad(loss, list(model.parameters()), allow_unused=True))
        torch.testing.assert_close(*outputs, atol=1e-6, rtol=1e-5)
        for ours, theirs in zip(*gradients, strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs == [graphs[0]] * len(LENGTHS) and graphs[0] > 0, "compiled again for other lengths"


def test_without_a_compiler_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CC", "CXX"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(UserError, match=r"engine\.compile: no C or C\+\+ compiler on "):
        compile_layers(torch.nn.Linear(1, 1))
