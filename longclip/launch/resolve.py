"""Names to content: which folders an experiment's datasets, towers and tokenizer are here, and what is in them.

Done on the submit side, where there is a network: hub ids are fetched at a commit and pinned by the hash of their
files, so that a worker on a node without internet loads what was meant, or nothing.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from longclip.data.shards import Dataset, open_dataset
from longclip.data.text import Text, render
from longclip.data.tokens import vocabulary_of
from longclip.errors import LongclipError, SiteError, UserError
from longclip.experiment.identity import hash_folder, references, train_sources
from longclip.experiment.schema import Experiment
from longclip.launch.site import Site

_FETCHED = ["*.json", "*.safetensors", "*.txt", "*.model", "pytorch_model*.bin"]


@dataclass
class Resolved:
    """Where an experiment's references lie, and the hash of what lies there."""

    paths: dict[str, str] = field(default_factory=dict)
    pins: dict[str, str] = field(default_factory=dict)
    problems: list[LongclipError] = field(default_factory=list)
    """why this could not be submitted; a dry run shows them and goes on"""
    samples: int | None = None
    """pairs that the whole run will see"""


def resolve(experiment: Experiment, site: Site) -> Resolved:
    """Finds every reference. What cannot be found is a problem, and pinned by name so that a dry run can go on."""
    found = Resolved()
    sizes: dict[str, int] = {}
    wanted = references(experiment)
    if experiment.data.test is not None:
        wanted["data.test"] = experiment.data.test
    for key, reference in wanted.items():
        try:
            if key.startswith("data."):
                folder = site.dataset(reference)
                dataset = open_dataset(folder)
                _check_text(dataset, Text.of(experiment.data))
                found.pins[key] = dataset.hash
                sizes[key] = len(dataset)
            else:
                folder = _tower(reference, site)
                found.pins[key] = hash_folder(folder)
            found.paths[key] = str(Path(folder).absolute())
        except LongclipError as error:
            error.message = f"{key}: {error.message}"
            found.problems.append(error)
            found.pins[key] = f"unresolved:{reference}"
    try:
        train = train_sources(experiment)
        if all(key in sizes for key in train):
            found.samples = _samples(experiment, sum(sizes[key] for key in train))
        _check_towers(experiment, found.paths)
    except LongclipError as error:
        found.problems.append(error)
    return found


def _samples(experiment: Experiment, dataset: int) -> int:
    batch = experiment.train.global_batch
    asked = experiment.train.samples or int(dataset * (experiment.train.epochs or 0))
    if asked < batch:
        raise UserError(f"data.train: train: {asked} samples are not one global batch of {batch}")
    return asked // batch * batch


LOOKED_AT = 100
"""samples among which every field that a template names must occur"""


def _check_text(dataset: Dataset, text: Text) -> None:
    """Some of the first samples have the text that is wanted: a misnamed field shows before the queue, not after."""
    shard = next(i for i, size in enumerate(dataset.sizes) if size)
    count = min(LOOKED_AT, dataset.sizes[shard])
    try:
        first = [dataset.fields_and_text(shard, index) for index in range(count)]
    except OSError as error:
        raise SiteError(f"{dataset.folder}: cannot be read: {error}", f"longclip data index {dataset.folder}") from None
    samples = [{**fields, "txt": txt} for _, txt, fields in first]
    missing = [name for name in text.names if not any(name in sample for sample in samples)]
    missing += [t for t in text.texts if not any(render(t, sample).strip() for sample in samples)]
    if missing:
        known = ", ".join(sorted({k for s in samples for k, v in s.items() if isinstance(v, (str, list, dict)) and v}))
        raise UserError(
            f"{dataset.folder} has no text {missing[0]!r} (data.text) in its first {count} samples",
            f"data.text: one of {known}, or a template over them",
        )


def _tower(reference: str, site: Site) -> Path:
    """The folder of a tower or tokenizer; hub ids (``owner/name``, ``owner/name@revision``) are fetched."""
    if Path(reference).is_absolute():
        folder = Path(reference)
        if not (folder / "config.json").is_file() and not (folder / "tokenizer_config.json").is_file():
            raise UserError(f"{reference}: no tower or tokenizer here (no config.json, no tokenizer_config.json)")
        return folder
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    name, _, revision = reference.partition("@")
    cache = None if site.cache is None else site.cache / "hub"
    try:
        return Path(snapshot_download(name, revision=revision or None, cache_dir=cache, allow_patterns=_FETCHED))
    except (HFValidationError, RepositoryNotFoundError):
        raise UserError(
            f"{reference}: not on the hub; valid is owner/name, owner/name@revision, or a path that begins with ./ or /"
        ) from None
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise SiteError(
            f"{reference}: the model hub cannot be reached from here, and it is not in the cache "
            f"({type(error).__name__})",
            "submit from a machine with internet, or give a folder",
        ) from None


def _tower_config(folder: Path, key: str, known: tuple[str, ...]) -> dict[str, Any]:
    """The config of a tower in a folder. Raises UserError where there is none, or of another kind of model."""
    try:
        config: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{key}: {folder}/config.json cannot be read: {error}") from None
    if config.get("model_type") not in known:
        raise UserError(f"{key}: {folder} is a {config.get('model_type')!r} model; known here: {', '.join(known)}")
    return config


def _check_towers(experiment: Experiment, paths: dict[str, str]) -> None:
    """The towers are of a known kind; window and vocabulary fit the text tower, as far as its config says."""
    if folder := paths.get("model.image.tower"):
        _tower_config(Path(folder), "model.image.tower", ("clip_vision_model", "clip", "vit"))
    text = experiment.model.text
    config = text.config
    if config is None and (folder := paths.get("model.text.tower")):
        config = _tower_config(Path(folder), "model.text.tower", ("modernbert", "bert"))
    if config is None:
        return
    positions = config.get("max_position_embeddings")
    if isinstance(positions, int) and experiment.model.context_length > positions:
        raise UserError(
            f"model.context_length: {experiment.model.context_length} is above {text.tower}'s {positions} positions"
        )
    tokenizer = paths.get("model.text.tokenizer") or paths.get("model.text.tower")
    tokens = vocabulary_of(Path(tokenizer)) if tokenizer else None
    size = config.get("vocab_size")
    if tokens is not None and isinstance(size, int) and tokens > size:
        raise UserError(
            f"model.text.config.vocab_size: is {size}, but the tokenizer in {tokenizer} has {tokens} tokens",
            f"vocab_size: {tokens} or more",
        )
