"""A site profile: what a cluster needs that no experiment should have to say.

    longclip submit experiments/demo --site jean          # slurm/sites/jean.yaml, ~/.config/longclip/sites/jean.yaml
    longclip submit experiments/demo --site ./mine.yaml   # or any file

Without ``--site`` the profile named by ``$LONGCLIP_SITE``, else one in which nothing is set.
``slurm/sites/example.yaml`` has every key with a comment.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from longclip.errors import UserError
from longclip.experiment.load import SECRET, read_as
from longclip.experiment.section import bad

SBATCH_OURS = {
    "job-name": "the run's name",
    "nodes": "the experiment's slurm.nodes",
    "ntasks": "the experiment's slurm.tasks_per_node",
    "ntasks-per-node": "the experiment's slurm.tasks_per_node",
    "time": "the experiment's slurm.time",
    "cpus-per-task": "cpus_per_task, here or in the experiment's slurm:",
    "mem": "mem_gb, here or in the experiment's slurm:",
    "gpus": "the experiment's slurm.gpus_per_node",
    "gpus-per-node": "the experiment's slurm.gpus_per_node; the site's gpus and gpu_type say how",
    "gpus-per-task": "the experiment's slurm.gpus_per_node; the site's gpus and gpu_type say how",
    "partition": "partition, here or in the experiment's slurm:",
    "account": "account",
    "qos": "qos",
    "requeue": "restart",
    "no-requeue": "restart",
    "dependency": "restart",
    "array": "longclip: every run is a job of its own",
    "signal": "longclip: it is how a run learns that its time is up",
    "chdir": "longclip: the run's folder",
    "output": "longclip: the run's folder",
    "error": "longclip: the run's folder",
    "open-mode": "longclip: logs are appended to",
    "mail-user": "mail",
    "mail-type": "mail",
    "export": "env",
}
"""sbatch options that something else decides, and what"""


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
    env: dict[str, Annotated[str, Field(coerce_numbers_to_str=True)]] = {}
    """environment of the job; it is written into the batch script, so no secrets"""
    python: str | None = None
    """the worker's Python (with ``longclip[train]``), by default this one; put into the batch script as it is, so
    that ``apptainer exec --nv IMAGE python`` is one, too"""
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
    mail: str | None = None
    """who is told, by Slurm, that a job has ended or failed"""
    srun: list[str] = []
    """further srun arguments as they are: ``[--container-image=/images/longclip.sqsh]``"""
    sbatch: dict[str, Any] = {}
    """further sbatch options, by long name: ``{constraint: a100, reservation: course}``"""

    @model_validator(mode="after")
    def _env(self) -> Site:
        for name in filter(SECRET.search, self.env):
            raise bad(f"env.{name}", "looks like a secret; export it in your shell instead, sbatch hands it on")
        return self

    @model_validator(mode="after")
    def _sbatch(self) -> Site:
        ours = {**SBATCH_OURS, **({"gres": "the experiment's slurm.gpus_per_node"} if self.gpus == "gres" else {})}
        for key, value in self.sbatch.items():
            if decides := ours.get(key.replace("_", "-")):
                raise bad(f"sbatch.{key}", f"is decided by {decides}")
            if value is False or not isinstance(value, str | int | float):
                raise bad(f"sbatch.{key}", f"is {value!r}; valid is a text, a number, or true for a bare option")
        return self

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
        return _expand(f"datasets.{name}", self.datasets[name])


def find_site(name: str | None, runs: Path | None = None) -> Site:
    """The profile called ``name`` (a file, or a name), with ``runs`` in place of its own.

    Raises:
        UserError: there is no such profile, or it says something unknown.
    """
    name = name or os.environ.get("LONGCLIP_SITE")
    site = Site() if name is None else read_as(Site, file := _file(name), name=file.stem)
    if runs is not None:
        site = site.model_copy(update={"runs": runs})
    places = {"runs": site.runs, **({"cache": site.cache} if site.cache else {})}
    return site.model_copy(update={key: _expand(key, path) for key, path in places.items()})


def _expand(key: str, path: str | Path) -> Path:
    """``$SCRATCH/runs`` and ``~/runs`` as paths of this machine; a variable that is not set is no folder's name."""
    text = os.path.expandvars(path)
    if missing := re.search(r"\$\{?\w+\}?", text):
        raise UserError(f"site profile: {key}: {path}: {missing[0]} is not set here")
    return Path(text).expanduser()


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
