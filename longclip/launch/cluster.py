"""What Slurm says of itself: partitions, what their nodes have, preemption, and what this user may ask for.

Read by ``doctor`` and ``site init``; it takes a handful of quick queries and changes nothing.
"""

from __future__ import annotations

import getpass
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from longclip.errors import SiteError
from longclip.launch.clients import ask


@dataclass(frozen=True)
class Partition:
    """One partition, by ``scontrol show partition`` and ``sinfo``."""

    name: str
    default: bool
    up: bool
    max_time: str
    """longest time limit of a job, in Slurm's form, or UNLIMITED"""
    default_time: str
    """time limit of a job that names none, or NONE"""
    preempt_mode: str
    """OFF, REQUEUE, CANCEL or SUSPEND: what happens to a job that gives way"""
    grace_s: int
    """seconds between the signal and the kill"""
    memory_default: str
    """``DefMemPerCPU=4000`` and its kin, empty where a job gets the memory of its nodes"""
    nodes: int = 0
    cpus: int = 0
    """of its smallest node"""
    memory_mb: int = 0
    """of its smallest node"""
    gpus: Mapping[str, int] = field(default_factory=dict)
    """type (empty where Slurm knows none) -> GPUs of a node"""


@dataclass(frozen=True)
class Limits:
    """What the accounting database says of an association or a QOS; None: no limit there."""

    max_submit: int | None = None
    preempt_mode: str = "cluster"
    grace_s: int = 0


@dataclass(frozen=True)
class Cluster:
    """A cluster as this user sees it."""

    config: Mapping[str, str]
    """``scontrol show config``"""
    partitions: Mapping[str, Partition]
    accounts: Mapping[str, Limits] | None
    """of this user; None where sacctmgr does not answer"""
    default_account: str | None
    qos: Mapping[str, Limits]
    default_qos: str | None

    def preemption(self, partition: str | None, qos: str | None) -> tuple[str, int]:
        """What happens to a job of this partition and QOS when it must give way, and the grace it has in seconds."""
        kind = self.config.get("PreemptType", "")
        mode, grace = "OFF", 0
        if kind.endswith("partition_prio") and (found := self.partitions.get(partition or "")):
            mode, grace = found.preempt_mode, found.grace_s
        elif kind.endswith("qos"):
            limits = self.qos.get(qos or self.default_qos or "", Limits())
            mode, grace = limits.preempt_mode, limits.grace_s
            if mode.lower() == "cluster":
                mode = self.config.get("PreemptMode", "OFF")
        return _mode(mode), grace

    def max_submit(self, account: str | None, qos: str | None) -> int | None:
        """The most jobs that this user may have queued and running, None where nothing is said."""
        said = [
            (self.accounts or {}).get(account or self.default_account or "", Limits()).max_submit,
            self.qos.get(qos or self.default_qos or "", Limits()).max_submit,
        ]
        return min((n for n in said if n is not None), default=None)


def read_cluster() -> Cluster:
    """Asks scontrol, sinfo and sacctmgr.

    Raises:
        SiteError: there is no Slurm here, or slurmctld does not answer.
    """
    config = _pairs_by_line(ask("scontrol", "show", "config"))
    partitions = {}
    nodes = ask("sinfo", "--noheader", "--exact", "--format=%R|%G|%c|%m|%D")
    for line in ask("scontrol", "--oneliner", "show", "partition").splitlines():
        facts = dict(word.partition("=")[::2] for word in line.split())
        if name := facts.get("PartitionName"):
            partitions[name] = _partition(name, facts, config, nodes)
    return Cluster(config, partitions, *_entitlements(config.get("ClusterName", "")))


def _pairs_by_line(text: str) -> dict[str, str]:
    lines = (line.partition("=") for line in text.splitlines())
    return {key.strip(): value.strip() for key, equals, value in lines if equals}


def _partition(name: str, facts: dict[str, str], config: dict[str, str], nodes: str) -> Partition:
    rows = [row.split("|") for row in nodes.splitlines()]
    mine = [row for row in rows if len(row) == 5 and row[0] == name]
    gpus: dict[str, int] = {}
    for row in mine:
        for kind, number in gpus_of(row[1]).items():
            gpus[kind] = min(number, gpus.get(kind, number))
    limits = [(key, said) for key in ("DefMemPerNode", "DefMemPerCPU") if (said := _said(key, facts, config))]
    per_gpu = re.search(r"DefMemPerGPU=\d+", facts.get("JobDefaults", "") + config.get("JobDefaults", ""))
    return Partition(
        name=name,
        default=facts.get("Default") == "YES",
        up=facts.get("State") == "UP",
        max_time=facts.get("MaxTime", "UNLIMITED"),
        default_time=facts.get("DefaultTime", "NONE"),
        preempt_mode=_mode(facts.get("PreemptMode", "OFF")),
        grace_s=int(facts.get("GraceTime", "0")),
        memory_default=per_gpu[0] if per_gpu else "=".join(limits[0]) if limits else "",
        nodes=sum(int(row[4]) for row in mine),
        cpus=min((int(row[2].rstrip("+")) for row in mine), default=0),
        memory_mb=min((int(row[3].rstrip("+")) for row in mine), default=0),
        gpus=gpus,
    )


def _said(key: str, facts: dict[str, str], config: dict[str, str]) -> str:
    """A memory default of the partition, else of the cluster; empty where neither sets one."""
    values = [facts.get(key, ""), config.get(key, "")]
    return next((v for v in values if v.isdigit() and v != "0"), "")


def gpus_of(gres: str) -> dict[str, int]:
    """Type -> number in a node's generic resources: ``gpu:h100:4(S:0-1),tmp:1`` -> ``{"h100": 4}``."""
    return {kind or "": int(number) for kind, number in re.findall(r"\bgpu(?::([^:,()]+))?:(\d+)", gres)}


def _mode(text: str) -> str:
    """Slurm may say ``GANG,SUSPEND``: GANG is about time slices."""
    return next((word for word in text.upper().split(",") if word != "GANG"), "OFF")


def _entitlements(cluster: str) -> tuple[dict[str, Limits] | None, str | None, dict[str, Limits], str | None]:
    """Accounts, default account, QOS and default QOS of this user."""
    user = getpass.getuser()
    try:
        columns = "format=Account,MaxSubmitJobs,QOS,DefaultQOS"
        rows = _table("show", "assoc", f"user={user}", f"cluster={cluster}", columns)
        chosen = _table("show", "user", user, "format=DefaultAccount")
        known = _table("show", "qos", "format=Name,MaxSubmitJobsPU,PreemptMode,GraceTime")
    except SiteError:
        return None, None, {}, None
    allowed = {name for row in rows for name in row[2].split(",") if name}
    qos = {row[0]: Limits(_number(row[1]), row[2] or "cluster", _seconds(row[3])) for row in known if row[0] in allowed}
    accounts = {row[0]: Limits(_number(row[1])) for row in rows}
    default = chosen[0][0] if chosen and chosen[0][0] in accounts else None
    # Where no default is set, the only QOS of a user is the one that jobs get.
    default_qos = next((row[3] for row in rows if row[3]), next(iter(qos)) if len(qos) == 1 else None)
    return accounts, default, qos, default_qos


def _table(*words: str) -> list[list[str]]:
    return [line.split("|") for line in ask("sacctmgr", "--noheader", "--parsable2", *words).splitlines()]


def _number(text: str) -> int | None:
    return int(text) if text.isdigit() else None


def _seconds(text: str) -> int:
    """``1-00:00:10`` or ``00:00:10``, as sacctmgr prints durations."""
    days, _, clock = text.rpartition("-")
    seconds = 0
    for part in clock.split(":"):
        seconds = 60 * seconds + int(part or 0)
    return seconds + 86400 * int(days or 0)
