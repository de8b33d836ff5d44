"""Exported folders give the embeddings of the model, without this package."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoConfig, AutoModel, AutoTokenizer

from longclip.data.loader import square
from longclip.errors import UserError
from longclip.experiment.schema import Model
from longclip.model.clip import DualEncoder, build
from longclip.model.export import write_openclip, write_transformers
from longclip.model.packing import pack
from longclip.model.towers import pixels_of
from tests.data.test_loader import make_tokenizer
from tests.model.test_packing import BERT, CLIP, MODERNBERT, VIT

WINDOW = 9
COMBINATIONS = [
    (VIT, "mean", "linear", MODERNBERT, "mean", "mlp2"),
    (VIT, "cls", "mlp2", BERT, "cls", "linear"),
    (CLIP, "cls", "linear", BERT, "mean", "mlp2"),
    (CLIP, "mean", "mlp2", MODERNBERT, "cls", "linear"),
]
OPEN_CLIP = [
    (VIT, "cls", BERT, "mean", "mlp2"),
    (VIT, "mean", BERT, "cls", "linear"),
    (CLIP, "cls", BERT, "mean", "mlp2"),
    (CLIP, "mean", BERT, "cls", "linear"),
]
CLEAN = """
import json, sys
sys.modules["longclip"] = None  # importing it raises
import torch
from PIL import Image
for folder in sys.argv[1:]:
    names = {}
    code = open(f"{folder}/recipe.py").read().replace('folder = "."', f"folder = {folder!r}")
    exec(compile(code, "README.md", "exec"), names)
    captions = json.load(open(f"{folder}/captions.json"))
    images = [Image.open(f"{folder}/{i}.png") for i in range(2)]
    pixels = names["processor"](images, return_tensors="pt")["pixel_values"]
    tokens = names["tokenizer"](captions, padding=True, truncation=True, return_tensors="pt")
    torch.save({
        "pixels": pixels,
        "ids": tokens["input_ids"],
        "mask": tokens["attention_mask"],
        "images": names["embed_images"](pixels),
        "texts": names["embed_texts"](tokens["input_ids"], tokens["attention_mask"]),
        "cosines": names["similarities"](images, captions),
    }, f"{folder}/embedded.pt")
"""
CAPTIONS = ["w1", "w3 w5 w1 w2", " ".join(f"w{i % 7}" for i in range(30))]


def model_of(image: dict[str, Any], i_pool: Any, i_head: Any, text: dict[str, Any], t_pool: Any, t_head: Any) -> Model:
    return Model.model_validate(
        {
            "context_length": WINDOW,
            "embed_dim": 24,
            "image": {"config": image, "pool": i_pool, "head": i_head},
            "text": {"config": text, "tokenizer": "x", "pool": t_pool, "head": t_head},
        }
    )


def shaken(spec: Model) -> DualEncoder:
    """With no weight left at zero or one, where a confusion would not show."""
    model = build(spec, 0).eval()
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


def test_transformers_folders_in_a_clean_process(tmp_path: Path) -> None:
    """The lines of the model card, run where this package cannot be imported: equal to 1e-6."""
    from PIL import Image

    make_tokenizer(tmp_path / "tok")
    made = []
    for k, combination in enumerate(COMBINATIONS):
        spec, folder = model_of(*combination), tmp_path / str(k)
        folder.mkdir()
        model = shaken(spec)
        (folder / "recipe.py").write_text(write_transformers(folder, model, spec, str(tmp_path / "tok")))
        (folder / "captions.json").write_text(json.dumps(CAPTIONS))
        for i in range(2):
            noise = torch.randint(0, 256, (40, 40, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(i))
            Image.fromarray(noise.numpy()).save(folder / f"{i}.png")
        made.append((spec, folder, model))
    command = [sys.executable, "-c", CLEAN, *(str(folder) for _, folder, _ in made)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    for spec, folder, model in made:
        there = torch.load(folder / "embedded.pt")
        seen = pixels_of(spec.image)
        mean, std = (torch.tensor(x).view(3, 1, 1) for x in (seen.mean, seen.std))
        for i, theirs in enumerate(there["pixels"]):
            ours = torch.from_numpy(square((folder / f"{i}.png").read_bytes(), seen.size, None).copy())
            torch.testing.assert_close(theirs, (ours.permute(2, 0, 1) / 255 - mean) / std, atol=1e-5, rtol=0)
        lengths = there["mask"].sum(1).tolist()
        assert max(lengths) == WINDOW and min(lengths) < WINDOW
        ids = [row[:n].tolist() for row, n in zip(there["ids"], lengths, strict=True)]
        with torch.no_grad():
            image_BD, text_BD, _ = model(there["pixels"], pack(ids + ids[:1]))
        torch.testing.assert_close(there["images"], image_BD, atol=1e-6, rtol=0)
        torch.testing.assert_close(there["texts"], text_BD[: len(ids)], atol=1e-6, rtol=0)
        torch.testing.assert_close(there["cosines"], image_BD @ text_BD[: len(ids)].T, atol=1e-5, rtol=0)


@pytest.mark.parametrize("combination", OPEN_CLIP, ids=lambda c: f"{c[0]['model_type']}-{c[1]}-{c[3]}-{c[4]}")
def test_open_clip_s_layout(combination: Any, tmp_path: Path) -> None:
    """Against its forward pass, written down again here in plain torch on its names."""
    image, i_pool, text, t_pool, t_head = combination
    spec = model_of(image, i_pool, "linear", text, t_pool, t_head)
    model = shaken(spec)
    make_tokenizer(tmp_path / "tok")
    folder = tmp_path / "made"
    folder.mkdir()
    write_openclip(folder, model, spec, str(tmp_path / "tok"), str(folder / "text"))
    weights = load_file(folder / "open_clip_model.safetensors")
    config = json.loads((folder / "open_clip_config.json").read_text())["model_cfg"]
    pixels = torch.randn(3, 3, 16, 16)
    ids = [[1, 5, 9, 2], [1, 2], [1, 7, 7, 8, 30, 2]]
    with torch.no_grad():
        image_BD, text_BD, scale = model(pixels, pack(ids))
        theirs = F.normalize(visual(config, {k[7:]: v for k, v in weights.items() if k.startswith("visual.")}, pixels))
        texts = F.normalize(
            hf_text(config["text_cfg"], {k[5:]: v for k, v in weights.items() if k.startswith("text.")}, ids)
        )
    torch.testing.assert_close(theirs, image_BD, atol=1e-6, rtol=0)
    torch.testing.assert_close(texts, text_BD, atol=1e-6, rtol=0)
    assert weights["logit_scale"].shape == () and weights["logit_scale"].exp().item() == pytest.approx(scale.item())
    assert AutoTokenizer.from_pretrained(config["text_cfg"]["hf_tokenizer_name"]).model_max_length == WINDOW


def visual(config: dict[str, Any], w: dict[str, Tensor], pixels: Tensor) -> Tensor:
    c = config["vision_cfg"]
    width, eps = c["width"], c["norm_kwargs"]["eps"]
    heads = width // c["head_width"]

    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, (width,), w[f"{name}.weight"], w[f"{name}.bias"], eps)

    x = F.conv2d(pixels, w["conv1.weight"], stride=c["patch_size"]).flatten(2).transpose(1, 2)
    x = torch.cat([w["class_embedding"].expand(len(x), 1, -1), x], 1) + w["positional_embedding"]
    x = x if c["no_ln_pre"] else norm(x, "ln_pre")
    for layer in range(c["layers"]):
        block = f"transformer.resblocks.{layer}"
        y = norm(x, f"{block}.ln_1")
        qkv = F.linear(y, w[f"{block}.attn.in_proj_weight"], w[f"{block}.attn.in_proj_bias"])
        q, k, v = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in qkv.chunk(3, -1))
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + F.linear(y, w[f"{block}.attn.out_proj.weight"], w[f"{block}.attn.out_proj.bias"])
        y = F.linear(norm(x, f"{block}.ln_2"), w[f"{block}.mlp.c_fc.weight"], w[f"{block}.mlp.c_fc.bias"])
        y = y * torch.sigmoid(1.702 * y) if config["quick_gelu"] else F.gelu(y)
        x = x + F.linear(y, w[f"{block}.mlp.c_proj.weight"], w[f"{block}.mlp.c_proj.bias"])
    if not c["final_ln_after_pool"]:
        x = norm(x, "ln_post")
    x = x[:, 0] if c["pool_type"] == "tok" else x[:, 1:].mean(1)
    return (norm(x, "ln_post") if c["final_ln_after_pool"] else x) @ w["proj"]


def hf_text(c: dict[str, Any], w: dict[str, Tensor], ids: list[list[int]]) -> Tensor:
    settings = AutoConfig.from_pretrained(c["hf_model_name"])
    tower = AutoModel.from_config(settings, add_pooling_layer=False).eval()
    tower.load_state_dict({k.removeprefix("transformer."): v for k, v in w.items() if k.startswith("transformer.")})
    padded = torch.nn.utils.rnn.pad_sequence(
        [torch.tensor(i) for i in ids], batch_first=True, padding_value=settings.pad_token_id
    )
    mask = (padded != settings.pad_token_id).long()
    hidden = tower(input_ids=padded, attention_mask=mask).last_hidden_state
    if c["hf_pooler_type"] == "mean_pooler":
        pooled = (hidden * mask[..., None]).sum(1) / mask.sum(-1, keepdim=True)
    else:
        assert c["hf_pooler_type"] == "cls_last_hidden_state_pooler"
        pooled = hidden[:, 0]
    if c["hf_proj_type"] == "linear":
        return F.linear(pooled, w["proj.weight"])
    return F.linear(F.gelu(F.linear(pooled, w["proj.0.weight"])), w["proj.2.weight"])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"text": MODERNBERT}, "no modernbert text tower"),
        ({"i_head": "mlp2"}, "ends in a linear head, this one in mlp2"),
        ({"image": {**CLIP, "hidden_act": "relu"}}, "no relu in its image tower; it has gelu, quick_gelu"),
    ],
)
def test_what_open_clip_has_not_is_refused(change: dict[str, Any], words: str, tmp_path: Path) -> None:
    parts = {"image": CLIP, "i_pool": "cls", "i_head": "linear", "text": BERT, "t_pool": "mean", "t_head": "mlp2"}
    spec = model_of(**{**parts, **change})
    with pytest.raises(UserError, match=re.escape(words)) as caught:
        write_openclip(tmp_path, build(spec, 0), spec, "unused", "unused")
    assert caught.value.hint == "longclip export --format transformers"
    assert not list(tmp_path.iterdir())
