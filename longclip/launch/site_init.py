"""Writes a site profile from what Slurm says of itself; asks only for what cannot be seen."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from longclip.errors import SiteError, UserError
from longclip.launch.cluster import Cluster, Partition, read_cluster
from longclip.launch.disk import disk_of
from longclip.launch.site import find_site

SITES = Path("~/.config/longclip/sites")

Ask = Callable[..., Any]
"""``ask(question, default=guess)``, as ``typer.prompt``"""


class _Profile:
    """The lines of a profile: a key, its value, and where that comes from."""

    def __init__(self, ask: Ask | None) -> None:
        self.ask = ask
        self.lines: list[str] = []

    def say(self, key: str, value: Any, why: str) -> None:
        self.lines.append(f"{f'{key}: {json.dumps(value)}':<32} # {why}")

    def choose(self, key: str, question: str, options: Sequence[str], guess: str, why: str) -> str:
        """One of ``options``: the only one, the user's choice, or, where nobody can be asked, ``guess``."""
        if len(options) == 1:
            self.say(key, options[0], why)
            return options[0]
        chosen = guess
        if self.ask is not None:
            question = f"{question} ({', '.join(options)})"
            while (chosen := str(self.ask(question, default=guess))) not in options:
                pass
        self.say(key, chosen, ("guessed: " if self.ask is None else "") + f"one of {', '.join(options)}")
        return chosen


def write_profile(name: str | None, dest: Path | None, ask: Ask | None) -> tuple[Path, str]:
    """Writes the profile ``name`` (by default the cluster's name) to ``dest``, and returns the file and what
    ``--site`` takes. Without ``ask`` the best guess is taken, and marked in the file.

    Raises:
        UserError: the file exists, and nobody said that it may be replaced; or the name cannot be one.
        SiteError: there is no Slurm here, it does not answer, or the file cannot be written.
    """
    cluster = read_cluster()
    name = name or cluster.config.get("ClusterName", "mine")
    file = dest or SITES.expanduser() / f"{name}.yaml"
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name) or file.suffix != ".yaml":
        raise UserError(f"{name}, {file}: a profile has a plain name, and its file ends in .yaml")
    if file.exists() and (ask is None or ask(f"{file} exists. Replace it? (y/n)", default="n") != "y"):
        raise UserError(f"{file}: exists, and was left as it is", "--out FILE, or another name")
    text = _text(name, cluster, ask)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
    except OSError as error:
        raise SiteError(f"{file}: cannot be written: {error.strerror}") from None
    find_site(str(file))
    return file, name if dest is None else str(file)


def _text(name: str, cluster: Cluster, ask: Ask | None) -> str:
    profile = _Profile(ask)
    version = cluster.config.get("SLURM_VERSION", "?")
    profile.say("name", name, f"cluster {cluster.config.get('ClusterName', '?')}, Slurm {version}")
    account = _account(profile, cluster)
    partition = _partition(profile, cluster)
    valid = f"this user's: {', '.join(sorted(cluster.qos))}" if cluster.qos else "sacctmgr names none"
    profile.say("qos", None, f"{valid}; {cluster.default_qos or 'no'} default")
    _gpus(profile, partition, cluster)
    _memory(profile, partition)
    _restart(profile, partition, cluster)
    limit = cluster.max_submit(account, None)
    profile.say("max_jobs", limit, "sacctmgr: MaxSubmitJobs" if limit else "sacctmgr names no limit")
    _worker(profile)
    _runs(profile)
    profile.say("datasets", {}, "name: folder of indexed shards, as experiments call them")
    head = f"# Site profile {name}, by `longclip site init`. All keys: slurm/sites/example.yaml\n"
    return head + "\n".join(profile.lines) + "\n"


def _account(profile: _Profile, cluster: Cluster) -> str | None:
    accounts = sorted(cluster.accounts or {})
    if not accounts:
        silent = "sacctmgr does not answer" if cluster.accounts is None else "sacctmgr names none for this user"
        profile.say("account", None, silent)
        return None
    guess = cluster.default_account or accounts[0]
    return profile.choose("account", "Account that jobs are charged to", accounts, guess, "sacctmgr: your only one")


def _partition(profile: _Profile, cluster: Cluster) -> Partition:
    up = [p for p in cluster.partitions.values() if p.up]
    candidates = [p for p in up if p.gpus] or up
    if not candidates:
        raise SiteError("no partition of this cluster is up", "sinfo")
    guess = next((p.name for p in candidates if p.default), candidates[0].name)
    names = [p.name for p in candidates]
    only = "sinfo: the only one that is up" + (" and has GPUs" if candidates[0].gpus else "")
    name = profile.choose("partition", "Partition", names, guess, only)
    chosen = cluster.partitions[name]
    limits = f"at most {chosen.max_time} a job, {chosen.default_time} where it names no time"
    profile.lines[-1] += f"; {limits}"
    return chosen


def _gpus(profile: _Profile, partition: Partition, cluster: Cluster) -> None:
    plugin = cluster.config.get("SelectType", "")
    tres = plugin.endswith("cons_tres")
    profile.say("gpus", "gpus-per-node" if tres else "gres", f"SelectType={plugin}")
    kinds = sorted(kind for kind in partition.gpus if kind)
    if len(kinds) > 1:
        profile.choose("gpu_type", "Type of GPU", kinds, max(kinds, key=lambda k: partition.gpus[k]), "")
    else:
        profile.say("gpu_type", None, f"sinfo: {kinds[0]} only" if kinds else "sinfo names no types")
    gpus = max(partition.gpus.values(), default=0)
    share = partition.cpus // gpus if gpus else 0
    why = f"sinfo: {partition.cpus} CPUs a node / {gpus} GPUs" if gpus else "no GPUs: each experiment says"
    profile.say("cpus_per_task", share or None, why)


def _memory(profile: _Profile, partition: Partition) -> None:
    key, _, value = partition.memory_default.partition("=")
    if key == "DefMemPerNode" and int(value) < 0.9 * partition.memory_mb:
        why = f"guessed: all of a node's {partition.memory_mb} MB; without it a job gets {partition.memory_default}"
        profile.say("mem_gb", partition.memory_mb // 1024 or 1, why)
    else:
        profile.say("mem_gb", None, partition.memory_default or "a job gets the memory of its nodes")


def _restart(profile: _Profile, partition: Partition, cluster: Cluster) -> None:
    mode, grace = cluster.preemption(partition.name, None)
    facts = f"JobRequeue={cluster.config.get('JobRequeue', '?')}, preemption {mode}"
    profile.say("restart", "chain" if mode == "CANCEL" else "requeue", f"{facts}; requeue, chain or submit")
    profile.say("grace_s", None if mode == "OFF" else grace, "GraceTime" if mode != "OFF" else "no preemption here")


def _worker(profile: _Profile) -> None:
    profile.say("setup", [], "lines before the job: module load, conda activate")
    if find_spec("torch") is not None:
        profile.say("python", None, f"this one has torch: {sys.executable}")
        return
    answer = "" if profile.ask is None else str(profile.ask("Python of the worker, with longclip[train]", default=""))
    guessed = "" if answer else "guessed: "
    profile.say("python", answer or None, f"{guessed}this one has no torch: the worker needs longclip[train]")


def _runs(profile: _Profile) -> None:
    scratch = next(
        (os.environ[v] for v in ("SCRATCH", "WORK", "WORKDIR") if os.environ.get(v) and Path(os.environ[v]).is_dir()),
        "",
    )
    guess = Path(scratch, "longclip", "runs") if scratch else Path("runs").absolute()
    answer = guess
    if profile.ask is not None:
        answer = Path(str(profile.ask("Folder of the runs, shared with compute nodes", default=str(guess))))
        answer = answer.expanduser().absolute()
    disk = disk_of(answer)
    seen = "; looks local to this node" if disk.local else ""
    free = f"{disk.kind}, {disk.free_gb:,.0f} GB free{seen}"
    profile.say("runs", str(answer), ("guessed: " if profile.ask is None else "") + free)
