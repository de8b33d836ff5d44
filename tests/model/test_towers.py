"""Towers of every kind: pooled as their makers do, and read from folders in transformers' and open_clip's layouts."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F
from transformers import (
    AutoConfig,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    SiglipConfig,
    SiglipImageProcessor,
    SiglipModel,
    ViTImageProcessor,
)

from longclip.data.decode import square
from longclip.data.loader import normalised
from longclip.errors import UserError
from longclip.experiment.identity import hash_folder
from longclip.experiment.schema import ImageTower, Model, TextTower
from longclip.model.clip import build, count_parameters
from longclip.model.packing import pack
from longclip.model.towers import ImageEncoder, TextEncoder, pixels_of
from tests.model.test_packing import BERT, CLIP, CLIP_TEXT, MODERNBERT, ROBERTA, VIT, spec

SIGLIP = {**VIT, "model_type": "siglip_vision_model"}
IMAGES = {"vit": VIT, "clip": CLIP, "siglip": SIGLIP}


@pytest.mark.parametrize("kind", ["vit-cls", "vit-mean", "clip-cls", "clip-mean", "siglip-map", "siglip-mean"])
def test_image_towers(kind: str) -> None:
    """Unit features, and a gradient for every weight: ZeRO waits for all of them."""
    name, pool = kind.split("-")
    chosen = ImageTower(config=IMAGES[name], pool=pool)  # type: ignore[arg-type]
    asked = spec(VIT, MODERNBERT).model_copy(update={"image": chosen})
    model = build(asked, 0)
    image, text, scale = model(torch.randn(3, 3, 16, 16), pack([[1, 2], [3], [4, 5, 6]]))
    torch.testing.assert_close(image.norm(dim=-1), torch.ones(3))
    torch.testing.assert_close(text.norm(dim=-1), torch.ones(3))
    assert scale.shape == (1,)
    assert scale.item() == pytest.approx(1 / 0.07)
    (image[:, 0].sum() + text[:, 0].sum() + scale.sum()).backward()
    without = [n for n, p in model.named_parameters() if p.grad is None]
    assert without == []
    assert pixels_of(chosen).size == 16
    assert count_parameters(asked) == sum(p.numel() for p in model.parameters())


def test_pooled_as_transformers_pools(tmp_path: Path) -> None:
    """CLIP's class and end-of-text tokens, SigLIP's attention: our features before the head are their pooler's.

    The folders hold checkpoints of both towers, as the hub's do.
    """
    torch.manual_seed(0)
    pixels = torch.randn(2, 3, 16, 16)
    clip = CLIPModel(CLIPConfig(vision_config=CLIP, text_config={**CLIP_TEXT, "eos_token_id": 69})).eval()
    clip.save_pretrained(tmp_path / "clip")
    siglip = SiglipModel(SiglipConfig(vision_config=SIGLIP, text_config=CLIP_TEXT)).eval()
    siglip.save_pretrained(tmp_path / "siglip")
    for name, tower, pool in (("clip", clip, "cls"), ("siglip", siglip, "map")):
        encoder = ImageEncoder(ImageTower(tower=str(tmp_path / name), pool=pool), 8).eval()  # type: ignore[arg-type]
        theirs = tower.vision_model(pixel_values=pixels).pooler_output
        torch.testing.assert_close(encoder(pixels), encoder.head(theirs))
    words = [[3, 7, 9, 69], [3, 69]]
    text = TextEncoder(TextTower(tower=str(tmp_path / "clip"), pool="last"), 8).eval()
    for i, word in enumerate(words):
        pooled = clip.text_model(input_ids=torch.tensor([word])).pooler_output
        torch.testing.assert_close(text(pack(words))[i : i + 1], text.head(pooled))


@pytest.mark.parametrize("text", [MODERNBERT, BERT, ROBERTA, CLIP_TEXT], ids=lambda c: str(c["model_type"]))
@pytest.mark.parametrize("image", [CLIP, SIGLIP], ids=lambda c: str(c["model_type"]))
def test_towers_come_back_from_a_folder(image: dict[str, Any], text: dict[str, Any], tmp_path: Path) -> None:
    """Weights saved by transformers and named as a folder are the weights of the tower, and draw nothing."""
    first = build(_asked(ImageTower(config=image, pool="mean"), text), seed=3)
    first.image.trunk.save_pretrained(tmp_path / "image")
    first.text.trunk.save_pretrained(tmp_path / "text")
    from_disk = Model(
        context_length=77,
        image=ImageTower(tower=str(tmp_path / "image"), pool="mean"),
        text=TextTower(tower=str(tmp_path / "text")),
        embed_dim=24,
    )
    second = build(from_disk, seed=4)
    theirs = dict(second.named_parameters())
    for name, parameter in first.named_parameters():
        assert torch.equal(parameter, theirs[name]) == ("trunk" in name or "log_scale" in name), name


def _asked(image: ImageTower, text: dict[str, Any]) -> Model:
    return Model(context_length=77, image=image, text=TextTower(config=text, tokenizer="x"), embed_dim=24)


@pytest.mark.parametrize(
    ("tower", "message"),
    [
        (lambda: ImageTower(config=SIGLIP), "SigLIP has no class token; valid: map"),
        (lambda: ImageTower(config=VIT, pool="map"), "valid for vit: cls, mean"),
        (lambda: TextTower(config=CLIP_TEXT, tokenizer="x", pool="cls"), "valid: last"),
        (lambda: TextTower(config={"model_type": "gpt2"}, tokenizer="x"), "known here: modernbert, bert, roberta"),
    ],
)
def test_what_a_tower_cannot_do_is_an_error_of_the_file(tower: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tower()


def test_of_a_folder_it_is_said_before_weights_are_read(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CLIP_TEXT))
    with pytest.raises(UserError, match="valid: last"):
        TextEncoder(TextTower(tower=str(tmp_path), pool="cls"), 8)
    with pytest.raises(UserError, match="a clip_text_model model; known here: clip_vision_model"):
        ImageEncoder(ImageTower(tower=str(tmp_path)), 8)


# ---- open_clip ---------------------------------------------------------------------------------------------------

WIDTH, HEADS, LAYERS, PATCH, SIZE = 32, 4, 2, 8, 16


def _openclip_folder(folder: Path, quick_gelu: bool, **vision: Any) -> dict[str, Tensor]:
    """A random CLIP in open_clip's layout, the text tower and the temperature with it; returns its tensors."""
    random = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> Tensor:
        return 0.3 * torch.randn(shape, generator=random)

    block = {
        "ln_1.weight": (WIDTH,),
        "ln_1.bias": (WIDTH,),
        "attn.in_proj_weight": (3 * WIDTH, WIDTH),
        "attn.in_proj_bias": (3 * WIDTH,),
        "attn.out_proj.weight": (WIDTH, WIDTH),
        "attn.out_proj.bias": (WIDTH,),
        "ln_2.weight": (WIDTH,),
        "ln_2.bias": (WIDTH,),
        "mlp.c_fc.weight": (4 * WIDTH, WIDTH),
        "mlp.c_fc.bias": (4 * WIDTH,),
        "mlp.c_proj.weight": (WIDTH, 4 * WIDTH),
        "mlp.c_proj.bias": (WIDTH,),
    }
    tensors = {
        "visual.conv1.weight": draw(WIDTH, 3, PATCH, PATCH),
        "visual.class_embedding": draw(WIDTH),
        "visual.positional_embedding": draw((SIZE // PATCH) ** 2 + 1, WIDTH),
        **{f"visual.{ln}.{kind}": draw(WIDTH) for ln in ("ln_pre", "ln_post") for kind in ("weight", "bias")},
        **{
            f"visual.transformer.resblocks.{i}.{name}": draw(*shape)
            for i in range(LAYERS)
            for name, shape in block.items()
        },
        "visual.proj": draw(WIDTH, 24),
        "positional_embedding": draw(77, WIDTH),
        "logit_scale": draw(1),
    }
    folder.mkdir()
    save_file(tensors, folder / "open_clip_model.safetensors")
    cfg = {"image_size": SIZE, "layers": LAYERS, "width": WIDTH, "patch_size": PATCH, "head_width": WIDTH // HEADS}
    model = {"embed_dim": 24, "quick_gelu": quick_gelu, "vision_cfg": {**cfg, **vision}, "text_cfg": {"layers": 1}}
    said = {"model_cfg": model, "preprocess_cfg": {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}}
    (folder / "open_clip_config.json").write_text(json.dumps(said))
    return tensors


def _openclip_features(w: dict[str, Tensor], pixels_BCHW: Tensor, quick_gelu: bool) -> Tensor:
    """The class token after the last norm, by the tensors alone: no module of ours or of transformers."""

    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, (WIDTH,), w[f"visual.{name}.weight"], w[f"visual.{name}.bias"])

    batch = len(pixels_BCHW)
    patches = F.conv2d(pixels_BCHW, w["visual.conv1.weight"], stride=PATCH).flatten(2).transpose(1, 2)
    x = torch.cat([w["visual.class_embedding"].expand(batch, 1, WIDTH), patches], dim=1)
    x = norm(x + w["visual.positional_embedding"], "ln_pre")
    for i in range(LAYERS):
        name = f"transformer.resblocks.{i}"
        of = {k.removeprefix(f"visual.{name}."): v for k, v in w.items() if f".{i}." in k}
        y = norm(x, f"{name}.ln_1") @ of["attn.in_proj_weight"].T + of["attn.in_proj_bias"]
        q, k, v = (z.view(batch, -1, HEADS, WIDTH // HEADS).transpose(1, 2) for z in y.chunk(3, dim=-1))
        seen = ((q @ k.transpose(-1, -2)) * (WIDTH // HEADS) ** -0.5).softmax(-1) @ v
        x = x + seen.transpose(1, 2).reshape(batch, -1, WIDTH) @ of["attn.out_proj.weight"].T + of["attn.out_proj.bias"]
        y = norm(x, f"{name}.ln_2") @ of["mlp.c_fc.weight"].T + of["mlp.c_fc.bias"]
        y = y * torch.sigmoid(1.702 * y) if quick_gelu else F.gelu(y)
        x = x + y @ of["mlp.c_proj.weight"].T + of["mlp.c_proj.bias"]
    return norm(x[:, 0], "ln_post")


@pytest.mark.parametrize("quick_gelu", [True, False])
def test_open_clip_s_weights_are_mapped_in(quick_gelu: bool, tmp_path: Path) -> None:
    """DFN-2B's layout (quick_gelu) and LAION's (exact): features equal to a forward written from the paper."""
    tensors = _openclip_folder(tmp_path / "dfn", quick_gelu)
    asked = ImageTower(tower=str(tmp_path / "dfn"))
    encoder = ImageEncoder(asked, 8).eval()
    pixels = torch.randn(3, 3, SIZE, SIZE)
    theirs = encoder.head(_openclip_features(tensors, pixels, quick_gelu))
    torch.testing.assert_close(encoder(pixels), theirs, atol=2e-5, rtol=1e-5)
    assert pixels_of(asked).mean == (0.1, 0.2, 0.3) and pixels_of(asked).std == (0.4, 0.5, 0.6)
    other = encoder.head(_openclip_features(tensors, pixels, not quick_gelu))
    assert not torch.allclose(encoder(pixels), other, atol=1e-4)


def test_preprocessing_is_the_tower_s(tmp_path: Path) -> None:
    """As transformers' own processors of these kinds do it, and as a folder's files say."""
    for name, cls in (("vit", ViTImageProcessor), ("siglip", SiglipImageProcessor), ("clip", CLIPImageProcessor)):
        folder = tmp_path / name
        settings: dict[str, Any] = dict(IMAGES[name])
        AutoConfig.for_model(settings.pop("model_type"), **settings).save_pretrained(folder)
        size: Any = {"shortest_edge": 16} if name == "clip" else {"height": 16, "width": 16}
        theirs = cls(size=size, crop_size={"height": 16, "width": 16})
        noise = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
        want = torch.as_tensor(np.asarray(theirs(noise, return_tensors="np")["pixel_values"]))
        stream = io.BytesIO()
        Image.fromarray(noise).save(stream, "PNG")
        unsaid = pixels_of(ImageTower(tower=str(folder)))
        theirs.save_pretrained(folder)
        said = pixels_of(ImageTower(tower=str(folder)))
        for form in (unsaid, said):
            seen = torch.from_numpy(square(stream.getvalue(), form, None).copy())[None]
            torch.testing.assert_close(normalised(seen, form, torch.device("cpu")), want, atol=2 / 255 / 0.26, rtol=0)


def test_open_clip_s_folder_is_pinned_by_its_shape_too(tmp_path: Path) -> None:
    _openclip_folder(tmp_path / "a", True)
    _openclip_folder(tmp_path / "b", False)
    assert hash_folder(tmp_path / "a") != hash_folder(tmp_path / "b")


def test_what_is_no_plain_vit_of_open_clip_s_is_refused(tmp_path: Path) -> None:
    _openclip_folder(tmp_path / "coca", True, attentional_pool=True)
    with pytest.raises(UserError, match="attentional_pool"):
        ImageEncoder(ImageTower(tower=str(tmp_path / "coca")), 8)
    _openclip_folder(tmp_path / "short", True, layers=3)
    with pytest.raises(UserError, match="not of its config's shape"):
        ImageEncoder(ImageTower(tower=str(tmp_path / "short")), 8)
    _openclip_folder(tmp_path / "pickled", True)
    (tmp_path / "pickled" / "open_clip_model.safetensors").unlink()
    with pytest.raises(UserError, match="pickled weights are not read"):
        ImageEncoder(ImageTower(tower=str(tmp_path / "pickled")), 8)


@pytest.mark.parametrize("damage", ["a layer is missing", "names of another layout"])
def test_missing_weights_are_never_drawn(tmp_path: Path, damage: str) -> None:
    """transformers would draw them from an unseeded generator, and say so in its log only."""
    TextEncoder(TextTower(config=MODERNBERT, tokenizer="x"), 8).trunk.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    weights = load_file(file)
    if damage == "a layer is missing":
        kept = {name: w for name, w in weights.items() if not name.startswith("layers.0.")}
    else:
        kept = {f"encoder_of_theirs.{name}": w for name, w in weights.items()}
    save_file(kept, file, {"format": "pt"})
    with pytest.raises(UserError, match=r"its weights lack \d+ of the tower's parameters, such as"):
        TextEncoder(TextTower(tower=str(tmp_path)), 8)
