"""The preflight: before a job trains, each of its nodes checks itself, and together they check what lies between them.

It takes seconds, and finds what otherwise costs hours: a GPU that counts wrong, a node without memory, a folder that
one node does not share, a rank that never comes. A node at fault is named, and recorded in ``nodes.jsonl`` of the run,
so that the run's next attempts avoid it for a day. What no single node can be blamed for (a full disk, the network
between nodes, a fault that all nodes show) stops the attempt and excludes nobody.
"""

from __future__ import annotations

import errno
import json
import os
import queue
import statistics
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn, TypeVar

from longclip.errors import SiteError
from longclip.launch.node import Needs, check_allowance, check_device, check_folder, check_node

if TYPE_CHECKING:
    from longclip.train.ranks import Ranks
    from longclip.train.watch import Who

T = TypeVar("T")

EXCLUDED_HOURS = 24.0
LIMIT_SECONDS = 120.0
"""for every rank to arrive, and again for the first collective, in which NCCL connects them"""
SIGHT_SECONDS = 10.0
"""for a file to be seen on another node: NFS clients keep for a while what they know of a folder"""
SKEW_SECONDS, SKEW_WARNING_SECONDS = 30.0, 2.0


class NodeFault(SiteError):
    """Some nodes are not fit to train; ``problems`` says which and why."""

    def __init__(self, problems: Mapping[str, Sequence[str]]) -> None:
        self.problems = problems
        nodes, their = ("node", "its") if len(problems) == 1 else ("nodes", "their")
        why = "; ".join(next(iter(problems.values()))) if len(problems) == 1 else _by_node(problems)
        super().__init__(
            f"{nodes} {', '.join(problems)} failed {their} preflight: {why}; "
            f"excluded from this run for {EXCLUDED_HOURS:.0f} h"
        )


@dataclass(frozen=True)
class Report:
    """What a preflight that was passed has to say."""

    warnings: list[str]
    seconds: float


@dataclass(frozen=True)
class _Finding:
    """What one rank found, told to all."""

    problems: list[str]
    """of its node"""
    site: list[str]
    """which no node is to blame for"""
    gpu: str | None
    """its uuid"""
    marked: bool
    """whether it has left its node's mark in the attempt's folder"""
    clock: float
    """seconds since 1970, read when all ranks had just left a collective"""


def preflight(
    attempt: Path, ranks: Ranks, who: Sequence[Who], needs: Needs, limit_seconds: float = LIMIT_SECONDS
) -> Report:
    """Checks the nodes of ``who`` for the attempt whose folder is ``attempt``. Collective.

    Raises, on all ranks that came:
        NodeFault: nodes are at fault; they have been recorded.
        SiteError: something else is, or all nodes are alike in it.
    """
    begun = time.monotonic()
    run = attempt.parent.parent
    node = who[ranks.rank].node
    leads = ranks.rank == min(w.rank for w in who if w.node == node)
    gpu, problems = check_device(ranks.device, ranks.local_rank)
    site = check_folder(run, needs.disk) if ranks.rank == 0 else []
    if leads:
        problems += check_node(needs)
        site += check_allowance(needs)

    absent = _absent(f"preflight/{attempt.name}", ranks, limit_seconds)
    if absent:
        faults: dict[str, list[str]] = {}
        for rank in absent:
            late = f"rank {who[rank]} did not come within {limit_seconds:.0f} s"
            faults.setdefault(who[rank].node, []).append(late)
        _blame(faults, who, attempt, recorded_here=ranks.rank == min(set(range(ranks.size)) - set(absent)))
    _sum_of_all(ranks, limit_seconds)
    clock = time.time()

    mark = attempt / _mark(node)
    if leads:
        try:
            mark.touch()
        except OSError as error:
            full = error.errno in (errno.ENOSPC, errno.EDQUOT)
            (site if full else problems).append(f"cannot write to {attempt}: {error.strerror}")
            leads = False
    findings = ranks.gather(_Finding(problems, site, gpu, leads, clock))
    expected = {w.node for w, f in zip(who, findings, strict=True) if f.marked}
    seen = ranks.gather(_seen(attempt, expected) if leads else None)
    if leads:
        with suppress(OSError):
            mark.unlink()

    faults, warnings = _judge(who, findings, seen, needs)
    if faults:
        _blame(faults, who, attempt, recorded_here=ranks.rank == 0)
    if problems := [problem for finding in findings for problem in finding.site]:
        raise SiteError("; ".join(dict.fromkeys(problems)))
    return Report(warnings, time.monotonic() - begun)


def excluded(run: Path, now: float, hours: float = EXCLUDED_HOURS) -> list[str]:
    """The nodes that failed a preflight of ``run`` (its folder) less than ``hours`` before ``now`` (s since 1970)."""
    try:
        lines = (run / "nodes.jsonl").read_text(encoding="utf-8", errors="replace").splitlines()
    except FileNotFoundError:
        return []
    nodes = []
    for line in lines:
        with suppress(ValueError, KeyError, TypeError):  # torn: its writer was killed in the act
            entry = json.loads(line)
            if now - entry["time"] < hours * 3600:
                nodes.append(str(entry["node"]))
    return sorted(set(nodes))


def _absent(key: str, ranks: Ranks, limit_seconds: float) -> list[int]:
    """Ranks that do not come within the limit, by the store through which the ranks of a process group first met.

    Raises SiteError where the store does not answer; then who is to blame cannot be told.
    """
    from torch.distributed import distributed_c10d

    if ranks.size == 1:
        return []
    store = distributed_c10d._get_default_store()
    keys = [f"{key}/{rank}" for rank in range(ranks.size)]

    def wait() -> list[int]:
        store.set(keys[ranks.rank], "here")
        deadline = time.monotonic() + limit_seconds
        while not store.check(keys) and time.monotonic() < deadline:
            time.sleep(0.05)
        return [rank for rank, each in enumerate(keys) if not store.check([each])]

    try:
        return _within(limit_seconds + SIGHT_SECONDS, wait)
    except (TimeoutError, RuntimeError):
        raise SiteError("preflight: the store of the process group, on the node of rank 0, does not answer") from None


def _sum_of_all(ranks: Ranks, limit_seconds: float) -> None:
    """A collective among all ranks, which must end in time and be right. Raises SiteError."""
    try:
        (total,) = _within(limit_seconds, lambda: ranks.sum_across([ranks.rank + 1.0]))
    except TimeoutError:
        found = f"did not end within {limit_seconds:.0f} s"
    except RuntimeError as error:
        found = f"failed: {str(error).splitlines()[0]}"
    else:
        right = ranks.size * (ranks.size + 1) / 2
        if total == right:
            return
        found = f"gave {total:g} instead of {right:g}"
    raise SiteError(f"preflight: all {ranks.size} ranks came, but a sum over them {found}; look at the network")


def _within(seconds: float, act: Callable[[], T]) -> T:
    """What ``act`` returns or raises. TimeoutError after ``seconds``: it stays behind in a thread, for good."""
    outcome: queue.SimpleQueue[tuple[T | None, Exception | None]] = queue.SimpleQueue()

    def run() -> None:
        try:
            outcome.put((act(), None))
        except Exception as error:
            outcome.put((None, error))

    threading.Thread(target=run, daemon=True).start()
    try:
        value, error = outcome.get(timeout=seconds)
    except queue.Empty:
        raise TimeoutError from None
    if error is not None:
        raise error
    return value  # type: ignore[return-value]


def _mark(node: str) -> str:
    return f".preflight-{node}"


def _seen(attempt: Path, expected: Collection[str]) -> set[str]:
    """The nodes of ``expected`` whose marks this one sees; it looks again for as long as NFS may need."""
    deadline = time.monotonic() + SIGHT_SECONDS
    while True:
        names: set[str] = set()
        with suppress(OSError):
            names = set(os.listdir(attempt))
        seen = {node for node in expected if _mark(node) in names}
        if len(seen) == len(expected) or time.monotonic() > deadline:
            return seen
        time.sleep(0.5)


def _judge(
    who: Sequence[Who], findings: Sequence[_Finding], seen: Sequence[set[str] | None], needs: Needs
) -> tuple[dict[str, list[str]], list[str]]:
    """The faults of nodes, and warnings. The same on every rank, since all have the same findings."""
    by_node: dict[str, list[int]] = {}
    for w in who:
        by_node.setdefault(w.node, []).append(w.rank)
    faults: dict[str, list[str]] = {}
    warnings = []
    clocks = {node: findings[its[0]].clock for node, its in by_node.items()}
    # Of two clocks none is in the middle: rank 0's counts, for it writes the record.
    right = statistics.median(clocks.values()) if len(clocks) > 2 else clocks[who[0].node]
    blind = _blind({node: found for node, its in by_node.items() if (found := seen[its[0]]) is not None})
    for node, its in by_node.items():
        problems = [problem for rank in its for problem in findings[rank].problems]
        gpus = {gpu for rank in its if (gpu := findings[rank].gpu)}
        if len(gpus) < needs.gpus and not problems:
            problems.append(f"{len(gpus)} of {needs.gpus} GPUs are to be seen")
        if node in blind:
            problems.append("the run's folder is not the one that the other nodes see")
        skew = clocks[node] - right
        if abs(skew) > SKEW_WARNING_SECONDS:
            told = f"clock is {abs(skew):.0f} s {'ahead' if skew > 0 else 'behind'}"
            if abs(skew) > SKEW_SECONDS:
                problems.append(f"its {told}")
            else:
                warnings.append(f"node {node}: {told}")
        if problems:
            faults[node] = problems
    return faults, warnings


def _blind(seen: Mapping[str, set[str]]) -> set[str]:
    """The nodes that see fewer marks than another does; where all see as many, those that rank 0's node misses."""
    most = max(map(len, seen.values()), default=0)
    fewer = {node for node, nodes in seen.items() if len(nodes) < most}
    return fewer or set(seen) - next(iter(seen.values()), set())


def _blame(faults: Mapping[str, Sequence[str]], who: Sequence[Who], attempt: Path, recorded_here: bool) -> NoReturn:
    nodes = {w.node for w in who}
    if nodes == set(faults) and len(nodes) > 1:
        raise SiteError(f"no node passed the preflight, so none is to blame: {_by_node(faults)}")
    if recorded_here:
        entries = [
            {"node": node, "time": time.time(), "why": "; ".join(whys), "attempt": int(attempt.name)}
            for node, whys in faults.items()
        ]
        with suppress(OSError), (attempt.parent.parent / "nodes.jsonl").open("a", encoding="utf-8") as f:
            f.writelines(json.dumps(entry) + "\n" for entry in entries)
    raise NodeFault(faults)


def _by_node(problems: Mapping[str, Sequence[str]]) -> str:
    return "; ".join(f"{node}: {', '.join(whys)}" for node, whys in problems.items())
