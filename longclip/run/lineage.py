"""Where a run's first weights come from, where that is not chance: ``model.init.from``.

A run is referred to by name, and stands in the identity as the hash of what decides *its* weights: a child has its id
before its parent is trained, and another parent makes another child. A folder is pinned by the hash of its weights.
What was read in the end, and from whom that came, is written into the run's folder once (``origin.json``).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from longclip.errors import LongclipError, UserError
from longclip.run.attempts import FINISHED, attempts_of
from longclip.run.checkpoints import MANIFEST, WEIGHTS, last, published, state_of
from longclip.run.folder import RunFolder, find_runs, read_json
from longclip.run.verdicts import verdict_of

KEY = "model.init.from"
ORIGIN = "origin.json"
_RUN, _BEST = "run:", "@best"
_FILE = f"{WEIGHTS}.safetensors"


def run_name(reference: str) -> str | None:
    """``run:NAME`` or ``run:NAME@best`` -> NAME; None for a path or a hub id."""
    return without_best(reference).removeprefix(_RUN) if reference.startswith(_RUN) else None


def without_best(reference: str) -> str:
    return reference.removesuffix(_BEST)


def wants_best(reference: str) -> bool:
    return reference.endswith(_BEST)


def find(name: str, runs: Path, beside: Sequence[tuple[RunFolder, Mapping[str, Any]]]) -> tuple[RunFolder, Any]:
    """The run called ``name``, and its identity. Those that are submitted together come first, made or not.

    Raises UserError where there is none, or more than one.
    """
    for run, identity in beside:
        if name in (run.label, run.name, f"{run.sweep}/{run.label}", f"{run.sweep}/{run.name}"):
            return run, identity
    found = find_runs(runs, name)
    if len(found) != 1:
        raise UserError(f"run:{name}: {len(found)} runs are called so", "name one of them: run:SWEEP/NAME")
    return found[0], found[0].identity()


def pin_of_run(identity: Mapping[str, Any], reference: str) -> str:
    """Hash of what decides the weights that ``reference`` means of a run with this identity."""
    which = "best" if wants_best(reference) else "last"
    text = json.dumps([which, dict(identity)], sort_keys=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def hash_of_weights(folder: Path) -> str:
    """sha256 of a folder's weights, from its manifest where it has one. Raises UserError where there are none."""
    if not (folder / _FILE).is_file():
        raise UserError(f"{folder}: no {_FILE} here", "give a run's folder, or one of its checkpoints")
    try:
        return str(read_json(folder / MANIFEST)["files"][_FILE]["sha256"])
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        with (folder / _FILE).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()


def has_begun(run: RunFolder) -> bool:
    """Whether the run has weights of its own, and needs its parent's no more."""
    return bool(published(run.checkpoints))


def is_finished(run: RunFolder) -> bool:
    attempts = attempts_of(run)
    verdict = verdict_of(attempts[-1]) if attempts else None
    return verdict is not None and verdict.kind == FINISHED


def origin(folder: Path, reference: str) -> tuple[Path, dict[str, Any]]:
    """The folder whose weights ``reference`` means, and the record of it; ``folder`` is where submit found it.

    Raises:
        LongclipError: it is a run that has not finished, or whose checkpoint is gone (pruned).
        UserError: there are no weights.
    """
    run = RunFolder(folder)
    record: dict[str, Any] = {"from": reference}
    if run.exists():
        if not is_finished(run):
            raise LongclipError(f"{KEY}: {run.name} has not finished", f"longclip status {run.name}")
        if not (there := published(run.checkpoints)):
            raise LongclipError(f"{KEY}: {run.name} has no checkpoint left")
        if wants_best(reference):
            folder = run.checkpoints / state_of(there[-1])["best"]["checkpoint"]
        else:
            try:
                folder = last(run.checkpoints)
            except UserError as error:
                raise UserError(f"{KEY}: {error.message}", f"run:{run.name}{_BEST} is the best by validation") from None
        record |= {"run": run.name, "sweep": run.sweep, "checkpoint": folder.name}
        record |= {"samples": state_of(folder)["samples"], "context_length": run.experiment().model.context_length}
        if (run.path / ORIGIN).is_file():
            record["origin"] = read_json(run.path / ORIGIN)
    return folder, {**record, "sha256": hash_of_weights(folder)}


def line(record: Mapping[str, Any]) -> str:
    """``ctx77-1f2c9a7b step-00000060 (1,440 samples, window 77)``, and what that came from in turn."""
    if "run" not in record:
        return str(record["from"])
    said = f"{record['run']} {record['checkpoint']} ({record['samples']:,} samples, window {record['context_length']})"
    return f"{said} <- {line(record['origin'])}" if "origin" in record else said
