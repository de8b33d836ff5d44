"""Checkpoints that any ZeRO stage on any number of ranks continues, and that are never found half-written.

    checkpoints/step-00000123/weights.safetensors      fp32, by parameter name
                              exp_avg.safetensors      Adam's first moment, same names
                              exp_avg_sq.safetensors   Adam's second moment, same names
                              state.json               step, samples, ... and the optimizer's own step
                              manifest.json            size and sha256 of each file above, written last
    checkpoints/latest        {"checkpoint": "step-00000123"}, moved last of all

DeepSpeed's own checkpoints are cut by rank and stage, and with another number of ranks they do not load. Here weights
and moments are read out of the engine as whole tensors and set into it again:

    stage   fp32 weights                              Adam's state is keyed by
    0       the module's parameters                   the parameter
    1, 2    slices of one flat tensor a group, rank   that flat tensor
    3       slices of one flat tensor a sub group     that flat tensor
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import safetensors.torch
import torch
from safetensors import safe_open
from torch import Tensor

from longclip.errors import LongclipError, SiteError
from longclip.train.ranks import Ranks

T = TypeVar("T")

MOMENTS = ("exp_avg", "exp_avg_sq")
WEIGHTS = "weights"
STATE = "state.json"
MANIFEST = "manifest.json"
LATEST = "latest"


def save(
    engine: Any,
    folder: Path,
    name: str,
    state: dict[str, Any],
    ranks: Ranks,
    fence: Callable[[], None] | None = None,
) -> Path:
    """Write ``folder/name`` and make it the latest. Collective; the engine must have taken a step.

    Rank 0 writes aside, fsyncs, and renames. ``fence`` raises where this attempt has been superseded; it is asked
    before a folder of the run is touched, and again before ``latest`` moves. ``name`` sorts by age
    (``step-00000123``); a folder of that name, left by an attempt that died before it moved ``latest``, is replaced.

    Raises on all ranks: SiteError where the disk fails, is full or over quota, what ``fence`` raised, LongclipError
    for anything else that fails on rank 0. The checkpoints that were there before stay whole, and so does ``latest``.
    """
    aside = folder / f".{name}.{os.getpid()}.tmp"
    files: dict[str, dict[str, Any]] = {}
    try:
        _on_rank_0(ranks, folder, partial(aside.mkdir, parents=True, exist_ok=True))
        for kind in (WEIGHTS, *MOMENTS):  # one after the other: rank 0 holds a third of it all in memory
            tensors: dict[str, Tensor] = {}
            for parameter, tensor in _tensors(engine, kind):
                if ranks.rank == 0:
                    tensors[parameter] = tensor.to("cpu", torch.float32).contiguous()
            files[f"{kind}.safetensors"] = _on_rank_0(ranks, folder, partial(_write_tensors, aside, kind, tensors))
        state = {**state, "optimizer_step": _optimizer_step(engine)}
        return _on_rank_0(ranks, folder, partial(_publish, aside, folder / name, state, files, fence))
    finally:
        if ranks.rank == 0:
            shutil.rmtree(aside, ignore_errors=True)


def restore(engine: Any, path: Path, ranks: Ranks) -> dict[str, Any]:
    """Set weights, moments and Adam's step of the checkpoint ``path`` into ``engine``; its state. Collective.

    Rank 0 verifies the files, all ranks read them. Any ZeRO stage and any number of ranks will do; those of before
    continue bit by bit (bf16 too: the master weights and the moments are fp32 in either precision).

    Raises LongclipError, on all ranks, where a file is broken, or where parameters differ in name or shape.
    """
    _on_rank_0(ranks, path, partial(_verify, path))
    state: dict[str, Any] = json.loads((path / STATE).read_text())
    with safe_open(path / f"{WEIGHTS}.safetensors", framework="pt") as saved:
        names = saved.keys()
        _compare(engine, {name: tuple(saved.get_slice(name).get_shape()) for name in names}, path)
    _create_moments(engine, state["optimizer_step"])
    for kind in (WEIGHTS, *MOMENTS):
        with safe_open(path / f"{kind}.safetensors", framework="pt") as saved:
            for name, parameter in engine.module.named_parameters():
                _set(engine, parameter, kind, saved.get_tensor(name))
    if engine.zero_optimization_stage() in (1, 2):
        engine.optimizer.update_lp_params()  # the module's copies, in its own precision, from the fp32 slices
    return state


def latest(folder: Path) -> Path | None:
    """The newest checkpoint that can be continued from, or None. Not collective: rank 0 asks and tells the others.

    It is the one that ``folder/latest`` names, if all its files are those that its manifest lists. A broken one is set
    aside as ``broken-<name>``, and the next older intact one is taken. A newer one was never published.
    """
    for path in reversed(_published(folder)):
        try:
            _verify(path)
        except LongclipError:
            broken = folder / f"broken-{path.name}"
            _remove(broken)
            path.rename(broken)
        else:
            return path
    return None


def retain(folder: Path, last: int, best: str | None) -> None:
    """Remove all checkpoints but the ``last`` newest, ``best``, and the one that ``folder/latest`` names.

    Also removes what killed attempts left half-written. Broken checkpoints that were set aside stay. Only for rank 0
    of the attempt that owns the run.
    """
    published = _published(folder)
    for path in published[:-last]:
        if path.name != best:
            _remove(path)
    for path in folder.glob(".*.tmp"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def load_weights(path: Path) -> dict[str, Tensor]:
    """The fp32 weights in the checkpoint folder ``path``, by parameter name."""
    return safetensors.torch.load_file(path / f"{WEIGHTS}.safetensors")


# -- into and out of DeepSpeed


def _tensors(engine: Any, kind: str) -> Iterator[tuple[str, Tensor]]:
    """(name, whole fp32 tensor) of each parameter: its weight or a moment. Collective at stages 1 to 3."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    _link_moments(engine)
    for name, parameter in engine.module.named_parameters():
        if engine.zero_optimization_stage() == 0:
            tensor = parameter if kind == WEIGHTS else engine.basic_optimizer.state[parameter][kind]
        elif kind == WEIGHTS:
            tensor = safe_get_full_fp32_param(parameter)
        else:
            tensor = safe_get_full_optimizer_state(parameter, kind)
        yield name, tensor.detach()


@torch.no_grad()
def _set(engine: Any, parameter: Any, kind: str, value: Tensor) -> None:
    """Set one parameter's whole fp32 weight or moment. Collective at stage 3, for weights."""
    import deepspeed
    from deepspeed.utils import (
        safe_set_full_fp32_param,
        safe_set_full_optimizer_state,
        safe_set_local_fp32_param,
        safe_set_local_optimizer_state,
    )

    stage = engine.zero_optimization_stage()
    if stage == 0:
        target = parameter if kind == WEIGHTS else engine.basic_optimizer.state[parameter][kind]
        target.copy_(value)
    elif stage < 3:
        if kind == WEIGHTS:
            safe_set_full_fp32_param(parameter, value)
        else:
            safe_set_full_optimizer_state(parameter, value, kind)
    else:
        # safe_set_full_* slices without padding and fails where the elements do not divide by the ranks
        part = parameter.ds_tensor.numel()
        padded = value.new_zeros(part * torch.distributed.get_world_size())
        padded[: value.numel()] = value.flatten()
        own = padded.narrow(0, part * torch.distributed.get_rank(), part)
        if kind == WEIGHTS:
            safe_set_local_fp32_param(parameter, own)
            with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):  # the module's own copy
                parameter.data.copy_(value)
        else:
            safe_set_local_optimizer_state(parameter, own, kind)


def _masters(engine: Any) -> list[Tensor]:
    """The tensors that torch's AdamW really updates on this rank: its state is keyed by them."""
    if engine.zero_optimization_stage() == 3:  # its groups hold them during a step only
        return list(engine.optimizer.fp32_partitioned_groups_flat)
    return [tensor for group in engine.basic_optimizer.param_groups for tensor in group["params"]]


def _create_moments(engine: Any, step: int) -> None:
    """Adam's state at ``step``, still empty, as AdamW would make it on its first step. No batch is needed."""
    optimizer = engine.basic_optimizer
    on_device = bool(optimizer.defaults["fused"] or optimizer.defaults["capturable"])
    for master in _masters(engine):
        optimizer.state[master] = {
            "step": torch.tensor(float(step), device=master.device if on_device else "cpu"),
            **{moment: torch.zeros_like(master) for moment in MOMENTS},
        }
    _link_moments(engine)


def _link_moments(engine: Any) -> None:
    """Let the parameters of stages 1 and 2 see their slices of the flat moments.

    DeepSpeed does it once, after the first step of its first parameter group, when the others have no moments yet
    (deepspeed/runtime/zero/stage_1_and_2.py:2987), and reading theirs would fail.
    """
    if engine.zero_optimization_stage() in (1, 2):
        engine.optimizer._hp_optimizer_states_linked = False
        engine.optimizer._lazy_init_hp_params_optimizer_state()


def _optimizer_step(engine: Any) -> int:
    return int(engine.basic_optimizer.state[_masters(engine)[0]]["step"])


def _compare(engine: Any, saved: dict[str, tuple[int, ...]], path: Path) -> None:
    """Raise LongclipError unless the model has exactly the parameters that were ``saved``."""
    here = {name: tuple(getattr(p, "ds_shape", p.shape)) for name, p in engine.module.named_parameters()}
    differing = [name for name in sorted(here | saved) if here.get(name) != saved.get(name)]
    if differing:
        shown = [f"{n}: {here.get(n, 'absent')} here, {saved.get(n, 'absent')} there" for n in differing[:3]]
        raise LongclipError(
            f"{path} is of another model, {len(differing)} parameters differ: {'; '.join(shown)}",
            hint="continue with the experiment that wrote it, or start a new run",
        )


# -- on the disk


def _on_rank_0(ranks: Ranks, path: Path, act: Callable[[], T]) -> T:
    """``act()`` of rank 0 as the result on all ranks; where it raises all raise, and none is left waiting."""
    result: T | None = None
    error: LongclipError | None = None
    cause: Exception | None = None
    if ranks.rank == 0:
        try:
            result = act()
        except LongclipError as caught:
            error = cause = caught
        except OSError as caught:
            full = caught.errno in (errno.ENOSPC, errno.EDQUOT)
            what = f"{'no room left: ' if full else ''}{path}: {caught.strerror or caught}"
            error = SiteError(what, hint="make room, then submit again; the run continues" if full else None)
            cause = caught
        except Exception as caught:
            error, cause = LongclipError(f"{path}: {caught!r}"), caught
    result, error = ranks.tell((result, error))
    if error is not None:
        raise error from (None if cause is error else cause)
    return result  # type: ignore[return-value]


def _write_tensors(folder: Path, kind: str, tensors: dict[str, Tensor]) -> dict[str, Any]:
    return _write(folder / f"{kind}.safetensors", safetensors.torch.save(tensors))


def _publish(
    aside: Path, path: Path, state: dict[str, Any], files: dict[str, Any], fence: Callable[[], None] | None
) -> Path:
    """Complete the folder ``aside``, make it ``path``, and let ``latest`` name it."""
    files = {**files, STATE: _write(aside / STATE, _json(state))}
    _write(aside / MANIFEST, _json({"files": files}))
    _sync(aside)
    if fence:
        fence()
    _remove(path)
    aside.rename(path)
    _sync(path.parent)
    if fence:
        fence()
    moving = path.parent / f".{LATEST}.{os.getpid()}.tmp"
    _write(moving, _json({"checkpoint": path.name}))
    moving.replace(path.parent / LATEST)
    _sync(path.parent)
    return path


def _json(content: dict[str, Any]) -> bytes:
    return json.dumps(content, indent=1).encode()


def _write(path: Path, data: bytes) -> dict[str, Any]:
    """Write and fsync; the manifest's entry for the file."""
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def _sync(folder: Path) -> None:
    """Make the names in ``folder`` durable."""
    opened = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def _remove(path: Path) -> None:
    """Remove a folder if it is there; it loses its name first, so that none is ever seen half removed."""
    if path.exists():
        going = path.with_name(f".{path.name}.gone.{os.getpid()}.tmp")
        path.rename(going)
        shutil.rmtree(going)


def _published(folder: Path) -> list[Path]:
    """Checkpoint folders up to the one that ``latest`` names, oldest first, broken or not."""
    try:
        newest = json.loads((folder / LATEST).read_text())["checkpoint"]
    except FileNotFoundError:
        return []
    except (ValueError, KeyError, TypeError) as error:
        raise LongclipError(
            f"{folder / LATEST} is not what was written: {error!r}",
            hint='write {"checkpoint": "NAME"} into it, with the name of a folder beside it',
        ) from error
    return sorted(path for path in folder.glob("step-*") if path.name <= newest)


def _verify(path: Path) -> None:
    """Raise LongclipError unless the files of a checkpoint are all there, and those that were written.

    An I/O error is no proof that a file is broken, and is raised as it is.
    """
    try:
        listed = json.loads((path / MANIFEST).read_text())["files"]
        for name in (*(f"{kind}.safetensors" for kind in (WEIGHTS, *MOMENTS)), STATE):
            with open(path / name, "rb") as file:
                same = os.fstat(file.fileno()).st_size == listed[name]["size"]
                if not same or hashlib.file_digest(file, "sha256").hexdigest() != listed[name]["sha256"]:
                    raise LongclipError(f"{path / name} is broken: its content is not what {MANIFEST} says")
    except (FileNotFoundError, ValueError, KeyError, TypeError) as error:
        raise LongclipError(f"{path} is broken: {error!r}") from error
