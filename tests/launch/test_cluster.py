"""What is made of facts that the cluster of tests/slurm lacks: preemption that cancels, or goes by QOS; limits."""

from __future__ import annotations

import dataclasses

import pytest

from longclip.launch import doctor
from longclip.launch.cluster import Cluster, Limits, Partition
from longclip.launch.site import Site

SPOT = Partition(
    name="spot",
    default=True,
    up=True,
    max_time="1-00:00:00",
    default_time="01:00:00",
    preempt_mode="CANCEL",
    grace_s=30,
    memory_default="",
    gpus={"h100": 4},
)


def cluster(**config: str) -> Cluster:
    return Cluster(
        config={"PreemptType": "preempt/none", "PreemptMode": "REQUEUE", "JobRequeue": "1", **config},
        partitions={"spot": SPOT},
        accounts={"a": Limits(100), "b": Limits()},
        default_account="a",
        qos={"normal": Limits(20), "low": Limits(preempt_mode="CANCEL", grace_s=60), "same": Limits(grace_s=5)},
        default_qos="normal",
    )


@pytest.mark.parametrize(
    ("kind", "qos", "expected"),
    [
        ("preempt/none", None, ("OFF", 0)),
        ("preempt/partition_prio", None, ("CANCEL", 30)),
        ("preempt/qos", None, ("REQUEUE", 0)),
        ("preempt/qos", "low", ("CANCEL", 60)),
        ("preempt/qos", "same", ("REQUEUE", 5)),
    ],
)
def test_preemption_is_by_partition_or_by_qos(kind: str, qos: str | None, expected: tuple[str, int]) -> None:
    assert cluster(PreemptType=kind).preemption("spot", qos) == expected


def test_the_lowest_limit_counts() -> None:
    assert cluster().max_submit("a", None) == 20
    assert cluster().max_submit("a", "low") == 100
    assert cluster().max_submit("b", "low") is None


@pytest.mark.parametrize(
    ("config", "restart", "level", "said"),
    [
        ({"PreemptType": "preempt/partition_prio"}, "requeue", "warn", "a cancelled job is not requeued"),
        ({"PreemptType": "preempt/partition_prio"}, "chain", "ok", "preemption CANCEL after 30 s"),
        ({}, "requeue", "ok", "preemption OFF"),
        ({"JobRequeue": "0"}, "chain", "ok", "preemption OFF"),
    ],
)
def test_restart_against_the_facts(config: dict[str, str], restart: str, level: str, said: str) -> None:
    found = doctor._restart(SPOT, Site.model_validate({"restart": restart}), cluster(**config))
    assert found.level == level and said in found.said, found


def test_requeue_where_only_jobs_that_ask_are_requeued(monkeypatch: pytest.MonkeyPatch) -> None:
    for script, level in (("#!/bin/bash\n#SBATCH --requeue\n", "ok"), ("#!/bin/bash\n", "warn")):
        monkeypatch.setattr(doctor.job, "batch_script", lambda plan, site, script=script: script)
        assert doctor._restart(SPOT, Site(), cluster(JobRequeue="0")).level == level


@pytest.mark.parametrize(
    ("site", "select", "level"),
    [
        (Site(), "select/cons_tres", "ok"),
        (Site(), "select/cons_res", "fail"),
        (Site(gpus="gres"), "select/cons_res", "ok"),
        (Site(gpu_type="a100"), "select/cons_tres", "fail"),
    ],
)
def test_gpus_are_asked_for_in_a_way_that_the_cluster_knows(site: Site, select: str, level: str) -> None:
    assert doctor._gpus(SPOT, site, cluster(SelectType=select)).level == level


def test_without_gpus_runs_train_on_cpus() -> None:
    assert doctor._gpus(dataclasses.replace(SPOT, gpus={}), Site(), cluster()).level == "warn"
