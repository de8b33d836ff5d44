"""Towers of every kind, pooled as their makers do, and read from folders: transformers', open_clip's and timm's."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from collections.abc import Mapping
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
from longclip.launch.resolve import tower_config
from longclip.model.clip import build, count_parameters
from longclip.model.packing import pack
from longclip.model.shape import tower_of
from longclip.model.towers import ImageEncoder, Pixels, TextEncoder, pixels_of
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


@pytest.mark.parametrize(("said", "whole"), [({"size": 16}, True), ({"size": 16, "do_center_crop": True}, False)])
def test_older_files_say_sizes_by_one_number(said: dict[str, Any], whole: bool, tmp_path: Path) -> None:
    settings: dict[str, Any] = dict(IMAGES["vit"])
    AutoConfig.for_model(settings.pop("model_type"), **settings).save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(said))
    assert pixels_of(ImageTower(tower=str(tmp_path))).whole is whole


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


# ---- timm --------------------------------------------------------------------------------------------------------

TIMM_WIDTH = 128


def _timm_folder(
    folder: Path, name: str, clip: bool, leave_out: str = "", more: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """A random ViT in timm's layout, its classifier with it; ``clip``: with a norm before its layers, as CLIP's.

    Tensors whose name begins with ``leave_out`` are, ``more`` come in. Returns all.
    """
    random = torch.Generator().manual_seed(2)
    d, inner = TIMM_WIDTH, 3 * TIMM_WIDTH
    shapes: dict[str, tuple[int, ...]] = {
        "cls_token": (1, 1, d),
        "pos_embed": (1, (SIZE // PATCH) ** 2 + 1, d),
        "patch_embed.proj.weight": (d, 3, PATCH, PATCH),
        "patch_embed.proj.bias": (d,),
        "head.weight": (5, d),
        "head.bias": (5,),
    }
    matrices = {"attn.qkv": (3 * d, d), "attn.proj": (d, d), "mlp.fc1": (inner, d), "mlp.fc2": (d, inner)}
    parts = {f"blocks.{i}.{part}": shape for i in range(LAYERS) for part, shape in matrices.items()}
    parts |= {f"blocks.{i}.{norm}": (d,) for i in range(LAYERS) for norm in ("norm1", "norm2")}
    parts |= dict.fromkeys(("norm", "norm_pre") if clip else ("norm",), (d,))
    for part, shape in parts.items():
        shapes |= {f"{part}.weight": shape, f"{part}.bias": shape[:1]}
    # Small beside 1, the norms' weights, so that a norm's epsilon shows.
    tensors = {key: 0.07 * torch.randn(shape, generator=random) for key, shape in shapes.items()}
    tensors |= {key: 1 + tensor for key, tensor in tensors.items() if "norm" in key and key.endswith("weight")}
    if leave_out:
        tensors = {key: tensor for key, tensor in tensors.items() if not key.startswith(leave_out)}
    tensors |= more or {}
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    cfg = {"input_size": [3, SIZE, SIZE], "mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6], "crop_pct": 0.9}
    args = {"num_classes": 5, "in_chans": 3, "global_pool": "token", "img_size": [SIZE, SIZE]}
    said = {"architecture": name, "num_classes": 5, "num_features": d, "global_pool": "token", "model_args": args}
    (folder / "config.json").write_text(json.dumps({**said, "pretrained_cfg": {**cfg, "interpolation": "bicubic"}}))
    return tensors


def _timm_config(folder: Path, part: str, **changed: Any) -> None:
    """Changes a section of the folder's config.json."""
    said = json.loads((folder / "config.json").read_text())
    said[part] = {**said.get(part, {}), **changed}
    (folder / "config.json").write_text(json.dumps(said))


def _timm_hidden(w: dict[str, Tensor], pixels_BCHW: Tensor, eps: float, quick_gelu: bool, heads: int) -> Tensor:
    """All tokens before the last norm, by the tensors alone."""
    batch = len(pixels_BCHW)
    x = F.conv2d(pixels_BCHW, w["patch_embed.proj.weight"], w.get("patch_embed.proj.bias"), stride=PATCH)
    x = torch.cat([w["cls_token"].expand(batch, -1, -1), x.flatten(2).transpose(1, 2)], dim=1) + w["pos_embed"]
    if "norm_pre.weight" in w:
        x = _timm_norm(w, x, "norm_pre", eps)
    for i in range(LAYERS):
        of = {k.removeprefix(f"blocks.{i}."): v for k, v in w.items() if k.startswith(f"blocks.{i}.")}
        y = F.linear(_timm_norm(of, x, "norm1", eps), of["attn.qkv.weight"], of["attn.qkv.bias"])
        q, k, v = y.view(batch, -1, 3, heads, TIMM_WIDTH // heads).permute(2, 0, 3, 1, 4)
        seen = ((q @ k.transpose(-1, -2)) * (TIMM_WIDTH // heads) ** -0.5).softmax(-1) @ v
        x = x + F.linear(seen.transpose(1, 2).flatten(2), of["attn.proj.weight"], of["attn.proj.bias"])
        y = F.linear(_timm_norm(of, x, "norm2", eps), of["mlp.fc1.weight"], of["mlp.fc1.bias"])
        y = y * torch.sigmoid(1.702 * y) if quick_gelu else F.gelu(y)
        x = x + F.linear(y, of["mlp.fc2.weight"], of["mlp.fc2.bias"])
    return x


def _timm_norm(w: dict[str, Tensor], x: Tensor, name: str, eps: float) -> Tensor:
    return F.layer_norm(x, (TIMM_WIDTH,), w[f"{name}.weight"], w[f"{name}.bias"], eps)


@pytest.mark.parametrize(
    ("name", "clip", "eps", "leave_out"),
    [
        ("vit_base_patch16_224", False, 1e-6, ""),
        ("vit_base_patch16_clip_224", True, 1e-5, "patch_embed.proj.bias"),  # timm's own have none
        ("vit_base_patch16_clip_quickgelu_224", True, 1e-5, ""),
        ("vit_of_mine", True, 1e-6, ""),
    ],
)
def test_timm_s_weights_are_mapped_in(name: str, clip: bool, eps: float, leave_out: str, tmp_path: Path) -> None:
    """Equal to a forward written in plain torch on timm's names; in fp64, where the norms' epsilon shows."""
    tensors = {k: w.double() for k, w in _timm_folder(tmp_path / "vit", name, clip, leave_out).items()}
    pixels = torch.randn(3, 3, SIZE, SIZE, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    quick = "quickgelu" in name

    def theirs(eps: float, quick: bool, heads: int) -> Tensor:
        return _timm_norm(tensors, _timm_hidden(tensors, pixels, eps, quick, heads), "norm", eps)

    asked = ImageTower(tower=str(tmp_path / "vit"))
    encoder = ImageEncoder(asked, 8).double()
    found = _pooled(encoder, pixels)
    torch.testing.assert_close(found, theirs(eps, quick, 2)[:, 0], atol=1e-6, rtol=0)
    for wrong in (theirs(1.1e-5 - eps, quick, 2), theirs(eps, not quick, 2), theirs(eps, quick, 4)):
        assert not torch.allclose(found, wrong[:, 0], atol=1e-5, rtol=0)
    if not clip:
        averaged = ImageEncoder(asked.model_copy(update={"pool": "mean"}), 8).double()
        torch.testing.assert_close(_pooled(averaged, pixels), theirs(eps, quick, 2)[:, 1:].mean(1), atol=1e-6, rtol=0)
    config = tower_config(tmp_path / "vit", "model.image.tower", "image")
    assert config["model_type"] == ("clip_vision_model" if clip else "vit")
    assert tower_of(config).parameters == sum(p.numel() for p in encoder.trunk.parameters())


@torch.no_grad()
def _pooled(encoder: ImageEncoder, pixels: Tensor) -> Tensor:
    """What goes into the head, in the encoder's own precision."""
    return encoder.eval()._pooled(encoder.trunk(pixel_values=pixels))


def test_timm_s_last_norm_may_be_of_the_mean(tmp_path: Path) -> None:
    """CLIP's tower norms what was pooled, so it can take that; a ViT's norms each patch before, which is another."""
    fc = {f"fc_norm.{kind}": torch.full((TIMM_WIDTH,), value) for kind, value in (("weight", 2.0), ("bias", 0.5))}
    tensors = _timm_folder(tmp_path / "clip", "vit_clip", True, "norm.", fc)
    pixels = torch.randn(2, 3, SIZE, SIZE)
    mean = _timm_hidden(tensors, pixels, 1e-5, False, 2)[:, 1:].mean(1)
    found = _pooled(ImageEncoder(ImageTower(tower=str(tmp_path / "clip"), pool="mean"), 8), pixels)
    torch.testing.assert_close(found, _timm_norm(tensors, mean, "fc_norm", 1e-5), atol=1e-5, rtol=1e-5)
    _timm_folder(tmp_path / "vit", "vit", False, "norm.", fc)
    with pytest.raises(UserError, match=r"model\.safetensors has fc_norm\.bias"):
        ImageEncoder(ImageTower(tower=str(tmp_path / "vit"), pool="mean"), 8)


def test_timm_s_heads_are_known_by_the_width_or_named(tmp_path: Path) -> None:
    folder = tmp_path / "vit"
    _timm_folder(folder, "vit", False)
    _timm_config(folder, "model_args", num_heads=8, drop_path_rate=0.1)
    assert ImageEncoder(ImageTower(tower=str(folder)), 8).trunk.config.num_attention_heads == 8
    _timm_config(folder, "model_args", act_layer="gelu_tanh")
    with pytest.raises(UserError, match=r"no plain ViT of timm's: config\.json has model_args\.act_layer"):
        ImageEncoder(ImageTower(tower=str(folder)), 8)


def test_timm_s_preprocessing(tmp_path: Path) -> None:
    folder = tmp_path / "vit"
    _timm_folder(folder, "vit", False)
    asked = ImageTower(tower=str(folder))
    assert pixels_of(asked) == Pixels(SIZE, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6), whole=False, resample="bicubic")
    _timm_config(folder, "pretrained_cfg", crop_mode="squash", interpolation="bilinear")
    assert pixels_of(asked) == Pixels(SIZE, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6), whole=True, resample="bilinear")
    _timm_config(folder, "pretrained_cfg", crop_mode="border")
    with pytest.raises(UserError, match="crop_mode border; known here: center, squash"):
        pixels_of(asked)


def test_timm_s_folder_is_pinned_by_weights_and_shape(tmp_path: Path) -> None:
    _timm_folder(tmp_path / "a", "vit_clip", True)
    _timm_folder(tmp_path / "same", "vit_clip", True)
    _timm_folder(tmp_path / "named", "vit_clip_quickgelu", True)
    _timm_folder(tmp_path / "other", "vit_clip", True, more={"norm.bias": torch.zeros(TIMM_WIDTH)})
    a, same, *others = (hash_folder(tmp_path / name) for name in ("a", "same", "named", "other"))
    assert a == same and a not in others and others[0] != others[1]


@pytest.mark.parametrize(
    ("leave_out", "more", "message"),
    [
        ("", "reg_token", "has reg_token"),
        ("", "dist_token", "has dist_token"),
        ("", "blocks.0.ls1.gamma", r"has blocks\.0\.ls1\.gamma"),
        ("", "blocks.1.attn.q_norm.weight", r"has blocks\.1\.attn\.q_norm\.weight"),
        ("", "blocks.0.mlp.fc1_g.weight", r"has blocks\.0\.mlp\.fc1_g\.weight"),
        ("cls_token", "attn_pool.latent", r"has attn_pool\.latent"),
        ("cls_token", None, "lacks cls_token"),
        ("blocks.1.attn.qkv.bias", None, r"lacks blocks\.1\.attn\.qkv\.bias"),
        ("pos_embed", None, "lacks pos_embed"),
    ],
)
def test_what_is_no_plain_vit_of_timm_s_is_refused(
    leave_out: str, more: str | None, message: str, tmp_path: Path
) -> None:
    """On the submit side, before a job is queued, and by the tower itself: the first such tensor is named."""
    _timm_folder(tmp_path / "vit", "vit", False, leave_out, {} if more is None else {more: torch.zeros(1)})
    with pytest.raises(UserError, match=f"no plain ViT of timm's: model.safetensors {message}"):
        tower_config(tmp_path / "vit", "model.image.tower", "image")
    with pytest.raises(UserError, match=message):
        ImageEncoder(ImageTower(tower=str(tmp_path / "vit")), 8)


def test_submit_reads_their_shapes_without_torch(tmp_path: Path) -> None:
    _openclip_folder(tmp_path / "openclip", True)
    _timm_folder(tmp_path / "timm", "vit", False)
    lines = (
        "import sys; sys.modules.update(torch=None, transformers=None, safetensors=None)",  # importing them raises
        "from pathlib import Path",
        "from longclip.launch.resolve import tower_config",
        "for name in ('openclip', 'timm'):",
        "    print(tower_config(Path(name), 'model.image.tower', 'image')['model_type'])",
    )
    done = subprocess.run([sys.executable, "-c", "\n".join(lines)], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.split() == ["clip_vision_model", "vit"], done


def test_damaged_folders_of_timm_s_are_said_to_be(tmp_path: Path) -> None:
    folder = tmp_path / "vit"
    tensors = _timm_folder(folder, "vit", False, more={"pos_embed": torch.zeros(1, 4, TIMM_WIDTH)})
    asked, file = ImageTower(tower=str(folder)), folder / "model.safetensors"
    with pytest.raises(UserError, match="pos_embed has 4 positions, not those of a class token and a square"):
        ImageEncoder(asked, 8)
    save_file({**tensors, "patch_embed.proj.weight": torch.zeros(TIMM_WIDTH, 1, PATCH, PATCH)}, file)
    with pytest.raises(UserError, match="images of 1 channels"):
        ImageEncoder(asked, 8)
    file.write_bytes(b"\xff" * 40)
    with pytest.raises(UserError, match=r"model\.safetensors cannot be read"):
        ImageEncoder(asked, 8)
    file.unlink()
    with pytest.raises(UserError, match="pickled weights are not read"):
        ImageEncoder(asked, 8)
    (folder / "config.json").write_text('{"architecture": "vit"}')
    with pytest.raises(UserError, match="pretrained_cfg"):
        ImageEncoder(asked, 8)


# ---- missing weights ---------------------------------------------------------------------------------------------


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
