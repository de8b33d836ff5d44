"""The run folder: where everything about a run lies. It is the record; there is no database beside it.

    <runs>/<sweep>/<name>-<uid>/
        identity.json          what decides the weights, and the uid
        experiment.yaml        the experiment as it was first submitted, resolved
        attempts/0001/         one try: experiment.yaml, submitted.json, started.json (the claim), resumed.json,
                               journal.jsonl, ended.json (the verdict), logs/; where it applies cancelled.json,
                               failed-<rank>.json, bad-samples-<rank>.jsonl
        checkpoints/           step-*/, latest (see train/checkpoint.py)
        evaluations/           scores of checkpoints on the test set and on suites (run/evaluations.py)
        mlflow.json            the MLflow run that stands for this run
        origin.json            whose weights it began with, where not with drawn ones (run/lineage.py)

Every file has one writer. Small files are written aside and renamed, so a reader never sees half of one.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from longclip.errors import SiteError, UserError
from longclip.experiment.identity import differences, natural
from longclip.experiment.identity import uid as uid_of
from longclip.experiment.schema import Experiment


class RunFolder:
    """One run's folder. ``path.name`` is ``<name>-<uid>``, ``path.parent.name`` the sweep."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __repr__(self) -> str:
        return f"RunFolder({str(self.path)!r})"

    @property
    def name(self) -> str:
        """``ctx77-1f2c9a7b``"""
        return self.path.name

    @property
    def label(self) -> str:
        """The name without its uid: ``ctx77``"""
        return self.path.name.rpartition("-")[0]

    @property
    def uid(self) -> str:
        return self.path.name.rpartition("-")[2]

    @property
    def sweep(self) -> str:
        return self.path.parent.name

    @property
    def attempts(self) -> Path:
        return self.path / "attempts"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def evaluations(self) -> Path:
        return self.path / "evaluations"

    def exists(self) -> bool:
        return (self.path / "identity.json").is_file()

    def create(self, experiment: Experiment, identity: dict[str, Any], axes: dict[str, Any]) -> None:
        """Makes the folder, or checks that it was made by the same experiment.

        Raises:
            UserError: it belongs to another experiment.
            SiteError: it cannot be written.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            if self.exists():
                self.check(identity)
                return
            for folder in (self.attempts, self.checkpoints, self.evaluations):
                folder.mkdir(exist_ok=True)
            write_text(self.path / "experiment.yaml", dump_experiment(experiment))
            write_json(self.path / "identity.json", {"uid": uid_of(identity), "identity": identity, "axes": axes})
        except OSError as error:
            raise SiteError(
                f"{self.path}: cannot be written: {error.strerror}", "set runs: in the site profile, or --runs DIR"
            ) from None

    def check(self, identity: dict[str, Any]) -> None:
        """Raises UserError if the folder's identity is not ``identity``."""
        theirs = self.identity()
        if theirs != identity:
            keys = ", ".join(differences(theirs, identity))
            raise UserError(
                f"{self.path}: made by another experiment (differs in: {keys})",
                "move the folder away, or use --runs DIR",
            )

    def identity(self) -> dict[str, Any]:
        return dict(read_json(self.path / "identity.json")["identity"])

    def axes(self) -> dict[str, Any]:
        return dict(read_json(self.path / "identity.json").get("axes", {}))

    @property
    def experiment_file(self) -> Path:
        """The experiment as last submitted: the newest attempt's, else the run's first."""
        return max(self.attempts.glob("*/experiment.yaml"), default=self.path / "experiment.yaml")

    def experiment(self) -> Experiment:
        """As last submitted."""
        return load_experiment(self.experiment_file)


def dump_experiment(experiment: Experiment) -> str:
    return yaml.safe_dump(experiment.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def load_experiment(file: Path) -> Experiment:
    """An experiment as a run folder holds it: already merged and resolved."""
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # the same in C, a tenth of the time
    return Experiment.model_validate(yaml.load(file.read_text(encoding="utf-8"), loader))


def runs_of(root: Path, sweep: str | None = None) -> Iterator[RunFolder]:
    """All run folders below ``root``, or those of one sweep, by name."""
    for marker in sorted(root.glob("*/*/identity.json"), key=lambda p: natural(str(p))):
        if sweep is None or marker.parent.parent.name == sweep:
            yield RunFolder(marker.parent)


def find_runs(root: Path, target: str) -> list[RunFolder]:
    """The runs that ``target`` means: a sweep, ``sweep/name``, a run's name (with or without its uid), a path to a run
    or a sweep anywhere, a unique start of a name, or the id of a job that was any attempt of a run.

    Raises:
        UserError: nothing, or more than one run, is called so.
    """
    if not target:
        raise UserError("the name of a run or sweep is empty", "longclip status")
    path = Path(target).resolve()  # a run's name and its sweep's are read from the path, which "." does not have
    sweep, _, name = target.rstrip("/").rpartition("/")
    there = list(runs_of(root, sweep or None))
    # What is under the root comes before the current folder, or --runs would not help in a folder of other runs.
    if found := list(runs_of(root, target.rstrip("/"))):
        return found
    found = [r for r in there if name in (r.name, r.label)]
    if not found and RunFolder(path).exists():
        return [RunFolder(path)]
    if not found and (beside := sorted(path.glob("*/identity.json"), key=lambda p: natural(str(p)))):
        return [RunFolder(marker.parent) for marker in beside]
    found = found or [r for r in there if name and r.name.startswith(name)]
    found = found or [r for r in runs_of(root) if target in job_ids(r)]
    if len(found) == 1:
        return found
    if found:
        names = [f"{r.sweep}/{r.name}" for r in found]
        more = f" and {len(names) - 6} more" if len(names) > 6 else ""
        raise UserError(f"{target}: more than one run is called so: {', '.join(names[:6])}{more}", "name one of them")
    sweeps = sorted({r.sweep for r in runs_of(root)})
    known = f"sweeps here: {', '.join(sweeps)}" if sweeps else "there are none yet"
    hint = "longclip status; if they are elsewhere, --site NAME or --runs DIR as at submit"
    raise UserError(f"{target}: no such run or sweep under {root}; {known}", hint)


def job_ids(run: RunFolder) -> list[str]:
    """Job ids of all attempts, oldest first; what was torn by a kill is left out."""
    found = []
    # A requeued job's later attempts were never submitted: only their claim names the job.
    for file in sorted(run.attempts.glob("*/submitted.json")) + sorted(run.attempts.glob("*/started.json")):
        with contextlib.suppress(ValueError):
            found.append(read_json(file).get("job"))
    return list(dict.fromkeys(str(job) for job in found if job))


def write_json(path: Path, value: Any) -> None:
    """Writes aside and renames: readers see the old file or the new one, never half."""
    write_text(path, json.dumps(value, indent=1, allow_nan=True) + "\n")


def write_text(path: Path, text: str) -> None:
    """Writes aside and renames, as :func:`write_json`."""
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with aside.open("w", encoding="utf-8") as f:
        f.write(text)
        f.flush()
        os.fsync(f.fileno())
    os.replace(aside, path)


def read_json(path: Path) -> dict[str, Any]:
    with path.open(encoding="utf-8") as f:
        value: dict[str, Any] = json.load(f)
    return value
