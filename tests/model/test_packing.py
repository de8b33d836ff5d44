"""Packed text equals padded text, forward and backward, for every tower and ragged batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from longclip.experiment.load import load
from longclip.experiment.schema import ImageTower, Model, TextTower
from longclip.model.clip import DualEncoder, build
from longclip.model.packing import pack
from longclip.model.towers import pixels_of
from tests.experiment.test_load import ROOT

VIT: dict[str, Any] = {
    "model_type": "vit",
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "image_size": 16,
    "patch_size": 8,
}
CLIP = {**VIT, "model_type": "clip_vision_model"}
MODERNBERT: dict[str, Any] = {
    "model_type": "modernbert",
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 40,
    "vocab_size": 70,
    "local_attention": 16,
    "global_attn_every_n_layers": 3,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
}
BERT: dict[str, Any] = {
    "model_type": "bert",
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 40,
    "vocab_size": 70,
    "max_position_embeddings": 512,
}


def spec(image: dict[str, Any], text: dict[str, Any], pool: Any = "mean") -> Model:
    return Model(
        context_length=512,
        image=ImageTower(config=image),
        text=TextTower(config=text, tokenizer="x", pool=pool),
        embed_dim=24,
    )


@pytest.fixture(scope="module", params=["modernbert-mean", "modernbert-cls", "bert-mean", "bert-cls"])
def model(request: pytest.FixtureRequest) -> DualEncoder:
    kind, pool = request.param.split("-")
    return build(spec(VIT, {"modernbert": MODERNBERT, "bert": BERT}[kind], pool), seed=0).eval()


@settings(max_examples=15, deadline=None)
@given(lengths=st.lists(st.one_of(st.integers(1, 40), st.sampled_from([77, 154, 256, 512])), min_size=1, max_size=6))
def test_packed_equals_padded(model: DualEncoder, lengths: list[int]) -> None:
    random = torch.Generator().manual_seed(sum(lengths))
    captions = [torch.randint(3, 70, (n,), generator=random) for n in lengths]
    packed = model.text(pack([c.tolist() for c in captions]))
    padded = model.text.padded(captions, length=512)
    torch.testing.assert_close(packed, padded, atol=1e-5, rtol=1e-5)
    parameters = list(model.text.parameters())
    weights = torch.randn(packed.shape, generator=random)
    mine = torch.autograd.grad((packed * weights).sum(), parameters, allow_unused=True)
    theirs = torch.autograd.grad((padded * weights).sum(), parameters, allow_unused=True)
    largest = max(float(g.norm()) for g in theirs if g is not None)
    for a, b in zip(mine, theirs, strict=True):
        if b is not None and a is not None:  # relative, but for gradients that are zero by symmetry (key biases)
            assert float((a - b).norm()) <= 1e-4 * max(float(b.norm()), 1e-2 * largest)


def test_order_of_captions_is_kept() -> None:
    text = pack([[5, 6, 7], [8], [9, 10]])
    assert text.lengths == (1, 2, 3)
    assert text.order == (1, 2, 0)
    assert text.positions_T().tolist() == [0, 0, 1, 0, 1, 2]
    assert text.groups() == ((1, 1), (2, 1), (3, 1))
    hidden = text.ids_T[:, None].float()
    assert text.mean_BD(hidden)[:, 0].tolist() == [6.0, 8.0, 9.5]
    assert text.first_BD(hidden)[:, 0].tolist() == [5.0, 8.0, 9.0]


def test_arms_that_differ_elsewhere_share_initial_weights() -> None:
    a, b = build(spec(VIT, MODERNBERT), 0), build(spec(VIT, {**MODERNBERT, "vocab_size": 90}), 0)
    other_seed = build(spec(VIT, MODERNBERT), 1)
    names = [n for n, p in a.named_parameters() if p.ndim > 1]
    theirs, others = dict(b.named_parameters()), dict(other_seed.named_parameters())
    for name, parameter in a.named_parameters():
        if "tok_embeddings" in name:
            continue
        assert torch.equal(parameter, theirs[name]), name
    assert all(not torch.equal(dict(a.named_parameters())[n], others[n]) for n in names)


@pytest.mark.parametrize("config", [VIT, CLIP])
@pytest.mark.parametrize("pool", ["cls", "mean"])
def test_image_towers(config: dict[str, Any], pool: Any) -> None:
    chosen = ImageTower(config=config, pool=pool)
    model = build(spec(config, BERT).model_copy(update={"image": chosen}), 0)
    image, text, scale = model(torch.randn(3, 3, 16, 16), pack([[1, 2], [3], [4, 5, 6]]))
    torch.testing.assert_close(image.norm(dim=-1), torch.ones(3))
    torch.testing.assert_close(text.norm(dim=-1), torch.ones(3))
    assert scale.shape == (1,)
    assert scale.item() == pytest.approx(1 / 0.07)
    assert pixels_of(chosen).size == 16


def test_the_paper_s_model_has_454_160_129_parameters() -> None:
    (loaded, *_) = load([ROOT / "experiments" / "longcap"])
    with torch.device("meta"):
        model = DualEncoder(loaded.experiment.model, weights=False)
    count = {name: sum(p.numel() for p in part.parameters()) for name, part in _parts(model).items()}
    assert count == {
        "image trunk": 303_179_776,
        "image head": 786_432,
        "text trunk": 149_014_272,
        "text head": 1_179_648,
        "temperature": 1,
    }
    assert sum(count.values()) == 454_160_129


def _parts(model: DualEncoder) -> dict[str, torch.nn.Module]:
    return {
        "image trunk": model.image.trunk,
        "image head": model.image.head,
        "text trunk": model.text.trunk,
        "text head": model.text.head,
        "temperature": torch.nn.ParameterList([model.log_scale]),
    }


@pytest.mark.parametrize("kind", ["modernbert", "bert"])
def test_towers_come_back_from_a_folder(kind: str, tmp_path: Any) -> None:
    """Weights saved by transformers and named as a folder are the weights of the tower, and draw nothing."""
    text = {"modernbert": MODERNBERT, "bert": BERT}[kind]
    first = build(spec(CLIP, text), seed=3)
    first.image.trunk.save_pretrained(tmp_path / "image")
    first.text.trunk.save_pretrained(tmp_path / "text")
    from_disk = Model(
        context_length=77,
        image=ImageTower(tower=str(tmp_path / "image")),
        text=TextTower(tower=str(tmp_path / "text")),
        embed_dim=24,
    )
    second = build(from_disk, seed=4)
    theirs = dict(second.named_parameters())
    for name, parameter in first.named_parameters():
        assert torch.equal(parameter, theirs[name]) == ("trunk" in name or "log_scale" in name), name
