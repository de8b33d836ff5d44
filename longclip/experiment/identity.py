"""Which run an experiment is: the hash of what decides its weights.

Identity is ``model``, ``data`` (train, val, text) and ``train``, with references replaced by what they hold:
datasets by the hash of their content, pretrained towers and tokenizers by the hash of their files. Paths, hub ids,
the number of nodes and this package's version are not in it. A field left at its default is not in it either, so a
field added later leaves the ids of existing experiments as they are (``tests/experiment/golden_ids.json``).
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from longclip.experiment.schema import IDENTITY, Experiment

TRAIN = "data.train"
REFERENCES = (
    TRAIN,
    "data.val",
    "model.image.tower",
    "model.text.tower",
    "model.text.tokenizer",
    "model.init.from",
)
"""Fields that refer to content elsewhere; identity holds the hash of that content instead."""

OPEN_CLIP = "open_clip_config.json"
"""describes a tower that open_clip wrote; of no meaning beside a config.json"""

_TOWER_FILES = (
    "config.json",
    "preprocessor_config.json",
    "*.safetensors",
    "pytorch_model*.bin",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
)


def references(experiment: Experiment) -> dict[str, str]:
    """The references that the experiment makes, by dotted key."""
    flat = flatten(experiment.model_dump(mode="json")) | train_sources(experiment)
    keys = (*train_sources(experiment), *REFERENCES[1:])
    return {key: flat[key] for key in keys if flat.get(key) is not None}


def train_sources(experiment: Experiment) -> dict[str, str]:
    """The training datasets by dotted key: ``data.train``, or ``data.train.0``, ``data.train.1``, ... of several."""
    names = [source.name for source in experiment.data.sources]
    return {TRAIN: names[0]} if len(names) == 1 else {f"{TRAIN}.{i}": name for i, name in enumerate(names)}


def identity(experiment: Experiment, pins: Mapping[str, str]) -> dict[str, Any]:
    """What decides the weights, flat, by dotted key; ``pins`` gives the content hash of every reference."""
    dump = experiment.model_dump(mode="json", include=set(IDENTITY), exclude_defaults=True)
    flat = flatten(dump)
    flat.pop("data.test", None)
    sources = experiment.data.sources
    if len(sources) > 1:  # their weights matter as shares: 3 and 1 are 6 and 2
        del flat[TRAIN]
        whole = math.fsum(source.weight for source in sources)
        flat |= {f"{TRAIN}.{i}.share": source.weight / whole for i, source in enumerate(sources)}
    for key in references(experiment):
        flat[key] = pins[key]
    return flat


def uid(identity: Mapping[str, Any]) -> str:
    """Eight hex digits of the hash of an identity."""
    text = json.dumps(dict(identity), sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def differences(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Keys in which two identities differ, with both values (``None`` for the default)."""
    return {k: (a.get(k), b.get(k)) for k in sorted({*a, *b}) if a.get(k) != b.get(k)}


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """``{"a": {"b": 1}}`` -> ``{"a.b": 1}``; lists stay whole, empty mappings vanish."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def hash_folder(folder: Path) -> str:
    """Hash of a tower's or tokenizer's files by name and content, the same wherever the folder lies."""
    digest = hashlib.sha256()
    patterns = _TOWER_FILES if (folder / "config.json").is_file() else (*_TOWER_FILES, OPEN_CLIP)
    files = sorted({p for pattern in patterns for p in folder.glob(pattern)}, key=lambda p: p.name)
    for file in files:
        with file.open("rb") as f:
            content = hashlib.file_digest(f, "sha256").hexdigest()
        digest.update(f"{file.name}\0{content}\n".encode())
    return digest.hexdigest()


def natural(text: str) -> list[str | int]:
    """Sort key that puts ctx77 before ctx154."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", text)]
