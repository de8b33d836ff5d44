"""Models that no run here has trained: what a folder holds, told without torch.

Two forms are known, both of transformers: a ``CLIPModel`` (of the hub, or exported by longclip), and the folders of
``longclip export`` with a tower each (model/export.py), whose ``heads.safetensors`` says how the towers are pooled.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from longclip.errors import UserError
from longclip.experiment import kinds
from longclip.experiment.identity import hash_folder
from longclip.experiment.schema import Model

HEADS = "heads.safetensors"
UNSET = 10**9
"""tokens; transformers writes a far larger ``model_max_length`` where a tokenizer has none"""


@dataclass(frozen=True)
class External:
    """A model in a folder."""

    folder: Path
    source: str
    """as it was asked for: a hub id, or the folder"""
    form: str
    """``clip`` or ``towers``"""
    spec: Model
    loss: str
    weights: str
    """hash of all files that decide what it computes"""

    @property
    def name(self) -> str:
        last = self.source.partition("@")[0].rstrip("/").rpartition("/")[2]
        return f"{re.sub(r'[^A-Za-z0-9._-]+', '-', last)}-{self.weights[:8]}"

    @property
    def tokenizer(self) -> str:
        return str(self.folder if self.form == "clip" else self.folder / "text")


def is_model(folder: Path) -> bool:
    return (folder / HEADS).is_file() or (folder / "config.json").is_file()


def describe(folder: Path, source: str) -> External:
    """Raises UserError where the folder holds no model of the known forms."""
    if (folder / HEADS).is_file():
        spec, loss = _towers(folder)
        digest = hashlib.sha256("".join(hash_folder(folder / side) for side in ("image", "text")).encode())
        header, tensors = _heads(folder / HEADS)
        digest.update(json.dumps(header, sort_keys=True).encode())  # which safetensors writes in any order
        digest.update(tensors)
        return External(folder, source, "towers", spec, loss, digest.hexdigest())
    config = _json(folder / "config.json")
    if config.get("model_type") != "clip":
        kind = config.get("model_type", "nothing known")
        raise UserError(
            f"{source}: {kind}; valid are transformers' CLIPModel, and what longclip export writes for transformers"
        )
    text = kinds.part(config, "text")
    spec = Model.model_validate(
        {
            "context_length": _window(folder, text),
            "embed_dim": config.get("projection_dim", 512),
            "image": {"tower": str(folder), "pool": "cls", "head": "linear"},
            "text": {"tower": str(folder), "pool": "last", "head": "linear"},
        }
    )
    return External(folder, source, "clip", spec, "contrastive", hash_folder(folder))


def _towers(folder: Path) -> tuple[Model, str]:
    header, _ = _heads(folder / HEADS)
    said = header.pop("__metadata__", {})
    if missing := [key for key in ("image_pool", "text_pool") if key not in said]:
        raise UserError(
            f"{folder / HEADS} does not say {missing[0]}: it was exported by an older version",
            "export the run again, or evaluate the run itself",
        )
    text = _json(folder / "text" / "config.json")
    sides: dict[str, dict[str, Any]] = {}
    for side in ("image", "text"):
        kind = "linear" if f"{side}.weight" in header else "mlp2"
        sides[side] = {"tower": str(folder / side), "pool": said[f"{side}_pool"], "head": kind}
    last = header.get("image.weight") or header["image.2.weight"]
    model = {"context_length": _window(folder / "text", text), "embed_dim": last["shape"][0], **sides}
    return Model.model_validate(model), "sigmoid" if "bias" in header else "contrastive"


def _window(folder: Path, text: dict[str, Any]) -> int:
    """Where the tokenizer cuts, as far as the tower goes."""
    if text.get("model_type") not in kinds.TEXT:
        raise UserError(f"{folder}: a {text.get('model_type')} text tower; known here: {', '.join(kinds.TEXT)}")
    file = folder / "tokenizer_config.json"
    said = _json(file).get("model_max_length") if file.is_file() else None
    reach = kinds.reach(text)
    return min(int(said), reach) if isinstance(said, int | float) and said < UNSET else reach


def _json(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read: {error}") from None
    return found if isinstance(found, dict) else {}


def _heads(file: Path) -> tuple[dict[str, Any], bytes]:
    """Header and tensors of a safetensors file: the header's length as 8 bytes, little end first, JSON, the rest."""
    data = file.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    try:
        header = json.loads(data[8:end]) if end <= len(data) else None
    except ValueError:
        header = None
    if not isinstance(header, dict):
        raise UserError(f"{file} is no safetensors file")
    return header, data[end:]
