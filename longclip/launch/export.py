"""A run's checkpoint, exported: which one, from what is recorded of the run, and with what its model card says."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from longclip.data.shards import open_dataset
from longclip.errors import LongclipError, SiteError, UserError, told_as_no_space
from longclip.experiment.identity import train_sources
from longclip.run import checkpoints
from longclip.run.attempts import attempts_of
from longclip.run.folder import RunFolder, read_json
from longclip.run.journal import effective

FORMATS = ("transformers", "open_clip")


@dataclass(frozen=True)
class Exported:
    folder: Path
    checkpoint: str
    samples: int


def export(run: RunFolder, which: str, folder: Path, form: str) -> Exported:
    """Writes the model of the checkpoint ``which`` (best, last, or a step) into the new ``folder``.

    Raises:
        UserError: no such checkpoint or format, the folder is there already, the towers have no such form.
        SiteError: this Python has no torch; a file that the run needs is not here; the disk.
        LongclipError: the checkpoint is broken.
    """
    if form not in FORMATS:
        raise UserError(f"--format {form}: valid is {' or '.join(FORMATS)}")
    if folder.exists():
        raise UserError(f"{folder}: is there already", "--to another folder")
    path = choose(run, which)
    checkpoints.verify(path)
    try:
        from longclip.model.clip import build
        from longclip.model.export import write_openclip, write_transformers
        from longclip.train.checkpoint import load_weights
        from longclip.train.loop import localized
    except ImportError as error:
        raise SiteError(f"exporting needs longclip[train]: {error}", 'pip install "longclip[train]"') from None
    experiment = run.experiment()
    paths = paths_of(run)
    spec = localized(experiment.model, paths)
    model = build(spec, experiment.train.seed, loss=experiment.train.loss)
    model.load_state_dict(load_weights(path))
    tokenizer = paths.get("model.text.tokenizer") or str(spec.text.tower)
    aside = checkpoints.aside(folder)
    try:
        with told_as_no_space(folder):
            aside.mkdir(parents=True)
            if form == "transformers":
                recipe, notes = write_transformers(aside, model, spec, tokenizer), _TRANSFORMERS
            else:
                # Its own, for the hub's may have other positions or another tokenizer.
                name = str((folder / "text").absolute())
                recipe, notes = write_openclip(aside, model, spec, tokenizer, name), _OPEN_CLIP
            from longclip.model.card import card

            facts = _facts(run, path, paths)
            (aside / "README.md").write_text(card(facts, recipe, notes), encoding="utf-8")
            aside.rename(folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return Exported(folder, path.name, int(facts["samples"]))


def choose(run: RunFolder, which: str, also: str = "") -> Path:
    """The checkpoint that is meant: ``best`` by validation, as the newest one records it, ``last``, or a step.

    ``also`` is what else the command takes, for the message.
    """
    found = checkpoints.published(run.checkpoints)
    if not found:
        raise UserError(f"{run.name}: has no checkpoint yet", f"longclip status {run.name}")
    if which == "last":
        return checkpoints.last(run.checkpoints)
    if which == "best":
        best = checkpoints.state_of(found[-1]).get("best")
        if not best:
            raise UserError(f"{run.name}: has not been evaluated yet, so none is the best", "--checkpoint last")
        name = str(best["checkpoint"])
    elif which.isdecimal():
        name = f"step-{int(which):08d}"
    else:
        raise UserError(f"--checkpoint {which}: valid is best, last, {f'{also}, ' if also else ''}or a step")
    if name not in [path.name for path in found]:
        there = ", ".join(path.name for path in found)
        raise UserError(f"{run.name}: has no checkpoint {name} (any more); there are {there}")
    return run.checkpoints / name


def paths_of(run: RunFolder) -> dict[str, str]:
    """Where the run's towers, tokenizer and data lay when it was last submitted.

    Raises SiteError where a tower or tokenizer is not there any more.
    """
    submitted = [a.submitted for a in attempts_of(run) if a.submitted is not None]
    paths = dict(submitted[-1].get("paths") or {}) if submitted else {}
    for key, path in paths.items():
        if key.startswith("model.") and not Path(path).is_dir():
            raise SiteError(f"{run.name}: {key} lay at {path}, which is not here", "do this where the run was trained")
    return paths


def _facts(run: RunFolder, path: Path, paths: dict[str, str]) -> dict[str, Any]:
    experiment, identity = run.experiment(), run.identity()
    samples = int(checkpoints.state_of(path)["samples"])
    towers = {side: getattr(experiment.model, side) for side in ("image", "text")}
    sources = train_sources(experiment)
    held_out = {f"data.{part}": getattr(experiment.data, part) for part in ("val", "test")}
    data = {**sources, **{key: name for key, name in held_out.items() if name}}
    file = run.evaluations / "test.json"
    test = read_json(file) if file.is_file() else {}
    return {
        "run": run.name,
        "checkpoint": path.name,
        "samples": samples,
        "model": {
            "window": f"{experiment.model.context_length} tokens",
            "embedding": experiment.model.embed_dim,
            **{
                side: f"{t.tower or (t.config or {}).get('model_type')}, pooled by {t.pool}, head {t.head}"
                for side, t in towers.items()
            },
        },
        "data": [(key, name, identity.get(key, "-")) for key, name in data.items()],
        "licenses": " ".join(_licenses(key, paths.get(key)) for key in sources),
        "test": dict(test["metrics"]) if test.get("checkpoint") == path.name else {},
        "validation": {
            key.removeprefix("val/"): value
            for point in effective(run)
            if point.samples == samples
            for key, value in point.metrics.items()
            if key.startswith("val/")
        },
    }


def _licenses(key: str, folder: str | None) -> str:
    from longclip.model.card import licenses

    try:
        dataset = open_dataset(folder or "")
    except LongclipError:
        return f"{key} is not here, so its licences are not counted."
    found, asked = licenses(dataset)
    counts = "; ".join(f"{name}: {count:,}" for name, count in found.most_common())
    return f"Of the {len(dataset):,} pairs of {key} {asked:,} were asked for theirs: {counts}."


_TRANSFORMERS = [
    "Needs torch, transformers (5.23 or later), safetensors and pillow. Captions are cut to the window as the "
    "tokenizer's own truncation does it. The image processor resizes and then crops; evaluation here cut out the "
    "middle square first, which on images that are not square differs by rounding.",
]
_OPEN_CLIP = [
    "Needs open_clip_torch 3.3 or later. `hf_model_name` and `hf_tokenizer_name` in open_clip_config.json say where "
    "open_clip finds the text tower's configuration and tokenizer: in `text` here. Correct them when the folder moves.",
]
