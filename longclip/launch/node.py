"""What a node finds out about itself before it trains: memory, local disks, its GPUs. A line for each thing wrong."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

SMI_SECONDS = 20.0
INODES = 1000
TMP_BYTES = 64 * 2**20


@dataclass(frozen=True)
class Needs:
    """What a run asks of each node, in bytes where not said otherwise."""

    gpus: int
    """how many; 0 for a run on CPUs"""
    memory: int
    shm: int
    """under /dev/shm, where loader workers put their batches; 0 without workers"""
    disk: int
    """in the run's folder: 2 checkpoints x 12 bytes x parameters"""


def check_node(needs: Needs) -> list[str]:
    """What is wrong with this node's memory and local disks."""
    problems = []
    available = _available_memory()
    if available < needs.memory:
        problems.append(f"{_gib(available)} of memory left, {_gib(needs.memory)} needed")
    places = {Path(tempfile.gettempdir()): TMP_BYTES, **({Path("/dev/shm"): needs.shm} if needs.shm else {})}
    for place, room in places.items():
        try:
            with tempfile.TemporaryFile(dir=place) as f:
                f.write(b"x")
            free = shutil.disk_usage(place).free
        except OSError as error:
            problems.append(f"cannot write to {place}: {error.strerror}")
        else:
            if free < room:
                problems.append(f"{_gib(free)} left in {place}, {_gib(room)} needed")
    return problems


def check_allowance(needs: Needs) -> list[str]:
    """Whether the job was given less memory than it needs: that is no fault of the node."""
    allowed = _allowed_memory()
    if allowed is None or allowed >= needs.memory:
        return []
    return [f"the job may use {_gib(allowed)} of memory on a node, and needs {_gib(needs.memory)}; set slurm.mem_gb"]


def check_folder(run: Path, disk: int) -> list[str]:
    """Whether the run's folder has room for ``disk`` bytes. It is shared, so the answer says nothing about a node."""
    state = os.statvfs(run)
    free = state.f_bavail * state.f_frsize
    problems = []
    if free < disk:
        problems.append(f"{run}: {_gib(free)} left on this disk, two checkpoints take {_gib(disk)}")
    if state.f_files and state.f_favail < INODES:  # Btrfs and some parallel file systems count no inodes at all
        problems.append(f"{run}: {state.f_favail} inodes left on this disk")
    return problems


def check_device(device: torch.device, local_rank: int) -> tuple[str | None, list[str]]:
    """The uuid of this rank's GPU (None on a CPU), and what is wrong with it."""
    import torch

    name = f"GPU {local_rank}" if device.type == "cuda" else "the CPU"
    # Whole numbers below 8: exact in any precision that a tensor core may choose, and so is each sum in fp32.
    a = (torch.arange(512 * 512) % 7).view(512, 512).float()
    b = (torch.arange(512 * 512) % 5).view(512, 512).float()
    uuid = None
    try:
        product = (a.to(device) @ b.to(device)).cpu()
        if device.type == "cuda":
            uuid = str(torch.cuda.get_device_properties(device).uuid)
    except RuntimeError as error:
        return None, [f"{name} fails: {str(error).splitlines()[0]}"]
    problems = [] if torch.equal(product.long(), a.long() @ b.long()) else [f"{name} gives wrong results"]
    return uuid, problems + (ecc_problems(uuid, name) if uuid else [])


def ecc_problems(uuid: str, name: str) -> list[str]:
    """Memory errors that the GPU could not correct since its driver was loaded, by nvidia-smi where there is one."""
    columns = "uuid,ecc.errors.uncorrected.volatile.total"
    try:
        told = subprocess.run(
            ["nvidia-smi", f"--query-gpu={columns}", "--format=csv,noheader,nounits"],
            capture_output=True,
            text=True,
            timeout=SMI_SECONDS,
            check=False,
        ).stdout
    except FileNotFoundError:
        return []
    except subprocess.TimeoutExpired:
        return [f"nvidia-smi does not answer within {SMI_SECONDS:.0f} s"]
    for line in told.splitlines():
        of, _, errors = line.partition(", ")
        # A GPU without ECC says "[N/A]"; torch's uuid lacks the prefix "GPU-".
        if of.endswith(uuid) and errors.strip().isdigit() and int(errors):
            return [f"{name} has {int(errors)} uncorrected memory errors"]
    return []


def _available_memory() -> int:
    """Bytes that processes of this node can still get (proc(5), MemAvailable)."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))


def _allowed_memory() -> int | None:
    """Bytes that this job may use on this node, by Slurm's word and its cgroups' (v2, or v1); None: all that it has."""
    limits = []
    if megabytes := os.environ.get("SLURM_MEM_PER_NODE"):
        limits.append(int(megabytes) * 2**20)
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        root, file = Path("/sys/fs/cgroup"), "memory.max"
        if controllers:
            root, file = root / "memory", "memory.limit_in_bytes"
        if not controllers or "memory" in controllers.split(","):
            inner = root / path.lstrip("/")
            for folder in (inner, *inner.parents):
                with suppress(OSError, ValueError):  # not there, or "max"
                    limits.append(int((folder / file).read_text()))
    return min((limit for limit in limits if limit), default=None)


def _gib(size: int) -> str:
    return f"{size / 2**30:,.1f} GiB"
