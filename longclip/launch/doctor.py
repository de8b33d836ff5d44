"""Can this machine submit? One check a line: what is there, and where something is amiss, what to do about it.

Nothing is queued and nothing is left behind.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from longclip import __version__
from longclip.data.shards import open_dataset
from longclip.errors import LongclipError, SiteError
from longclip.experiment.schema import Experiment
from longclip.launch import job
from longclip.launch.clients import ask
from longclip.launch.cluster import Cluster, Partition, read_cluster
from longclip.launch.disk import disk_of
from longclip.launch.plan import Plan
from longclip.launch.resolve import Resolved
from longclip.launch.site import Site
from longclip.launch.snapshot import PACKAGE
from longclip.run.folder import RunFolder

PYTHON_TIMEOUT = 30
"""seconds that the worker's Python may take to say what it has installed"""
TRACKING_TIMEOUT = 3
"""seconds that an MLflow server may take to answer"""
FREE_GB, FREE_INODES = 20, 10_000
"""below these a runs folder is called full: three checkpoints of the paper's model are 16 GB"""

_WORKER = """
import json, sys
from importlib.util import find_spec
import longclip
missing = [name for name in ("submitit", "torch", "deepspeed", "transformers") if find_spec(name) is None]
print("\\n" + json.dumps({"longclip": longclip.__version__, "python": sys.version.split()[0], "missing": missing}))
"""


@dataclass(frozen=True)
class Check:
    """One thing that was looked at."""

    level: Literal["ok", "warn", "fail"]
    what: str
    said: str
    next: str = ""
    """what to do about it"""

    def __str__(self) -> str:
        return f"{self.level:4}  {self.what}: {self.said}" + (f"\n      next: {self.next}" if self.next else "")

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def examine(site: Site) -> Iterator[Check]:
    """All checks of this machine with this site profile, in the order in which a submit would trip over them."""
    yield from _slurm(site)
    yield _folder("runs", site.runs)
    yield from _datasets(site)
    yield _python(site)
    yield _cache(site)
    yield _tracking(site.tracking_uri)


# ---- Slurm -------------------------------------------------------------------------------------------------------


def _slurm(site: Site) -> Iterator[Check]:
    missing = [name for name in ("sbatch", "srun", "squeue", "scontrol", "sinfo") if shutil.which(name) is None]
    if missing:
        yield Check(
            "fail",
            "Slurm",
            f"{', '.join(missing)} not on this machine",
            "go to a login node; submit --on local needs no Slurm",
        )
        return
    try:
        cluster = read_cluster()
    except SiteError as error:
        yield Check("fail", "Slurm", error.message, "slurmctld may be down: ask the people who run the cluster")
        return
    version, name = cluster.config.get("SLURM_VERSION", "?"), cluster.config.get("ClusterName", "?")
    yield Check("ok", "Slurm", f"{version}, cluster {name}, slurmctld answers")
    yield _accounting()
    chosen = next((p.name for p in cluster.partitions.values() if p.default), None)
    partition = cluster.partitions.get(site.partition or chosen or "")
    if partition is None:
        known = ", ".join(sorted(cluster.partitions))
        said = "no default partition" if site.partition is None else f"no partition {site.partition!r}"
        yield Check("fail", "partition", f"{said} on this cluster", f"partition: one of {known}")
        return
    yield _partition(partition)
    yield _gpus(partition, site, cluster)
    yield _test_job(partition, site)
    yield _restart(partition, site, cluster)
    yield _max_jobs(site, cluster)


def _accounting() -> Check:
    try:
        ask("sacct", "--allocations", "--noheader", "--starttime=now-1hour", "--format=JobID")
    except SiteError as error:
        return Check("warn", "accounting", error.message, "nothing: status works from run records and squeue")
    return Check("ok", "accounting", "sacct answers")


def _partition(partition: Partition) -> Check:
    limits = f"time limit {partition.max_time}, {partition.default_time} where a job names none"
    if not partition.up:
        return Check("fail", "partition", f"{partition.name} is not up: jobs would wait", "sinfo shows which are")
    return Check("ok", "partition", f"{partition.name} is up, {partition.nodes} nodes, {limits}")


def _gpus(partition: Partition, site: Site, cluster: Cluster) -> Check:
    if not partition.gpus:
        return Check("warn", "GPUs", f"Slurm knows of none in {partition.name}", "runs there train on CPUs")
    have = ", ".join(f"{n} x {kind or 'GPU'}" for kind, n in partition.gpus.items())
    if site.gpu_type is not None and site.gpu_type not in partition.gpus:
        return Check("fail", "GPUs", f"no {site.gpu_type} in {partition.name} ({have} a node)", "correct gpu_type")
    plugin = cluster.config.get("SelectType", "")
    if site.gpus != "gres" and not plugin.endswith("cons_tres"):
        return Check("fail", "GPUs", f"{plugin} knows no --{site.gpus}", "gpus: gres")
    return Check("ok", "GPUs", f"{have} a node")


def _test_job(partition: Partition, site: Site) -> Check:
    """A job of one task (and one GPU, if there are any), as submit would write it, put to ``sbatch --test-only``."""
    try:
        words = job.test_only(job.batch_script(_trial(site, bool(partition.gpus)), site))
    except SiteError as error:
        return Check("fail", "a job", error.message, "correct account, qos, partition or sbatch: in the site profile")
    return Check("ok", "a job", words)


def _trial(site: Site, gpu: bool) -> Plan:
    text = {"config": {"model_type": "modernbert"}, "tokenizer": "none"}
    model = {"context_length": 77, "image": {"config": {"model_type": "vit"}}, "text": text}
    asked = Experiment.model_validate(
        {
            "name": "doctor",
            "model": model,
            "data": {"train": "none", "val": "none"},
            "train": {"samples": 2, "global_batch": 2, "lr": 1.0},
            "slurm": {"time": "00:10:00", "gpus_per_node": int(gpu)},
        }
    )
    run = RunFolder(site.runs / "doctor" / "doctor-00000000")
    return Plan(asked, {}, Resolved(), {}, run, "new", "")


def _restart(partition: Partition, site: Site, cluster: Cluster) -> Check:
    mode, grace = cluster.preemption(partition.name, site.qos)
    said = f"{site.restart}; preemption {mode}" + (f" after {grace} s" if mode != "OFF" else "")
    if site.restart == "requeue":
        if mode == "CANCEL":
            return Check("warn", "restart", f"{said}: a cancelled job is not requeued", "restart: chain")
        script = job.batch_script(_trial(site, bool(partition.gpus)), site)
        # JobRequeue=0 is a default only: a job submitted with --requeue may be requeued all the same (sbatch(1)).
        if cluster.config.get("JobRequeue") == "0" and "#SBATCH --requeue" not in script.splitlines():
            return Check("warn", "restart", "requeue, but JobRequeue=0 here", "restart: chain")
    if mode != "OFF" and site.grace_s is not None and site.grace_s > grace:
        return Check("warn", "restart", f"{said}, but the site profile says {site.grace_s} s", f"grace_s: {grace}")
    return Check("ok", "restart", said)


def _max_jobs(site: Site, cluster: Cluster) -> Check:
    limit = cluster.max_submit(site.account, site.qos)
    if limit is None:
        return Check(
            "ok", "jobs", "no limit in accounting" + (f"; {site.max_jobs} by the profile" * bool(site.max_jobs))
        )
    if site.max_jobs is None or site.max_jobs > limit:
        return Check("warn", "jobs", f"at most {limit} at a time by accounting", f"max_jobs: {limit}")
    return Check("ok", "jobs", f"at most {site.max_jobs} at a time; {limit} by accounting")


# ---- folders -----------------------------------------------------------------------------------------------------


def _folder(what: str, path: Path) -> Check:
    """A folder (or its nearest existing parent) can be written, has room, and is one that other nodes may see."""
    path = path.absolute()
    try:
        disk = disk_of(path)
        tempfile.TemporaryFile(dir=disk.folder).close()
    except OSError as error:
        return Check("fail", what, f"{path}: cannot be written: {error.strerror}", f"{what}: another folder")
    said = f"{path}: {disk.free_gb:,.0f} GB free"
    if disk.free_gb < FREE_GB:
        return Check("warn", what, said, "longclip prune, or another folder")
    if disk.free_inodes is not None and disk.free_inodes < FREE_INODES:
        return Check("warn", what, f"{said}, but room for {disk.free_inodes:,} files only", "another folder")
    if disk.local:
        return Check("warn", what, f"{said}; looks local to this node ({disk.kind})", "compute nodes must see it")
    return Check("ok", what, f"{said} ({disk.kind})")


def _datasets(site: Site) -> Iterator[Check]:
    for name in sorted(site.datasets):
        try:
            dataset = open_dataset(site.dataset(name))
            yield Check("ok", f"dataset {name}", f"{len(dataset):,} samples in {len(dataset.sizes)} shards")
        except LongclipError as error:
            yield Check("fail", f"dataset {name}", error.message, error.hint or "")


def _cache(site: Site) -> Check:
    if site.cache is not None:
        return _folder("cache", site.cache)
    home = os.environ.get("HF_HOME", "~/.cache/huggingface")
    return Check("ok", "cache", f"Hugging Face's own ({home}); compute nodes must see it")


# ---- the worker --------------------------------------------------------------------------------------------------


def _python(site: Site) -> Check:
    """The worker's Python, after the profile's setup lines, has longclip[train] of this version."""
    if any(word.startswith("--container") for word in site.srun):
        return Check("warn", "worker", "its Python lives in srun's container, which only a job can try")
    python = site.python or shlex.quote(sys.executable)
    # As in a job, where longclip itself comes from the snapshot of what is here.
    lines = job.setup_lines(site, site.cpus_per_task, PACKAGE.parent)
    script = "\n".join([*lines, f"{python} -c {shlex.quote(_WORKER)}"])
    # A container or a module may need what only compute nodes have.
    level: Literal["warn", "fail"] = "warn" if site.setup or " " in python else "fail"
    try:
        done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, timeout=PYTHON_TIMEOUT)
    except subprocess.TimeoutExpired:
        return Check(level, "worker", f"{python}: no answer within {PYTHON_TIMEOUT} s", "try it on a compute node")
    if done.returncode != 0:
        words = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        return Check(level, "worker", f"{python}: {words[-1]}", "install longclip[train] there, or correct python:")
    try:
        found = json.loads(done.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        return Check(level, "worker", f"{python}: ran, but is no Python", "correct python: in the site profile")
    if found["missing"]:
        return Check("fail", "worker", f"{python} has no {', '.join(found['missing'])}", "pip install longclip[train]")
    if found["longclip"] != __version__:
        said = f"{python} has longclip {found['longclip']}, this is {__version__}"
        return Check("fail", "worker", said, f"pip install longclip[train]=={__version__}")
    return Check("ok", "worker", f"{python}: Python {found['python']}, longclip[train] {found['longclip']}")


# ---- MLflow ------------------------------------------------------------------------------------------------------


def _tracking(uri: str) -> Check:
    uri = re.sub(r"//[^/@]*@", "//", uri)  # a password is not shown, and /health needs none
    if uri.startswith("sqlite:///"):
        checked = _folder("MLflow", Path(uri.removeprefix("sqlite:///")).parent)
        # Only `sync` writes there, from this machine.
        return Check("ok", "MLflow", uri) if checked.level != "fail" else checked
    if not uri.startswith(("http://", "https://")):
        return Check("warn", "MLflow", f"{uri}: neither sqlite:/// nor http(s)://, not tried")
    try:
        with urllib.request.urlopen(f"{uri.rstrip('/')}/health", timeout=TRACKING_TIMEOUT):
            return Check("ok", "MLflow", f"{uri} answers")
    except (OSError, urllib.error.URLError, ValueError) as error:
        said = getattr(error, "reason", None) or error
        return Check("warn", "MLflow", f"{uri}: {said}", "training goes on without it; longclip sync catches up")
