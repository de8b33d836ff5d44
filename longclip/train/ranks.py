"""The processes of a run: who this one is, and the few things that all of them must agree on at a step boundary.

The launcher (srun, torchrun, or nobody for a single process) says who is who through RANK, WORLD_SIZE, LOCAL_RANK,
MASTER_ADDR and MASTER_PORT. DeepSpeed is given a process group that stands already: its own start-up would look for
MPI where RANK is absent, and would compile a shared-memory extension on CPU that nothing here needs.
"""

from __future__ import annotations

import gc
import os
import socket
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any, TypeVar

import torch
import torch.distributed as dist

# Functions of it, and of DeepSpeed, which would import it later, take the group of the moment as a default, for good.
import torch.distributed.nn
from torch.distributed.rendezvous import rendezvous as rendezvous_at

from longclip.errors import SiteError

T = TypeVar("T")

COLLECTIVE_TIMEOUT = timedelta(hours=2)
"""torch's own (NCCL: 10 min) would end a slow step; hangs are noticed, and told better, by train/watch.py"""
MEETING_TIMEOUT = timedelta(minutes=10)
"""before the ranks have met nobody watches: a node that hangs at an import would keep the others for two hours"""


@dataclass(frozen=True)
class Ranks:
    """This process among all of the run."""

    rank: int
    """0 .. size - 1; rank 0 writes"""
    size: int
    local_rank: int
    """0 .. processes on this node - 1"""
    device: torch.device
    """where this process computes; collectives want their tensors there"""

    def sum_across(self, values: Sequence[float]) -> list[float]:
        """Sums of ``values``, one by one, over all ranks, in double precision. Collective."""
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return [float(value) for value in total.tolist()]

    def agree(self, flag: bool) -> bool:
        """Whether any rank says true. Collective: how a signal on one node stops all of them at the same step."""
        raised = torch.tensor([int(flag)], dtype=torch.int32, device=self.device)
        dist.all_reduce(raised, op=dist.ReduceOp.MAX)
        return bool(raised.item())

    def tell(self, value: T) -> T:
        """Rank 0's ``value`` (small, picklable) on every rank; what the others pass is ignored. Collective."""
        told = [value]
        dist.broadcast_object_list(told, device=self.device)
        return told[0]

    def gather(self, value: T) -> list[T]:
        """Every rank's ``value``, in the order of ranks, on every rank. Collective; anything small that pickles."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values


def start(rendezvous: str | None = None) -> Ranks:
    """Join the process group named by the environment and make it known to DeepSpeed.

    ``rendezvous`` is an init URL of torch.distributed (``file:///shared/meet``, ``tcp://host:port``) to meet at
    instead of MASTER_ADDR:MASTER_PORT. Without RANK in the environment this process is alone, and meets nobody.

    Raises SiteError where the launcher set only a part of the environment, or gave this rank a GPU that is not there.
    Raises torch's DistError where a rank does not come within MEETING_TIMEOUT.
    """
    rank, size, local_rank = _identity(rendezvous)
    device = _device(local_rank)
    _before_deepspeed(device)
    import deepspeed  # before there is a group, as torch.distributed.nn above

    backend = "nccl" if device.type == "cuda" else "gloo"
    if size == 1 and rendezvous is None:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]
    else:
        url = rendezvous or "env://"
        store, _, _ = next(iter(rendezvous_at(url, rank, size, timeout=MEETING_TIMEOUT)))
        _same_device(store, rank, size, device)
        store.set_timeout(COLLECTIVE_TIMEOUT)
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=COLLECTIVE_TIMEOUT)
    # Without asking for the whole table, for which DeepSpeed would look at every extension: seconds, and lines in logs.
    vars(deepspeed.ops).setdefault("__compatible_ops__", {})["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(backend, auto_mpi_discovery=False, dist_init_required=False)
    # ZeRO's collectives run on groups that DeepSpeed makes for itself, of which it names the ranks and no timeout
    # (deepspeed/comm/torch.py ``new_group``): torch would give up on those (NCCL: 10 min) before the watch is sure.
    deepspeed.comm.comm.cdb.new_group = partial(dist.new_group, timeout=COLLECTIVE_TIMEOUT)
    return Ranks(rank, size, local_rank, device)


def _same_device(store: Any, rank: int, size: int, device: torch.device) -> None:
    """Raises SiteError on all ranks where some see a GPU and some do not: their backends would wait for each other.

    ``store`` is the one at which they have met.
    """
    keys = [f"longclip/device/{other}" for other in range(size)]
    store.set(keys[rank], f"{device.type} {socket.gethostname()}")
    told = [value.decode().split(" ", 1) for value in store.multi_get(keys)]
    if len({kind for kind, _ in told}) > 1:
        blind = sorted({host for kind, host in told if kind == "cpu"})
        raise SiteError(f"no GPU is to be seen on {', '.join(blind)}, and there are some for the other ranks")


def leave(ranks: Ranks) -> None:
    """As :func:`stop`, all at once: whose partner is gone aborts when it takes down its group. Collective."""
    ranks.agree(True)
    stop()


def stop() -> None:
    """Leave the process group, so that this process may :func:`start` another one, or end. Safe to call twice.

    DeepSpeed keeps the group in two module globals and would use the dead one (deepspeed/comm/comm.py ``cdb``,
    deepspeed/utils/groups.py ``_WORLD_GROUP``). Only where nothing keeps it do gloo's threads end here; one that still
    drops a tensor while the interpreter ends aborts the process (134), whatever it has done.
    """
    import deepspeed

    if dist.is_initialized():
        dist.destroy_process_group()
    deepspeed.comm.comm.cdb = None
    deepspeed.utils.groups._WORLD_GROUP = None
    gc.collect()  # an engine, which has groups of its own, is a ring of objects


def _identity(rendezvous: str | None) -> tuple[int, int, int]:
    """(rank, size, local rank)."""
    if "RANK" not in os.environ:
        return 0, 1, 0
    needed = ["WORLD_SIZE", "LOCAL_RANK", *([] if rendezvous else ["MASTER_ADDR", "MASTER_PORT"])]
    missing = [name for name in needed if not os.environ.get(name)]
    if missing:
        raise SiteError(
            f"RANK is {os.environ['RANK']}, but {', '.join(missing)} not set",
            hint="start under torchrun or srun with all five set, or without RANK for a single process",
        )
    return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), int(os.environ["LOCAL_RANK"])


def _device(local_rank: int) -> torch.device:
    """The GPU of this rank, or the CPU where torch sees no GPU at all. On a GPU fp32 is fp32 from here on, not TF32.

    Slurm may show each task its own GPU only (--gpus-per-task): then it is number 0 to every one of them. DeepSpeed
    takes its device from LOCAL_RANK (deepspeed/runtime/engine.py:1966), which is set accordingly.
    """
    if not torch.cuda.is_available():
        os.environ.setdefault("LOCAL_RANK", "0")
        return torch.device("cpu")
    visible = torch.cuda.device_count()
    index = 0 if visible == 1 else local_rank
    if index >= visible:
        raise SiteError(f"local rank {local_rank} has no GPU: this node shows {visible}; ask for one task per GPU")
    os.environ["LOCAL_RANK"] = str(index)
    torch.cuda.set_device(index)
    # On by default since Ampere, for convolutions alone: the patches of ``precision: fp32`` would be of 10 bits.
    torch.backends.cudnn.allow_tf32 = False
    return torch.device("cuda", index)


def _before_deepspeed(device: torch.device) -> None:
    """What must be set before DeepSpeed is imported for the first time. Its own logs begin at warnings."""
    if device.type == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
    # torch >= 2.13 renames collectives that DeepSpeed calls by their old names, on every rank
    warnings.filterwarnings("ignore", r".torch\.distributed\.\w+. is deprecated", FutureWarning)
