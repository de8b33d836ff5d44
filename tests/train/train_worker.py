"""Groups of ranks for tests: ``python train_worker.py GROUPS.json`` runs them one after the other.

A group is ``{"ranks": 2, "jobs": [...], "results": PATH}``. Its ranks are forked from this process, which has imported
torch and DeepSpeed (that takes longer than any job) and done nothing else. Each job has an engine of its own; several
engines in one process do not disturb each other. Rank 0 writes the list of results.
"""

from __future__ import annotations

import importlib
import json
import math
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from longclip.errors import LongclipError
from longclip.train import checkpoint, engine, loss, ranks
from tests.train.two_towers import STEPS, TwoTowers, batch, experiment, valid_mask


def own_part(me: ranks.Ranks, *tensors: torch.Tensor) -> list[torch.Tensor]:
    return [tensor.chunk(me.size)[me.rank] for tensor in tensors]


def train(job: dict[str, Any], me: ranks.Ranks) -> dict[str, Any]:
    """Steps on this rank's part of each global batch, from the start or from a checkpoint."""
    asked = experiment(job["stage"], job.get("precision", "fp32"))
    running = engine.start(TwoTowers(), asked, me)
    first = checkpoint.restore(running, Path(job["restore"]), me)["step"] if "restore" in job else 0
    losses, norms = [], []
    for step in range(first, job.get("last", STEPS)):
        pixels, tokens, valid = own_part(me, *batch(step), valid_mask(step))
        if asked.train.precision == "bf16":
            pixels = pixels.bfloat16()
        image, text, scale = running(pixels, tokens)
        local = loss.contrastive_loss(image, text, scale, me, valid if job.get("masked") else None)
        running.backward(local)
        engine.set_lr(running, engine.learning_rate(asked.train, step, STEPS))
        norms.append(engine.step(running))
        losses.append(me.sum_across([local.item()])[0] / me.size)
        if step + 1 == job.get("save_at"):
            checkpoint.save(running, Path(job["folder"]), f"step-{step + 1:08d}", {"step": step + 1}, me)
    running.destroy()
    return {"losses": losses, "norms": norms}


def wrong(job: dict[str, Any], me: ranks.Ranks) -> dict[str, Any]:
    """Training with a gather whose gradient is too large by the number of ranks."""
    right = loss.gather

    def scaled(x_bd: torch.Tensor, me: ranks.Ranks) -> torch.Tensor:
        x_Bd = right(x_bd, me)
        x_Bd.register_hook(lambda grad: grad * me.size)
        return x_Bd

    loss.gather = scaled
    try:
        return train(job, me)
    finally:
        loss.gather = right


def superseded_save(job: dict[str, Any], me: ranks.Ranks) -> dict[str, Any]:
    """Two checkpoints; before the second rank 0 learns that it has been superseded. What each rank caught."""
    running, folder = saved_once(job, me), Path(job["folder"])

    def superseded() -> None:
        raise LongclipError("superseded by attempt 2")

    caught = second_save(running, folder, me, superseded)
    running.destroy()
    return {"caught": caught}


def save_on_full_disk(job: dict[str, Any], me: ranks.Ranks) -> dict[str, Any]:
    """Two checkpoints; the disk has room for half of the second. Then there is room again. What each rank caught."""
    running, folder = saved_once(job, me), Path(job["folder"])
    ballast = folder.parent / "ballast"
    if me.rank == 0:
        size = sum(file.stat().st_blocks * 512 for file in folder.rglob("*"))
        disk = os.statvfs(folder)
        ballast.write_bytes(bytes(disk.f_bavail * disk.f_frsize - size // 2))
    caught = second_save(running, folder, me)
    left = sorted(path.name for path in folder.iterdir())
    if me.rank == 0:
        ballast.unlink()
    checkpoint.save(running, folder, "step-00000002", {"step": 2}, me)
    running.destroy()
    return {"caught": caught, "left": left}


def saved_once(job: dict[str, Any], me: ranks.Ranks) -> Any:
    running = engine.start(TwoTowers(), experiment(job["stage"]), me)
    running.backward(loss.contrastive_loss(*running(*own_part(me, *batch(0))), me))
    engine.step(running)
    checkpoint.save(running, Path(job["folder"]), "step-00000001", {"step": 1}, me)
    return running


def second_save(running: Any, folder: Path, me: ranks.Ranks, fence: Callable[[], None] | None = None) -> list[str]:
    caught = "nothing"
    try:
        checkpoint.save(running, folder, "step-00000002", {"step": 2}, me, fence)
    except LongclipError as error:
        caught = f"{type(error).__name__}: {error}"
    return me.gather(caught)


def other_model(job: dict[str, Any], me: ranks.Ranks) -> dict[str, Any]:
    """Restoring into a model of another shape."""
    running = engine.start(TwoTowers(width=21), experiment(job["stage"]), me)
    try:
        checkpoint.restore(running, Path(job["restore"]), me)
    except LongclipError as error:
        return {"error": str(error)}
    finally:
        running.destroy()
    return {"error": None}


def diverge(job: dict[str, Any], me: ranks.Ranks) -> dict[str, Any]:
    """The gradient norm of a step whose loss is not a number."""
    running = engine.start(TwoTowers(), experiment(job["stage"]), me)
    image, text, scale = running(*own_part(me, *batch(0)))
    running.backward(loss.contrastive_loss(image * float("nan"), text, scale, me))
    norm = engine.step(running)
    running.destroy()
    return {"finite": math.isfinite(norm)}


def talk(job: dict[str, Any], me: ranks.Ranks) -> dict[str, Any]:
    """What the ranks agree on."""
    last = me.rank == me.size - 1
    return {
        "sums": me.sum_across([1.0, me.rank + 0.5]),
        "any": [me.agree(last), me.agree(False)],
        "told": me.tell({"from": me.rank}),
    }


def run_rank(rank: int, group: dict[str, Any]) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(group["ranks"]), LOCAL_RANK=str(rank))
    me = ranks.start(f"file://{group['results']}.meet")
    results = [globals()[job["do"]](job, me) for job in group["jobs"]]
    if rank == 0:
        Path(group["results"]).write_text(json.dumps(results))
    ranks.stop()


def run_group(group: dict[str, Any]) -> None:
    """Fork the ranks and wait; one that fails makes the others fail too, through their broken connections."""
    children = []
    for rank in range(group["ranks"]):
        child = os.fork()
        if child == 0:
            code = 1
            try:
                run_rank(rank, group)
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(code)
        children.append(child)
    codes = [os.waitpid(child, 0)[1] for child in children]
    if any(codes):
        sys.exit(f"a rank of {group} failed")


if __name__ == "__main__":
    os.environ["DS_ACCELERATOR"] = "cpu"
    torch.set_num_threads(1)
    for slow_import in (  # what torch and DeepSpeed import at the first step of each stage
        "deepspeed",
        "torch._dynamo",
        "torch._inductor.compile_fx",
        "deepspeed.runtime.zero.muon.muon_optimizer",
        "deepspeed.runtime.superoffload.superoffload_stage3",
    ):
        importlib.import_module(slow_import)
    for asked_group in json.loads(Path(sys.argv[1]).read_text()):
        run_group(asked_group)
