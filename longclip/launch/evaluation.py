"""``longclip evaluate``, the front's side: which states of which models lack a record on which suites.

    <root>/<sweep>/<run>/evaluations/      where records go (run/evaluations.py); ``root`` is that of the runs, or --out
    <root>/models/<name>-<hash>/           the same for models that are no runs, with model.json

What has its record is not asked for again. How it is done is in evaluation_jobs.py.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from longclip.data.text import Text
from longclip.errors import SiteError, UserError
from longclip.evaluate.suite import Resolved, Retrieval, Suite
from longclip.experiment import kinds
from longclip.experiment.schema import Experiment, Slurm
from longclip.launch.export import choose, paths_of
from longclip.launch.models import External, describe, is_model
from longclip.launch.resolve import fetched
from longclip.launch.site import Site
from longclip.launch.suites import resolve_suite
from longclip.run import checkpoints, evaluations
from longclip.run.folder import RunFolder, find_runs, read_json
from longclip.run.lineage import hash_of_weights

BATCH = 256
"""images or texts that a rank embeds at once, of a model that is no run"""


@dataclass(frozen=True)
class Unit:
    """One state of a model, and the suites that it is to be scored on."""

    name: str
    """``ctx77-1f2c9a7b step-00000480``"""
    group: Path
    """``<root>/<sweep>``: units of one group share code, jobs and logs"""
    spec: dict[str, Any]
    """what the worker reads"""
    suites: tuple[Resolved, ...]
    """those without a record"""
    done: tuple[Path, ...]
    """records that are there"""
    shape: Slurm
    key: str
    """the same whenever the same is asked, whatever of it is done"""

    @property
    def work(self) -> Path:
        return self.group / "evaluate"


def plan(
    targets: Sequence[str],
    suites: Sequence[Suite],
    checkpoint: str,
    site: Site,
    out: Path | None = None,
    gpus: int | None = None,
) -> list[Unit]:
    """Every state of the models that ``targets`` mean, with what it lacks. Changes nothing.

    Raises:
        UserError: no such run, model, checkpoint or data, or two suites of one name.
        SiteError: the hub cannot be reached; records cannot be written where they belong.
    """
    names = [suite.name for suite in suites]
    if twice := [name for name in names if names.count(name) > 1]:
        raise UserError(f"two suites are called {twice[0]!r}; give one of them another name:")
    root = None if out is None else out.absolute()
    known: dict[str, list[Resolved]] = {}

    def resolved(text: str) -> list[Resolved]:
        if text not in known:  # its data are looked through: once, and not for every checkpoint
            known[text] = [resolve_suite(suite, site, text) for suite in suites]
        return known[text]

    units: dict[tuple[str, str], Unit] = {}
    for target in targets:
        found = _models(target, site)
        if isinstance(found, External):
            made = [_external(found, resolved("txt"), root or site.runs.absolute(), gpus)]
        else:
            made = [
                _state(run, folder, resolved(Text.of(run.experiment().data).long), root, gpus)
                for run in found
                for folder in _chosen(run, checkpoint)
            ]
        for unit in made:
            units.setdefault((unit.spec["out"], unit.spec["about"]["checkpoint"]), unit)
    for place in dict.fromkeys(Path(unit.spec["out"]) for unit in units.values() if unit.suites):
        _check_writable(place)
    return list(units.values())


def _models(target: str, site: Site) -> list[RunFolder] | External:
    if is_model(folder := Path(target)):
        return describe(folder.absolute(), str(folder.absolute()))
    try:
        return find_runs(site.runs, target)
    except UserError as error:
        parts = target.split("/")
        if len(parts) != 2 or not all(parts) or "no such run" not in error.message or Path(target).exists():
            raise
        try:
            return describe(fetched(target, site), target)
        except SiteError as unreachable:
            raise SiteError(f"{error.message}; and as a hub id: {unreachable.message}", unreachable.hint) from None


def _chosen(run: RunFolder, which: str) -> list[Path]:
    if which != "all":
        return [choose(run, which, also="all")]
    if not (found := checkpoints.published(run.checkpoints)):
        raise UserError(f"{run.name}: has no checkpoint yet", f"longclip status {run.name}")
    return found


def _state(run: RunFolder, folder: Path, suites: list[Resolved], root: Path | None, gpus: int | None) -> Unit:
    experiment, paths = run.experiment(), paths_of(run)
    path = run.path.absolute()
    group = path.parent if root is None else root / run.sweep
    about = {
        "weights": hash_of_weights(folder),
        "checkpoint": folder.name,
        "samples": checkpoints.state_of(folder)["samples"],
        "precision": experiment.train.precision,
    }
    spec = {
        "name": f"{run.name} {folder.name}",
        "form": "checkpoint",
        "folder": str(path / "checkpoints" / folder.name),
        "out": str(group / run.name / "evaluations"),
        "model": experiment.model.model_dump(mode="json"),
        "loss": experiment.train.loss,
        "tokenizer": paths.get("model.text.tokenizer"),
        "paths": {key: where for key, where in paths.items() if key.startswith("model.")},
        "batch": experiment.evaluate.batch,
        "about": about,
    }
    return _unit(spec, group, suites, [path / "evaluations"], _shape(experiment, gpus))


def _shape(experiment: Experiment, gpus: int | None) -> Slurm:
    """One node is enough: a model that several train together fits one GPU without optimizer and gradients."""
    asked = experiment.slurm.model_copy(update={"nodes": 1})
    return asked if gpus is None else asked.model_copy(update={"gpus_per_node": gpus, "tasks_per_node": None})


def _external(model: External, suites: list[Resolved], root: Path, gpus: int | None) -> Unit:
    group = root / evaluations.MODELS
    about = {"weights": model.weights, "checkpoint": "model", "samples": None, "precision": "fp32"}
    spec = {
        "name": model.name,
        "form": model.form,
        "folder": str(model.folder),
        "out": str(group / model.name / "evaluations"),
        "model": model.spec.model_dump(mode="json"),
        "loss": model.loss,
        "tokenizer": model.tokenizer,
        "paths": {},
        "batch": BATCH,
        "about": about,
        "source": model.source,
    }
    return _unit(spec, group, suites, [], Slurm(gpus_per_node=gpus or 0))


def _unit(spec: dict[str, Any], group: Path, suites: list[Resolved], also: list[Path], shape: Slurm) -> Unit:
    done, todo = [], []
    for suite in suites:
        places = (Path(spec["out"]), *also)
        there = (evaluations.cached(place, spec["about"]["weights"], suite.hash) for place in places)
        record = next(filter(None, there), None)
        if record is None:
            todo.append(suite)
        else:
            done.append(record)
    spec = {**spec, "suites": [suite.as_record() for suite in todo]}
    spec["paths"] = {**spec["paths"], **{k: v for suite in todo for k, v in suite.named_paths().items()}}
    asked = [spec["about"]["weights"], spec["out"], *sorted(suite.hash for suite in suites)]
    key = hashlib.sha256(" ".join(asked).encode()).hexdigest()[:16]
    return Unit(spec["name"], group, spec, tuple(todo), tuple(done), shape, key)


def _check_writable(place: Path) -> None:
    there = next(path for path in (place, *place.parents) if path.exists())
    if not os.access(there, os.W_OK):
        raise SiteError(f"{there}: cannot be written: Permission denied", "--out DIR, for other people's runs")


def skipped(units: Iterable[Unit]) -> list[str]:
    """Windows of suites that a text tower does not reach: they are left out of its record, where the reason stands."""
    found = []
    for unit in units:
        reach = _reach(unit.spec)
        for suite in unit.suites:
            for name, task in suite.suite.tasks.items():
                if not isinstance(task, Retrieval) or reach is None:
                    continue
                found += [
                    f"{unit.name}: {suite.name}/{name}: no window {window}: the text tower has {reach} positions"
                    for window in task.windows
                    if isinstance(window, int) and window > reach
                ]
    return found


def _reach(spec: dict[str, Any]) -> int | None:
    text = spec["model"]["text"]
    config = text["config"]
    if config is None:
        folder = Path(spec["paths"].get("model.text.tower") or text["tower"])
        try:
            config = kinds.part(read_json(folder / "config.json"), "text")
        except (OSError, ValueError):
            return None
    return max(kinds.reach(config), int(spec["model"]["context_length"]))
