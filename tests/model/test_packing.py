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


ROBERTA = {**BERT, "model_type": "roberta", "max_position_embeddings": 514, "pad_token_id": 1}
XLM_ROBERTA = {**ROBERTA, "model_type": "xlm-roberta"}
CLIP_TEXT = {**BERT, "model_type": "clip_text_model", "hidden_act": "quick_gelu"}
TEXTS = {
    "modernbert": MODERNBERT,
    "bert": BERT,
    "roberta": ROBERTA,
    "xlm_roberta": XLM_ROBERTA,
    "clip_text": CLIP_TEXT,
}
KINDS = [f"{kind}-{pool}" for kind in TEXTS for pool in ("mean", "last" if kind == "clip_text" else "cls")]


@pytest.fixture(scope="module", params=KINDS)
def models(request: pytest.FixtureRequest) -> tuple[DualEncoder, DualEncoder]:
    """The same weights twice: packed, and padded to the window."""
    kind, pool = request.param.split("-")
    asked = spec(VIT, TEXTS[kind], pool)
    return build(asked, seed=0).eval(), build(asked, seed=0, padded=True).eval()


@settings(max_examples=10, deadline=None)
@given(lengths=st.lists(st.one_of(st.integers(0, 40), st.sampled_from([77, 154, 256, 512])), min_size=1, max_size=6))
def test_packed_equals_padded(models: tuple[DualEncoder, DualEncoder], lengths: list[int]) -> None:
    """Features to 1e-5, gradients to 1e-4; the padded side is transformers' own attention with its own masks."""
    ours, theirs = models
    random = torch.Generator().manual_seed(sum(lengths))
    text = pack([torch.randint(3, 70, (n,), generator=random).tolist() for n in lengths])
    packed, padded = ours.text(text), theirs.text(text)
    torch.testing.assert_close(packed, padded, atol=1e-5, rtol=1e-5)
    weights = torch.randn(packed.shape, generator=random)
    mine, reference = (
        torch.autograd.grad((out * weights).sum(), list(side.text.parameters()), allow_unused=True)
        for out, side in ((packed, ours), (padded, theirs))
    )
    names = [name for name, _ in ours.text.named_parameters()]
    largest = max(float(g.norm()) for g in reference if g is not None)
    for name, a, b in zip(names, mine, reference, strict=True):
        assert a is not None and b is not None, f"{name} gets no gradient"
        # relative, but for gradients that are zero by symmetry (key biases)
        assert float((a - b).norm()) <= 1e-4 * max(float(b.norm()), 1e-2 * largest), name


def test_captions_do_not_see_each_other(models: tuple[DualEncoder, DualEncoder]) -> None:
    """A caption's features are the same alone as among others, and do change with its own last token."""
    ours, _ = models
    words = [[5, 6, 7, 8], [9, 10], [11, 12, 13]]
    together = ours.text(pack(words))
    for i, word in enumerate(words):
        torch.testing.assert_close(together[i : i + 1], ours.text(pack([word])), atol=1e-6, rtol=1e-5)
    assert not torch.allclose(ours.text(pack([[5, 6, 7, 9]]))[0], together[0], atol=1e-4)


def test_no_tokens_at_all_still_give_every_parameter_a_gradient(models: tuple[DualEncoder, DualEncoder]) -> None:
    """A rank with empty captions only takes part in the exchange of gradients, with zeros."""
    ours, theirs = models
    text = pack([[], []])
    torch.testing.assert_close(ours.text(text), theirs.text(text))
    full = torch.autograd.grad(ours.text(pack([[5, 6]])).sum(), list(ours.text.parameters()), allow_unused=True)
    none = torch.autograd.grad(ours.text(text).sum(), list(ours.text.parameters()), allow_unused=True)
    assert [g is None for g in none] == [g is None for g in full]
    assert all(float(g.abs().max()) == 0 for g in none if g is not None)


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


def test_which_attention_runs_is_said() -> None:
    """On a GPU the fast kernel knows neither fp32 nor dropout; the log of such a run says that it is not that one."""
    gpu = torch.device("cuda")
    model = build(spec(VIT, MODERNBERT), 0)
    assert model.text.attention(gpu, torch.bfloat16) == "text packed, attention varlen"
    assert model.text.attention(gpu, torch.float32) == "text packed, attention by length"
    assert model.text.attention(torch.device("cpu"), torch.bfloat16) == "text packed, attention by length"
    drops = build(spec(VIT, {**BERT, "attention_probs_dropout_prob": 0.1}), 0)
    assert drops.text.attention(gpu, torch.bfloat16) == "text packed, attention by length"
    odd = build(spec(VIT, {**BERT, "hidden_size": 52, "num_attention_heads": 2}), 0)
    assert odd.text.attention(gpu, torch.bfloat16) == "text packed, attention by length"
    padded = build(spec(VIT, MODERNBERT), 0, padded=True)
    assert padded.text.attention(gpu, torch.bfloat16).startswith("text padded to ")
