"""Exported folders give the embeddings of the model, without this package."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import venv
import zipfile
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoConfig, AutoModel, AutoTokenizer

from longclip.data.loader import square
from longclip.errors import UserError
from longclip.experiment.schema import ImageTower, Model
from longclip.launch.export import _TRANSFORMERS
from longclip.model.clip import DualEncoder, build
from longclip.model.export import write_openclip, write_transformers
from longclip.model.packing import pack
from longclip.model.towers import ImageEncoder, pixels_of
from tests.data.test_loader import WORDS
from tests.model.test_packing import BERT, CLIP, CLIP_TEXT, MODERNBERT, ROBERTA, VIT
from tests.vocabularies import fetch

WINDOW = 9
SIGLIP = {**CLIP, "model_type": "siglip_vision_model"}
COMBINATIONS = [
    (VIT, "mean", "linear", MODERNBERT, "mean", "mlp2"),
    (VIT, "cls", "mlp2", BERT, "cls", "linear"),
    (CLIP, "cls", "linear", BERT, "mean", "mlp2"),
    (CLIP, "mean", "mlp2", MODERNBERT, "cls", "linear"),
    (SIGLIP, "map", "linear", {**ROBERTA, "pad_token_id": 0}, "mean", "linear"),
    (SIGLIP, "mean", "linear", CLIP_TEXT, "last", "mlp2"),
    (CLIP, "cls", "linear", CLIP_TEXT, "last", "linear"),  # a CLIPModel
]
OPEN_CLIP = [
    (VIT, "cls", BERT, "mean", "mlp2"),
    (VIT, "mean", BERT, "cls", "linear"),
    (CLIP, "cls", BERT, "mean", "mlp2"),
    (CLIP, "mean", BERT, "cls", "linear"),
    (CLIP, "cls", CLIP_TEXT, "last", "linear"),
]
NEEDED = ("torch", "transformers", "safetensors", "pillow")
"""what the card asks for"""
CLEAN = """
import importlib.util, json, sys
assert not any(map(importlib.util.find_spec, ("longclip", "deepspeed", "webdataset"))), sys.path
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


EOT = 40


def make_tokenizer(folder: Path) -> None:
    """Word by word, between a beginning and CLIP's kind of end of text."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[BOS]", "w0", "[UNK]", *WORDS[1:30]])} | {"[EOT]": EOT}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    ends = [("[BOS]", 1), ("[EOT]", EOT)]
    raw.post_processor = processors.TemplateProcessing(single="[BOS] $A [EOT]", special_tokens=ends)
    folder.mkdir()
    raw.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "[PAD]", "bos_token": "[BOS]"}
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "eos_token": "[EOT]", "unk_token": "[UNK]"}))


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


def clean_environment(folder: Path) -> Path:
    """The Python of an environment that holds what the card asks for, and what that asks for in turn: all else is not
    installed there. Packages are links to those here, so that nothing is downloaded."""
    venv.create(folder, with_pip=False)
    (packages,) = (folder / "lib").glob("python*/site-packages")
    found: dict[str, metadata.Distribution] = {}
    names = list(NEEDED)
    while names:
        if (name := canonicalize_name(names.pop())) not in found:
            found[name] = metadata.distribution(name)
            asked = map(Requirement, found[name].requires or ())
            names += [one.name for one in asked if one.marker is None or one.marker.evaluate({"extra": ""})]
    for distribution in found.values():
        for part in {file.parts[0] for file in distribution.files or ()} - {"..", "__pycache__"}:
            if not (packages / part).exists():
                (packages / part).symlink_to(str(distribution.locate_file(part)))
    return folder / "bin" / "python"


def test_transformers_folders_in_a_clean_environment(tmp_path: Path) -> None:
    """The lines of the model card, run where there is what it names and no longclip, on folders that have moved since,
    without a network: equal to 1e-6."""
    from PIL import Image

    assert all(name in _TRANSFORMERS[0] for name in NEEDED)

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
        made.append((spec, folder.rename(tmp_path / f"moved-{k}"), model))
    shutil.rmtree(tmp_path / "tok")
    python = clean_environment(tmp_path / "venv")
    command = [str(python), "-I", "-c", CLEAN, *(str(folder) for _, folder, _ in made)]
    env = {"HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=env)
    assert done.returncode == 0, done.stderr[-3000:]
    for spec, folder, model in made:
        there = torch.load(folder / "embedded.pt")
        seen = pixels_of(spec.image)
        mean, std = (torch.tensor(x).view(3, 1, 1) for x in (seen.mean, seen.std))
        for i, theirs in enumerate(there["pixels"]):
            ours = torch.from_numpy(square((folder / f"{i}.png").read_bytes(), seen, None).copy())
            torch.testing.assert_close(theirs, (ours.permute(2, 0, 1) / 255 - mean) / std, atol=1e-5, rtol=0)
        lengths = there["mask"].sum(1).tolist()
        assert max(lengths) == WINDOW and min(lengths) < WINDOW
        ids = [row[:n].tolist() for row, n in zip(there["ids"], lengths, strict=True)]
        with torch.no_grad():
            image_BD, text_BD, _ = model(there["pixels"], pack(ids + ids[:1]))
        torch.testing.assert_close(there["images"], image_BD, atol=1e-6, rtol=0)
        torch.testing.assert_close(there["texts"], text_BD[: len(ids)], atol=1e-6, rtol=0)
        torch.testing.assert_close(there["cosines"], image_BD @ text_BD[: len(ids)].T, atol=1e-5, rtol=0)


IDS = [[1, 5, 9, EOT], [1, EOT], [1, 7, 7, 8, 30, EOT]]


def written(combination: Any, folder: Path) -> tuple[DualEncoder, Model]:
    """A model in open_clip's layout in ``folder``/made."""
    image, i_pool, text, t_pool, t_head = combination
    spec = model_of(image, i_pool, "linear", text, t_pool, t_head)
    model = shaken(spec)
    make_tokenizer(folder / "tok")
    (folder / "made").mkdir()
    write_openclip(folder / "made", model, spec, str(folder / "tok"), str(folder / "made" / "text"))
    return model, spec


def name_of(combination: Any) -> str:
    image, i_pool, text, t_pool, _ = combination
    return f"{image['model_type']}-{i_pool}-{text['model_type']}-{t_pool}"


@pytest.mark.parametrize("combination", OPEN_CLIP, ids=name_of)
def test_open_clip_s_layout(combination: Any, tmp_path: Path) -> None:
    """Against its forward pass, written down again here in plain torch on its names."""
    model, _ = written(combination, tmp_path)
    weights = load_file(tmp_path / "made" / "open_clip_model.safetensors")
    config = json.loads((tmp_path / "made" / "open_clip_config.json").read_text())["model_cfg"]
    pixels = torch.randn(3, 3, 16, 16)
    of_images, of_text = ({k[len(s) :]: v for k, v in weights.items() if k.startswith(s)} for s in ("visual.", "text."))
    text = hf_text if "hf_model_name" in config["text_cfg"] else own_text
    with torch.no_grad():
        image_BD, text_BD, scale = model(pixels, pack(IDS))
        theirs = F.normalize(visual(config, of_images, pixels)), F.normalize(text(config, of_text, IDS))
    torch.testing.assert_close(theirs[0], image_BD, atol=1e-6, rtol=0)
    torch.testing.assert_close(theirs[1], text_BD, atol=1e-6, rtol=0)
    assert weights["logit_scale"].shape == () and weights["logit_scale"].exp().item() == pytest.approx(scale.item())
    assert AutoTokenizer.from_pretrained(config["text_cfg"]["hf_tokenizer_name"]).model_max_length == WINDOW


@pytest.mark.parametrize("combination", [c for c in OPEN_CLIP if c[0]["model_type"] != "vit"], ids=name_of)
def test_an_image_tower_exported_so_begins_another_run(combination: Any, tmp_path: Path) -> None:
    model, spec = written(combination, tmp_path)
    again = ImageEncoder(ImageTower(tower=str(tmp_path / "made"), pool=spec.image.pool), 24).eval()
    pixels = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        again.head.load_state_dict(model.image.head.state_dict())
        torch.testing.assert_close(again(pixels), model.image(pixels), atol=1e-6, rtol=1e-6)
    assert pixels_of(ImageTower(tower=str(tmp_path / "made"))) == pixels_of(spec.image)


def transformer(w: dict[str, Tensor], x: Tensor, c: dict[str, Any], heads: int, quick: bool, causal: bool) -> Tensor:
    for layer in range(c["layers"]):
        block = f"transformer.resblocks.{layer}"
        y = norm(w, x, f"{block}.ln_1", c)
        qkv = F.linear(y, w[f"{block}.attn.in_proj_weight"], w[f"{block}.attn.in_proj_bias"])
        q, k, v = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in qkv.chunk(3, -1))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=causal).transpose(1, 2).flatten(2)
        x = x + F.linear(y, w[f"{block}.attn.out_proj.weight"], w[f"{block}.attn.out_proj.bias"])
        y = F.linear(norm(w, x, f"{block}.ln_2", c), w[f"{block}.mlp.c_fc.weight"], w[f"{block}.mlp.c_fc.bias"])
        y = y * torch.sigmoid(1.702 * y) if quick else F.gelu(y)
        x = x + F.linear(y, w[f"{block}.mlp.c_proj.weight"], w[f"{block}.mlp.c_proj.bias"])
    return x


def norm(w: dict[str, Tensor], x: Tensor, name: str, c: dict[str, Any]) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], c["norm_kwargs"]["eps"])


def visual(config: dict[str, Any], w: dict[str, Tensor], pixels: Tensor) -> Tensor:
    c = config["vision_cfg"]
    x = F.conv2d(pixels, w["conv1.weight"], stride=c["patch_size"]).flatten(2).transpose(1, 2)
    x = torch.cat([w["class_embedding"].expand(len(x), 1, -1), x], 1) + w["positional_embedding"]
    x = x if c["no_ln_pre"] else norm(w, x, "ln_pre", c)
    x = transformer(w, x, c, c["width"] // c["head_width"], config["quick_gelu"], causal=False)
    if not c["final_ln_after_pool"]:
        x = norm(w, x, "ln_post", c)
    x = x[:, 0] if c["pool_type"] == "tok" else x[:, 1:].mean(1)
    return (norm(w, x, "ln_post", c) if c["final_ln_after_pool"] else x) @ w["proj"]


def own_text(config: dict[str, Any], w: dict[str, Tensor], ids: list[list[int]]) -> Tensor:
    c = config["text_cfg"]
    padded = torch.zeros(len(ids), c["context_length"], dtype=torch.long)
    for row, tokens in zip(padded, ids, strict=True):
        row[: len(tokens)] = torch.tensor(tokens)
    x = w["token_embedding.weight"][padded] + w["positional_embedding"]
    x = norm(w, transformer(w, x, c, c["heads"], config["quick_gelu"], causal=True), "ln_final", c)
    assert c["pool_type"] == "eos"
    return x[torch.arange(len(x)), (padded == c["eos_id"]).int().argmax(-1)] @ w["text_projection"]


def hf_text(config: dict[str, Any], w: dict[str, Tensor], ids: list[list[int]]) -> Tensor:
    c = config["text_cfg"]
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


# torchvision and ftfy only stand in: neither the model nor the loading of its weights touches them.
REAL = """
import importlib.machinery, json, sys, types
from transformers import AutoModel, BertModel  # first: they would make use of a torchvision

class Anything(types.ModuleType):
    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {"BICUBIC": 1, "BILINEAR": 2, "NEAREST": 3})

for name in ("", ".transforms", ".transforms.functional", ".ops", ".ops.misc"):
    sys.modules["torchvision" + name] = Anything("torchvision" + name)
sys.modules["ftfy"] = Anything("ftfy")
for name, module in sys.modules.items():
    if isinstance(module, Anything):
        module.__spec__, module.__path__ = importlib.machinery.ModuleSpec(name, None), []
        parent, _, last = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], last, module)
import torch
from safetensors.torch import load_file
sys.path.append(sys.argv[1])
from open_clip.model import CustomTextCLIP
for folder in sys.argv[2:]:
    config = json.load(open(f"{folder}/open_clip_config.json"))["model_cfg"]
    assert config.pop("custom_text")
    model = CustomTextCLIP(**config).eval()
    model.load_state_dict(load_file(f"{folder}/open_clip_model.safetensors"))
    given = torch.load(f"{folder}/given.pt")
    with torch.no_grad():
        made = model.encode_image(given["pixels"], normalize=True), model.encode_text(given["ids"], normalize=True)
    torch.save(made, f"{folder}/made.pt")
"""


def test_open_clip_itself_loads_it(tmp_path: Path) -> None:
    with zipfile.ZipFile(fetch("open-clip-torch==3.3.0", tmp_path)) as archive:
        archive.extractall(tmp_path / "wheel")
    models = {}
    for k, combination in enumerate(OPEN_CLIP):
        (tmp_path / str(k)).mkdir()
        models[tmp_path / str(k) / "made"] = written(combination, tmp_path / str(k))[0]
    ids = torch.zeros(len(IDS), WINDOW, dtype=torch.long)
    for row, tokens in zip(ids, IDS, strict=True):
        row[: len(tokens)] = torch.tensor(tokens)
    pixels = torch.randn(3, 3, 16, 16)
    for folder in models:
        torch.save({"pixels": pixels, "ids": ids}, folder / "given.pt")
    done = subprocess.run(
        [sys.executable, "-c", REAL, str(tmp_path / "wheel"), *map(str, models)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for folder, model in models.items():
        with torch.no_grad():
            ours = model(pixels, pack(IDS))[:2]
        for theirs, expected in zip(torch.load(folder / "made.pt"), ours, strict=True):
            torch.testing.assert_close(theirs, expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"text": MODERNBERT}, "open_clip: no modernbert text tower pooled by mean with a mlp2 head"),
        ({"text": CLIP_TEXT, "t_pool": "last"}, "open_clip: no clip_text_model text tower pooled by last with a mlp2"),
        ({"image": SIGLIP, "i_pool": "map"}, "open_clip: no siglip_vision_model image tower"),
        ({"i_head": "mlp2"}, "ends in a linear head, this one in mlp2"),
        ({"image": {**CLIP, "hidden_act": "relu"}}, "no relu in its image tower; it has gelu, quick_gelu"),
        ({"image": VIT, "text": CLIP_TEXT, "t_pool": "last", "t_head": "linear"}, "one activation for both towers"),
        ({"text": {**BERT, "pad_token_id": 3}}, "the tokenizer pads with 0, the text tower takes 3 for padding"),
    ],
)
def test_what_open_clip_has_not_is_refused(change: dict[str, Any], words: str, tmp_path: Path) -> None:
    parts = {"image": CLIP, "i_pool": "cls", "i_head": "linear", "text": BERT, "t_pool": "mean", "t_head": "mlp2"}
    spec = model_of(**{**parts, **change})
    make_tokenizer(tmp_path / "tok")
    (tmp_path / "made").mkdir()
    with pytest.raises(UserError, match=re.escape(words)):
        write_openclip(tmp_path / "made", build(spec, 0), spec, str(tmp_path / "tok"), "unused")
    assert not list((tmp_path / "made").iterdir())


def test_clip_becomes_a_clip_model(tmp_path: Path) -> None:
    """So that everything that takes one takes it."""
    from transformers import CLIPModel

    spec = model_of(*COMBINATIONS[-1])
    make_tokenizer(tmp_path / "tok")
    (tmp_path / "made").mkdir()
    model = shaken(spec)
    write_transformers(tmp_path / "made", model, spec, str(tmp_path / "tok"))
    loaded, said = CLIPModel.from_pretrained(tmp_path / "made", output_loading_info=True)
    assert not said["missing_keys"] and not said["unexpected_keys"]
    assert loaded.logit_scale.item() == pytest.approx(model.log_scale.item())
