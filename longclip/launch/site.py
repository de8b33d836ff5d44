"""A site profile: what a cluster needs that no experiment should have to say.

    longclip submit experiments/demo --site jean          # slurm/sites/jean.yaml, ~/.config/longclip/sites/jean.yaml
    longclip submit experiments/demo --site ./mine.yaml   # or any file

Without ``--site`` the profile named by ``$LONGCLIP_SITE``, else one in which nothing is set.
``slurm/sites/example.yaml`` has every key with a comment.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from longclip.errors import UserError


class Site(BaseModel):
    """What the submitting side knows of a cluster."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = "default"
    account: str | None = None
    partition: str | None = None
    qos: str | None = None
    gpus: Literal["gpus-per-node", "gres", "gpus-per-task"] = "gpus-per-node"
    """how this cluster wants GPUs to be asked for"""
    gpu_type: str | None = None
    """``h100`` in ``--gres=gpu:h100:4``"""
    cpus_per_task: Annotated[int, Field(ge=1)] | None = None
    mem_gb: Annotated[float, Field(gt=0)] | None = None
    """memory of a node's share, where the cluster's default is too small"""
    setup: list[str] = []
    """lines of the batch script before the job: module load, conda activate"""
    env: dict[str, str] = {}
    """environment of the job; it is written into the batch script, so no secrets"""
    python: str | None = None
    """the worker's Python (with ``longclip[train]``), by default this one"""
    runs: Path = Path("runs")
    cache: Path | None = None
    """where hub models are kept, readable from compute nodes; by default Hugging Face's own place"""
    datasets: dict[str, str] = {}
    """name -> folder of indexed shards"""
    tracking: str | None = None
    """MLflow URI; by default an SQLite file beside the runs"""
    restart: Literal["requeue", "chain", "submit"] = "requeue"
    """how a run that must go on gets its next time slot: its batch script requeues the job, jobs queued ahead
    (afterany) take over, or somebody types ``longclip submit`` again"""
    links: Annotated[int, Field(ge=1)] = 4
    """jobs that are queued ahead of time where ``restart`` is chain"""
    grace_s: Annotated[int, Field(ge=0)] | None = None
    """seconds between the signal that announces a preemption and the kill"""
    max_jobs: Annotated[int, Field(ge=1)] | None = None
    """most jobs that one user may have in the queue"""
    sbatch: dict[str, Any] = {}
    """further sbatch options, by long name: ``{constraint: a100, reservation: course}``"""

    @property
    def tracking_uri(self) -> str:
        return self.tracking or f"sqlite:///{self.runs.resolve()}/mlflow.db"

    def dataset(self, name: str) -> Path:
        """The folder that ``name`` means here: itself if it is a path.

        Raises:
            UserError: this site does not know the name.
        """
        if Path(name).is_absolute():
            return Path(name)
        if name not in self.datasets:
            known = f"known: {', '.join(sorted(self.datasets))}" if self.datasets else "it names none"
            raise UserError(
                f"dataset {name!r} is not in site profile {self.name!r} ({known})",
                "add it under datasets:, or give a path that begins with ./ or /",
            )
        return Path(os.path.expandvars(self.datasets[name])).expanduser()


def find_site(name: str | None, runs: Path | None = None) -> Site:
    """The profile called ``name`` (a file, or a name), with ``runs`` in place of its own.

    Raises:
        UserError: there is no such profile, or it says something unknown.
    """
    name = name or os.environ.get("LONGCLIP_SITE")
    site = Site() if name is None else _read(_file(name))
    if runs is not None:
        site = site.model_copy(update={"runs": runs})
    places = {"runs": site.runs, **({"cache": site.cache} if site.cache else {})}
    return site.model_copy(update={k: Path(os.path.expandvars(p)).expanduser() for k, p in places.items()})


def _file(name: str) -> Path:
    folders = (Path("slurm/sites"), Path("~/.config/longclip/sites").expanduser())
    candidates = [Path(name)] if name.endswith(".yaml") else [f / f"{name}.yaml" for f in folders]
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    known = sorted(p.stem for f in folders if f.is_dir() for p in f.glob("*.yaml"))
    raise UserError(
        f"no site profile {name!r}; looked for {', '.join(map(str, candidates))}",
        f"known here: {', '.join(known)}" if known else "slurm/sites/example.yaml shows what one looks like",
    )


def _read(file: Path) -> Site:
    try:
        values = yaml.safe_load(file.read_text(encoding="utf-8")) or {}
        return Site.model_validate({"name": file.stem, **values})
    except yaml.YAMLError as error:
        raise UserError(f"{file}: not valid YAML: {str(error).splitlines()[0]}") from None
    except ValidationError as error:
        what = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg'].lower()}" for e in error.errors())
        raise UserError(f"{file}: {what}", f"valid keys: {', '.join(Site.model_fields)}") from None
    except (OSError, TypeError) as error:
        raise UserError(f"{file}: cannot be read: {error}") from None
