"""Names to content: which folders an experiment's datasets, towers and tokenizer are here, and what is in them.

Done on the submit side, where there is a network: hub ids are fetched at a commit and pinned by the hash of their
files, so that a worker on a node without internet loads what was meant, or nothing.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from longclip.data.shards import Dataset, open_dataset
from longclip.data.text import Text
from longclip.data.tokens import vocabulary_of
from longclip.errors import LongclipError, SiteError, UserError
from longclip.evaluate.suite import Resolved as Suite
from longclip.evaluate.suite import read_suite
from longclip.experiment import kinds
from longclip.experiment.identity import OPEN_CLIP, TRAIN, hash_folder, references, train_sources
from longclip.experiment.schema import Experiment
from longclip.launch.site import Site
from longclip.launch.suites import check_text, resolve_suite
from longclip.model.layouts import layout_of
from longclip.run import lineage
from longclip.run.folder import RunFolder

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
    parent: RunFolder | None = None
    """the run whose end gives this one its first weights"""
    suites: list[Suite] = field(default_factory=list)
    """what its chosen checkpoint is scored on in the end; their paths are among ``paths``"""


def resolve(experiment: Experiment, site: Site, beside: Sequence[tuple[RunFolder, Mapping[str, Any]]] = ()) -> Resolved:
    """Finds every reference. What cannot be found is a problem, and pinned by name so that a dry run can go on.

    ``beside``: runs that are submitted together with this one, and their identities; it may begin from one of them.
    """
    found = Resolved()
    datasets: dict[str, Dataset] = {}
    wanted = references(experiment)
    if experiment.data.test is not None:
        wanted["data.test"] = experiment.data.test
    for key, reference in wanted.items():
        try:
            if key.startswith("data."):
                folder = site.dataset(reference)
                dataset = open_dataset(folder)
                check_text(dataset, Text.of(experiment.data), "data.text")
                found.pins[key] = dataset.hash
                datasets[key] = dataset
            elif key == lineage.KEY:
                folder, found.pins[key], found.parent = _origin(reference, site, beside)
            else:
                folder = _tower(reference, site)
                found.pins[key] = hash_folder(folder)
            found.paths[key] = str(Path(folder).absolute())
        except LongclipError as error:
            error.message = f"{key}: {error.message}"
            found.problems.append(error)
            found.pins[key] = f"unresolved:{reference}"
    found.problems += _trained_on(datasets)
    for i, file in enumerate(experiment.evaluate.suites):
        try:
            suite = resolve_suite(read_suite(Path(file)), site, Text.of(experiment.data).long)
            if suite.name in [other.name for other in found.suites]:
                raise UserError(f"another suite is called {suite.name!r}, too")
            found.suites.append(suite)
            found.paths |= suite.named_paths()
        except LongclipError as error:
            error.message = f"evaluate.suites.{i}: {error.message}"
            found.problems.append(error)
    try:
        train = train_sources(experiment)
        if all(key in datasets for key in train):
            found.samples = _samples(experiment, sum(len(datasets[key]) for key in train))
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


def _trained_on(datasets: Mapping[str, Dataset]) -> list[LongclipError]:
    """Shards of validation and test that training has as well, by content: scores would be of pairs learned by heart.

    A folder named without a pattern holds all of its shards, the test set's too.
    """
    trained: dict[str, tuple[str, Path]] = {}
    for key in (key for key in datasets if key.startswith(TRAIN)):
        trained |= {sha: (key, shard) for sha, shard in _shards(datasets[key])}
    found: list[LongclipError] = []
    for key in (key for key in datasets if not key.startswith(TRAIN)):
        both = [(shard, *trained[sha]) for sha, shard in _shards(datasets[key]) if sha in trained]
        if both:
            shard, where, same = both[0]
            also = "" if same == shard else f" as {same}"
            more = f", as {len(both) - 1} more of its shards are" if len(both) > 1 else ""
            found.append(
                UserError(
                    f"{key}: {shard} is among the shards of {where}{also}{more}: it would be scored on what it was "
                    "trained on",
                    f"{where}: a pattern that leaves them out, as FOLDER/train-*.tar",
                )
            )
    return found


def _shards(dataset: Dataset) -> list[tuple[str, Path]]:
    """(sha256, path) of each that holds a sample: those that hold none are alike."""
    every = zip(dataset.sha256, dataset.names, dataset.sizes, strict=True)
    return [(sha, dataset.root / name) for sha, name, size in every if size]


def _origin(
    reference: str, site: Site, beside: Sequence[tuple[RunFolder, Mapping[str, Any]]]
) -> tuple[Path, str, RunFolder | None]:
    """Where a run's first weights lie or will lie, their pin, and the run that they are of, if it is one."""
    name = lineage.run_name(reference)
    if name is not None:
        run, identity = lineage.find(name, site.runs, beside)
        return run.path, lineage.pin_of_run(identity, reference), run
    if not Path(reference).is_absolute():
        folder = fetched(reference, site)
    elif (run := RunFolder(Path(lineage.without_best(reference)))).exists():
        return run.path, lineage.pin_of_run(run.identity(), reference), run
    else:
        folder = Path(reference)
    return folder, lineage.hash_of_weights(folder), None


def _tower(reference: str, site: Site) -> Path:
    """The folder of a tower or tokenizer; hub ids (``owner/name``, ``owner/name@revision``) are fetched."""
    if Path(reference).is_absolute():
        folder = Path(reference)
        if not any((folder / file).is_file() for file in ("config.json", "tokenizer_config.json", OPEN_CLIP)):
            raise UserError(f"{reference}: no tower or tokenizer here (no config.json, no tokenizer_config.json)")
        return folder
    return fetched(reference, site)


def fetched(reference: str, site: Site) -> Path:
    """The files of a hub id, on this machine."""
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


def tower_config(folder: Path, key: str, side: str) -> dict[str, Any]:
    """The transformers configuration of a tower in a folder; of a checkpoint with both towers that of this side.

    Raises UserError where there is none, or of another kind of model.
    """
    if side == "image" and (layout := layout_of(folder)) is not None:
        return layout.vision_config(folder)
    try:
        config: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{key}: {folder}/config.json cannot be read: {error}") from None
    known = kinds.known(side)
    if config.get("model_type") not in known:
        raise UserError(f"{key}: {folder} is a {config.get('model_type')!r} model; known here: {', '.join(known)}")
    return kinds.part(config, side)


def _check_towers(experiment: Experiment, paths: dict[str, str]) -> None:
    """The towers are of a known kind; window and vocabulary fit the text tower, as far as its config says."""
    image, text = experiment.model.image, experiment.model.text
    if folder := paths.get("model.image.tower"):
        kind = tower_config(Path(folder), "model.image.tower", "image")["model_type"]
        if why := kinds.image_pool(kind, image.pool):
            raise UserError(f"model.image.pool: {why}")
    config = text.config
    if config is None and (folder := paths.get("model.text.tower")):
        config = tower_config(Path(folder), "model.text.tower", "text")
        if why := kinds.text_pool(config["model_type"], text.pool):
            raise UserError(f"model.text.pool: {why}")
        if why := kinds.too_short(config, experiment.model.context_length, text.positions, text.keep):
            raise UserError(f"model.context_length: {why}")
    if config is None:
        return
    tokenizer = paths.get("model.text.tokenizer") or paths.get("model.text.tower")
    tokens = vocabulary_of(Path(tokenizer)) if tokenizer else None
    size = config.get("vocab_size")
    if tokens is not None and isinstance(size, int) and tokens > size:
        raise UserError(
            f"model.text.config.vocab_size: is {size}, but the tokenizer in {tokenizer} has {tokens} tokens",
            f"vocab_size: {tokens} or more",
        )
