"""Checkpoints that any ZeRO stage on any number of ranks continues, and that are never found half-written.

DeepSpeed's own checkpoints are cut by rank and stage, and with another number of ranks they do not load. Here weights
and moments are read out of the engine as whole tensors and set into it again (masters.py).
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import safetensors.torch
import torch
from safetensors import safe_open
from torch import Tensor

from longclip.errors import LongclipError, SiteError, told_as_no_space
from longclip.run import checkpoints, lineage
from longclip.run.checkpoints import LATEST, MANIFEST, MOMENTS, STATE, WEIGHTS
from longclip.train import masters
from longclip.train.ranks import Ranks

T = TypeVar("T")


def name_of(step: int) -> str:
    """What the checkpoint after so many steps is called; names sort by age."""
    return f"step-{step:08d}"


def save(
    engine: Any,
    folder: Path,
    name: str,
    state: dict[str, Any],
    ranks: Ranks,
    fence: Callable[[], None] | None = None,
) -> float:
    """Write ``folder/name`` and make it the latest; the seconds that it took. Collective, after a step at least.

    Rank 0 writes aside, fsyncs, and renames. ``fence`` raises where this attempt has been superseded; it is asked
    before a folder of the run is touched, and again before ``latest`` moves. ``name`` sorts by age
    (``step-00000123``); a folder of that name, left by an attempt that died before it moved ``latest``, is replaced.

    Raises on all ranks: NoSpace where the disk is full or over quota, SiteError where it fails, what ``fence`` raised,
    LongclipError for anything else that fails on rank 0. The checkpoints that were there before stay whole, and so
    does ``latest``; what this one had written is removed.
    """
    begun = time.monotonic()
    aside = checkpoints.aside(folder / name)  # rank 0's; the others' is never made
    files: dict[str, dict[str, Any]] = {}
    try:
        on_rank_0(ranks, folder, partial(aside.mkdir, parents=True, exist_ok=True))
        for kind in (WEIGHTS, *MOMENTS):  # one after the other: rank 0 holds a third of it all in memory
            tensors: dict[str, Tensor] = {}
            for parameter, tensor in masters.tensors(engine, kind):
                if ranks.rank == 0:
                    tensors[parameter] = tensor.to("cpu", torch.float32).contiguous()
            files[f"{kind}.safetensors"] = on_rank_0(ranks, folder, partial(_write_tensors, aside, kind, tensors))
        state = {**state, "optimizer_step": masters.optimizer_step(engine)}
        on_rank_0(ranks, folder, partial(_publish, aside, folder / name, state, files, fence))
    finally:
        if ranks.rank == 0:
            shutil.rmtree(aside, ignore_errors=True)
    return time.monotonic() - begun


def restore(engine: Any, path: Path, ranks: Ranks) -> dict[str, Any]:
    """Set weights, moments and Adam's step of the checkpoint ``path`` into ``engine``; its state. Collective.

    Rank 0 verifies the files, all ranks read them. Any ZeRO stage and any number of ranks will do; those of before
    continue bit by bit (bf16 too: the master weights and the moments are fp32 in either precision).

    Raises LongclipError, on all ranks, where a file is broken, or where parameters differ in name or shape.
    """
    on_rank_0(ranks, path, partial(checkpoints.verify, path))
    state = on_rank_0(ranks, path, partial(checkpoints.state_of, path))
    with safe_open(path / f"{WEIGHTS}.safetensors", framework="pt") as saved:
        names = saved.keys()
        _compare(engine, {name: tuple(saved.get_slice(name).get_shape()) for name in names}, path)
    masters.create_moments(engine, state["optimizer_step"])
    for kind in (WEIGHTS, *MOMENTS):
        with safe_open(path / f"{kind}.safetensors", framework="pt") as saved:
            for name, parameter in engine.module.named_parameters():
                if kind == WEIGHTS or parameter.requires_grad:
                    masters.set_whole(engine, parameter, kind, saved.get_tensor(name))
    if engine.zero_optimization_stage() in (1, 2):
        engine.optimizer.update_lp_params()  # the module's copies, in its own precision, from the fp32 slices
    return state


def amend(path: Path, state: dict[str, Any], ranks: Ranks, fence: Callable[[], None]) -> None:
    """Adds what a validation found to the state of the checkpoint ``path``, from which this attempt went on.

    Collective.
    Raises, on all ranks, as :func:`save` does.
    """

    def write() -> None:
        fence()
        checkpoints.amend(path, {key: state[key] for key in ("best", "validation_due")})

    on_rank_0(ranks, path, write)


def newest(folder: Path, ranks: Ranks) -> Path | None:
    """Rank 0's :func:`longclip.run.checkpoints.latest` on all ranks; where it raises, all do. Collective."""
    return on_rank_0(ranks, folder, partial(checkpoints.latest, folder))


def read_origin(folder: Path, reference: str, ranks: Ranks) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The weights that :func:`longclip.run.lineage.origin` finds, and its record. Rank 0 verifies. Collective."""

    def find() -> tuple[Path, dict[str, Any]]:
        path, record = lineage.origin(folder, reference)
        if (path / MANIFEST).is_file():
            checkpoints.verify(path)
        return path, record

    path, record = on_rank_0(ranks, folder, find)
    return load_weights(path), record


def load_weights(path: Path) -> dict[str, Tensor]:
    """The fp32 weights in the checkpoint folder ``path``, by parameter name."""
    return safetensors.torch.load_file(path / f"{WEIGHTS}.safetensors")


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


def on_rank_0(ranks: Ranks, path: Path, act: Callable[[], T]) -> T:
    """``act()`` of rank 0 as the result on all ranks; where it raises all raise, and none is left waiting."""
    result: T | None = None
    error: LongclipError | None = None
    cause: Exception | None = None
    if ranks.rank == 0:
        try:
            with told_as_no_space(path):
                result = act()
        except LongclipError as caught:
            error = cause = caught
        except OSError as caught:
            error, cause = SiteError(f"{path}: {caught.strerror or caught}"), caught
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
) -> None:
    """Complete the folder ``aside``, make it ``path``, and let ``latest`` name it.

    ``latest`` is written with the rest: once the folder has its name, nothing needs room any more.
    """
    files = {**files, STATE: _write(aside / STATE, _json(state))}
    _write(aside / MANIFEST, _json({"files": files}))
    _write(aside / LATEST, _json({"checkpoint": path.name}))
    _sync(aside)
    if fence:
        fence()
    checkpoints.remove(path)
    aside.rename(path)
    _sync(path.parent)
    if fence:
        fence()
    (path / LATEST).replace(path.parent / LATEST)
    _sync(path)
    _sync(path.parent)


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
