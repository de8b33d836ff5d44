"""Longer windows: tables against formulas written otherwise, and towers that see short text as they did before."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModel

from longclip.errors import UserError
from longclip.experiment.schema import ImageTower, Model, TextTower
from longclip.model.clip import DualEncoder, build, count_parameters
from longclip.model.packing import pack
from longclip.model.window import extend, interpolate, position_table, stretch
from tests.model.test_packing import BERT, CLIP_TEXT, MODERNBERT, ROBERTA, VIT

CLIP_77 = {**CLIP_TEXT, "max_position_embeddings": 77}


def _built(text: dict[str, Any], window: int, padded: bool = False, **tower: Any) -> DualEncoder:
    asked = Model(
        context_length=window,
        image=ImageTower(config=VIT),
        text=TextTower(config=text, tokenizer="x", **tower),
        embed_dim=24,
    )
    assert count_parameters(asked) == sum(p.numel() for p in build(asked, seed=0).parameters())
    return build(asked, seed=0, padded=padded).eval()


def _table(model: DualEncoder) -> Tensor:
    return position_table(model.text.trunk).weight.detach()


def test_248_is_the_published_table() -> None:
    """Long-CLIP's: 20 kept, then four positions for each, a quarter of the way apart; the last goes on its own way."""
    old = torch.randn(77, 8)
    new = stretch(old, 248, 20)
    assert torch.equal(new[:20], old[:20])
    for i in range(57):
        step = old[20 + i + 1] - old[20 + i] if i < 56 else old[76] - old[75]
        for quarter in range(4):
            torch.testing.assert_close(new[20 + 4 * i + quarter], old[20 + i] + quarter / 4 * step)


@settings(max_examples=50, deadline=None)
@given(old=st.integers(3, 120), more=st.integers(1, 400), keep=st.integers(0, 100))
def test_a_line_stays_a_line(old: int, more: int, keep: int) -> None:
    """Of positions that lie on a line a stretch by r makes the line of slope 1/r, wherever it ends."""
    keep = min(keep, old - 2)
    window = old + more
    line = torch.arange(old, dtype=torch.float64)[:, None]
    new = stretch(line, window, keep)[:, 0]
    assert torch.equal(new[:keep], line[:keep, 0])
    slope = (old - keep) / (window - keep)
    torch.testing.assert_close(new[keep:].diff(), torch.full((window - keep - 1,), slope, dtype=torch.float64))
    assert new[keep] == keep
    drawn = interpolate(line, window)[:, 0]
    torch.testing.assert_close(drawn, torch.linspace(0, old - 1, window, dtype=torch.float64))


@pytest.mark.parametrize(("text", "window"), [(CLIP_77, 154), (CLIP_77, 248), (CLIP_77, 512), (BERT, 1024)])
def test_interpolation_is_torch_s(text: dict[str, Any], window: int) -> None:
    old = _table(_built(text, 77))
    theirs = F.interpolate(old.double().T[None], size=window, mode="linear", align_corners=True)[0].T.float()
    new = _table(_built(text, window, positions="interpolate"))
    torch.testing.assert_close(new, theirs, atol=1e-6, rtol=1e-5)
    assert torch.equal(new[0], old[0])
    torch.testing.assert_close(new[-1], old[-1], atol=1e-7, rtol=1e-6)


@pytest.mark.parametrize(
    ("text", "window"),
    [(CLIP_77, 154), (CLIP_77, 248), (CLIP_77, 256), (CLIP_77, 512), (BERT, 1024), (ROBERTA, 1024)],
    ids=lambda v: str(v if isinstance(v, int) else v["model_type"]),
)
def test_short_text_is_seen_as_before(text: dict[str, Any], window: int) -> None:
    """Up to the kept positions features are bit-equal; beyond they change, and packed is padded there too."""
    before, after = _built(text, 77), _built(text, window, positions="stretch")
    short = pack([[5, 6, 7], list(range(3, 23)), [9]])
    assert torch.equal(before.text(short), after.text(short))
    longer = pack([[*range(3, 23), *range(3, 23)]])
    assert not torch.equal(before.text(longer), after.text(longer))
    whole = pack([[3 + i % 60 for i in range(n)] for n in (window, 30, 1)])
    padded = _built(text, window, padded=True, positions="stretch")
    torch.testing.assert_close(after.text(whole), padded.text(whole), atol=1e-5, rtol=1e-5)


def test_keep_is_the_experiment_s() -> None:
    old, new = _table(_built(CLIP_77, 77)), _table(_built(CLIP_77, 256, positions="stretch", keep=33))
    assert torch.equal(old[:33], new[:33]) and not torch.equal(old[33:40], new[33:40])


def test_roberta_s_rows_before_the_first_position_stay() -> None:
    old, new = _table(_built(ROBERTA, 77)), _table(_built(ROBERTA, 1024, positions="interpolate"))
    assert len(new) == 1026
    assert torch.equal(old[:3], new[:3])


def test_a_window_within_reach_changes_nothing() -> None:
    assert torch.equal(_table(_built(BERT, 77)), _table(_built(BERT, 512, positions="stretch")))


def test_rotary_angles_are_divided_in_global_layers_only() -> None:
    model = _built(MODERNBERT, 1024, positions="interpolate")
    positions, width = torch.arange(1024)[None], 8
    for layer, theta, factor in (("full_attention", 160_000.0, 2.0), ("sliding_attention", 10_000.0, 1.0)):
        cos, _ = model.text.trunk.rotary_emb(torch.zeros(1), positions, layer)
        angles = positions[0, :, None] / factor / theta ** (torch.arange(0, width, 2) / width)
        torch.testing.assert_close(cos[0], torch.cat([angles, angles], 1).cos(), atol=1e-4, rtol=0)
    whole = pack([[3 + i % 60 for i in range(n)] for n in (1024, 30, 1)])
    padded = _built(MODERNBERT, 1024, padded=True, positions="interpolate")
    torch.testing.assert_close(model.text(whole), padded.text(whole), atol=1e-5, rtol=1e-5)


def test_an_extended_tower_comes_back_from_a_folder(tmp_path: Any) -> None:
    """What transformers saves of it, it loads: table, buffers and config agree."""
    for name, text, how in (("clip", CLIP_77, "stretch"), ("bert", BERT, "stretch"), ("mb", MODERNBERT, "interpolate")):
        model = _built(text, 1024, positions=how)
        model.text.trunk.save_pretrained(tmp_path / name)
        plain = AutoModel.from_pretrained(tmp_path / name).eval()
        ids = torch.tensor([[3 + i % 60 for i in range(1024)]])
        theirs = plain(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state[0]
        torch.testing.assert_close(model.text._packed(pack(ids.tolist())), theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("text", "window", "tower", "message"),
    [
        (CLIP_77, 512, {}, r"is 512, but the text tower has 77 positions .* at most 77, or model.text.positions: stre"),
        (ROBERTA, 513, {}, "has 512 positions"),
        ({"model_type": "clip_text_model"}, 78, {}, "has 77 positions"),
        (MODERNBERT, 1024, {"positions": "stretch"}, "or model.text.positions: interpolate .its positions are rotary"),
        (CLIP_77, 512, {"positions": "stretch", "keep": 76}, "model.text.keep: at most 75"),
        (CLIP_77, 512, {"positions": "interpolate", "keep": 30}, "no effect without 'positions: stretch'"),
    ],
)
def test_errors_say_how_far_a_tower_goes(text: dict[str, Any], window: int, tower: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _built(text, window, **tower)


def test_of_a_tower_from_a_folder_too(tmp_path: Any) -> None:
    model = _built(CLIP_77, 77)
    with pytest.raises(UserError, match="at most 77, or model"):
        extend(model.text.trunk, TextTower(tower="x"), 154)
