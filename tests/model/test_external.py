"""What export writes, and a CLIPModel, read back: the features of the model that was exported."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from longclip.data.tokens import Tokenizer
from longclip.errors import UserError
from longclip.experiment import kinds
from longclip.launch.models import describe
from longclip.model.export import write_transformers
from longclip.model.external import load
from longclip.model.packing import pack
from longclip.model.towers import pixels_of
from tests.model.test_export import CAPTIONS, COMBINATIONS, WINDOW, make_tokenizer, model_of, shaken


@pytest.mark.parametrize("k", range(len(COMBINATIONS)))
def test_an_export_read_back_gives_the_same_features(k: int, tmp_path: Path) -> None:
    make_tokenizer(tmp_path / "tok")
    spec, folder = model_of(*COMBINATIONS[k]), tmp_path / "my model"
    folder.mkdir()
    model = shaken(spec)
    write_transformers(folder, model, spec, str(tmp_path / "tok"))
    found = describe(folder, str(folder))
    assert found.form == ("clip" if k == len(COMBINATIONS) - 1 else "towers")
    assert found.name == f"my-model-{found.weights[:8]}" and found.loss == "contrastive"
    assert found.spec.context_length == WINDOW and found.spec.embed_dim == 24
    again = load(folder, found.form, found.spec, found.loss).eval()
    assert pixels_of(found.spec.image) == pixels_of(spec.image)
    ids, _ = Tokenizer(found.tokenizer, WINDOW)(CAPTIONS)
    assert ids == Tokenizer(str(tmp_path / "tok"), WINDOW)(CAPTIONS)[0]
    size = pixels_of(spec.image).size
    pixels = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        for theirs, ours in zip(again(pixels, pack(ids[:2])), model(pixels, pack(ids[:2])), strict=True):
            torch.testing.assert_close(theirs, ours, atol=1e-6, rtol=1e-6)


def test_weights_are_known_by_their_content(tmp_path: Path) -> None:
    make_tokenizer(tmp_path / "tok")
    spec = model_of(*COMBINATIONS[0])
    hashes = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        write_transformers(tmp_path / name, shaken(spec), spec, str(tmp_path / "tok"))
        hashes.append(describe(tmp_path / name, name).weights)
    assert hashes[0] == hashes[1]
    heads = load_file(tmp_path / "b" / "heads.safetensors")
    save_file({**heads, "log_scale": heads["log_scale"] + 1}, tmp_path / "b" / "heads.safetensors")
    with pytest.raises(UserError, match="does not say image_pool"):
        describe(tmp_path / "b", "b")
    pools = {"image_pool": "mean", "text_pool": "mean"}
    save_file({**heads, "log_scale": heads["log_scale"] + 1}, tmp_path / "b" / "heads.safetensors", pools)
    assert describe(tmp_path / "b", "b").weights != hashes[0]
    save_file({**heads, "image.weight": heads["image.weight"][:7]}, tmp_path / "b" / "heads.safetensors", pools)
    found = describe(tmp_path / "b", "b")
    with pytest.raises(UserError, match="not those of its configuration"):
        load(tmp_path / "b", found.form, found.spec, found.loss)


def test_a_model_with_a_bias_is_the_sigmoid_loss_s(tmp_path: Path) -> None:
    from longclip.model.clip import build

    make_tokenizer(tmp_path / "tok")
    spec, folder = model_of(*COMBINATIONS[-1]), tmp_path / "out"
    folder.mkdir()
    model = build(spec, 0, loss="sigmoid")
    write_transformers(folder, model, spec, str(tmp_path / "tok"))
    found = describe(folder, "owner/some-model@main")
    assert (found.form, found.loss, found.name) == ("towers", "sigmoid", f"some-model-{found.weights[:8]}")
    again = load(folder, found.form, found.spec, found.loss)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(again.get_parameter(name), parameter, atol=0, rtol=0)


def test_the_window_is_where_the_tokenizer_cuts_as_far_as_the_tower_goes(tmp_path: Path) -> None:
    make_tokenizer(tmp_path / "tok")
    spec, folder = model_of(*COMBINATIONS[-1]), tmp_path / "clip"
    folder.mkdir()
    write_transformers(folder, shaken(spec), spec, str(tmp_path / "tok"))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    reach = kinds.reach(kinds.part(json.loads((folder / "config.json").read_text()), "text"))
    for said, expected in ((5, 5), (reach + 100, reach), (10**30, reach), (None, reach)):
        (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "model_max_length": said}))
        assert describe(folder, "x").spec.context_length == expected


def test_what_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(UserError, match="some/name: bert; valid are transformers' CLIPModel"):
        describe(tmp_path, "some/name")
    (tmp_path / "heads.safetensors").write_bytes(b"\xff" * 20)
    with pytest.raises(UserError, match="no safetensors file"):
        describe(tmp_path, "some/name")
