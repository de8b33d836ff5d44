"""GPUs that an estimate can be made for: memory, and the peak of dense matrix products.

Numbers are the vendors', without sparsity and per device that a rank gets (of an MI250X that is one of its two dies).
fp32 uses no TF32, neither in torch's default for matrix products nor, by train/ranks.py, in convolutions (on AMD: the
matrix cores' fp32).

Sources: NVIDIA's data sheets of V100, A100, A40, RTX A6000, L40S, H100, GH200, H200 and HGX B200; AMD's of MI250X and
MI300X.
"""

from __future__ import annotations

from dataclasses import dataclass

from longclip.errors import UserError


@dataclass(frozen=True)
class Gpu:
    """One device. Memory in GiB as the driver shows it, peaks in FLOP/s."""

    name: str
    memory_gib: float
    bf16: float | None
    """None where it has no bf16 units"""
    fp32: float
    shown: tuple[str, ...]
    """how torch calls it"""

    def peak(self, precision: str) -> float | None:
        return self.bf16 if precision == "bf16" else self.fp32


_T = 1e12
GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("v100-16g", 15.8, None, 15.7 * _T, ("Tesla V100-SXM2-16GB",)),
        Gpu("v100-32g", 31.7, None, 15.7 * _T, ("Tesla V100-SXM2-32GB", "Tesla V100-SXM3-32GB")),
        Gpu("a40", 44.4, 149.7 * _T, 37.4 * _T, ("NVIDIA A40",)),
        Gpu("a6000", 47.4, 154.8 * _T, 38.7 * _T, ("NVIDIA RTX A6000",)),
        Gpu("a100-40g", 39.4, 312 * _T, 19.5 * _T, ("NVIDIA A100-SXM4-40GB", "NVIDIA A100-PCIE-40GB")),
        Gpu("a100-80g", 79.2, 312 * _T, 19.5 * _T, ("NVIDIA A100-SXM4-80GB", "NVIDIA A100 80GB PCIe")),
        Gpu("l40s", 44.4, 362 * _T, 91.6 * _T, ("NVIDIA L40S",)),
        Gpu("h100-80g", 79.1, 989.4 * _T, 66.9 * _T, ("NVIDIA H100 80GB HBM3",)),
        Gpu("h100-pcie", 79.1, 756 * _T, 51 * _T, ("NVIDIA H100 PCIe",)),
        Gpu("gh200-96g", 94.5, 989.4 * _T, 66.9 * _T, ("NVIDIA GH200 480GB",)),
        Gpu("h200", 139.8, 989.4 * _T, 66.9 * _T, ("NVIDIA H200",)),
        Gpu("b200", 178.4, 2250 * _T, 75 * _T, ("NVIDIA B200",)),
        Gpu("mi250x", 64.0, 191.5 * _T, 47.9 * _T, ("AMD Instinct MI250X",)),
        Gpu("mi300x", 192.0, 1307.4 * _T, 163.4 * _T, ("AMD Instinct MI300X",)),
    )
}


def named(name: str) -> Gpu:
    """The GPU called so in the table. Raises UserError with the names that there are."""
    if name not in GPUS:
        raise UserError(f"--gpu {name}: not known; known: {', '.join(GPUS)}")
    return GPUS[name]


def of_site(gpu_type: str | None) -> Gpu | None:
    """What Slurm calls a GPU (``h200``, ``a100-80g``); None where that is no name.

    Where it may be several (``a100``), the one with the least memory, of those the slowest: what fits it fits all.
    """
    return min(may_be(gpu_type), key=lambda gpu: (gpu.memory_gib, gpu.bf16 or gpu.fp32), default=None)


def may_be(gpu_type: str | None) -> list[Gpu]:
    """The GPUs that Slurm may mean by ``gpu_type``."""
    if not gpu_type:
        return []
    wanted = gpu_type.lower()
    return [GPUS[wanted]] if wanted in GPUS else [gpu for gpu in GPUS.values() if gpu.name.startswith(wanted)]


def shown_as(device: str) -> Gpu | None:
    """The GPU that torch calls ``device``; None for one that is not in the table."""
    return next((gpu for gpu in GPUS.values() if device in gpu.shown), None)
