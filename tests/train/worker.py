"""One rank of a test: ``python worker.py JOBS.json RESULTS.json`` under RANK, WORLD_SIZE, LOCAL_RANK.

Runs a list of jobs, each with an engine of its own, in one process, because importing torch and DeepSpeed takes
longer than any job. Rank 0 writes a list of results: the losses, the gradient norms, or an error.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))
from tiny import TwoTowers, batch, experiment, valid_mask

from longclip.errors import LongclipError
from longclip.train import checkpoint, engine, loss, ranks


def train(job: dict[str, Any], me: ranks.Ranks) -> dict[str, Any]:
    """Steps ``first`` .. ``last`` - 1 on this rank's part of each global batch."""
    asked = experiment(job["stage"], job.get("precision", "fp32"))
    running = engine.start(TwoTowers(), asked, me)
    first = 0
    if "restore" in job:
        first = checkpoint.restore(running, Path(job["restore"]), me)["step"]
    losses, norms = [], []
    for step in range(first, job["last"]):
        pixels, tokens = batch(step)
        own = slice(me.rank * len(pixels) // me.size, (me.rank + 1) * len(pixels) // me.size)
        valid = valid_mask(step)[own] if job.get("masked") else None
        image, text, scale = running(pixels[own].to(running_dtype(running)), tokens[own])
        local = loss.contrastive_loss(image, text, scale, me, valid)
        running.backward(local)
        engine.set_lr(running, engine.learning_rate(asked.train, step, 24))
        norms.append(engine.step(running))
        losses.append(me.sum_across([local.item()])[0] / me.size)
        if step + 1 == job.get("save_at"):
            state = {"step": step + 1, "samples": (step + 1) * len(pixels)}
            checkpoint.save(running, Path(job["folder"]), f"step-{step + 1:08d}", state, me)
    running.destroy()
    return {"losses": losses, "norms": norms}


def running_dtype(running: Any) -> torch.dtype:
    return torch.bfloat16 if running.bfloat16_enabled() else torch.float32


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


def failing_save(job: dict[str, Any], me: ranks.Ranks) -> dict[str, Any]:
    """Two checkpoints of which the second fails on rank 0 as ``how`` says; every rank tells what it caught."""
    running = engine.start(TwoTowers(), experiment(job["stage"]), me)
    pixels, tokens = batch(0)
    own = slice(me.rank * len(pixels) // me.size, (me.rank + 1) * len(pixels) // me.size)
    running.backward(loss.contrastive_loss(*running(pixels[own], tokens[own]), me))
    engine.step(running)
    folder = Path(job["folder"])
    checkpoint.save(running, folder, "step-00000001", {"step": 1}, me)

    def superseded() -> None:
        raise LongclipError("superseded by attempt 2")

    real_write = checkpoint._write

    def full(path: Path, data: bytes) -> Any:
        if path.name == "exp_avg_sq.safetensors":
            path.write_bytes(data[: len(data) // 2])
            raise OSError(28, "No space left on device", str(path))
        return real_write(path, data)

    caught = "nothing"
    try:
        if job["how"] == "full":
            checkpoint._write = full
        fence = superseded if job["how"] == "fence" else None
        checkpoint.save(running, folder, "step-00000002", {"step": 2}, me, fence)
    except LongclipError as error:
        caught = f"{type(error).__name__}: {error}"
    finally:
        checkpoint._write = real_write
    everyone: list[Any] = [None] * me.size
    torch.distributed.all_gather_object(everyone, caught)
    running.destroy()
    return {"caught": everyone}


def other_model(job: dict[str, Any], me: ranks.Ranks) -> dict[str, Any]:
    """Restoring into a model with another shape."""
    running = engine.start(TwoTowers(width=21), experiment(job["stage"]), me)
    try:
        checkpoint.restore(running, Path(job["restore"]), me)
    except LongclipError as error:
        return {"error": str(error)}
    finally:
        running.destroy()
    return {"error": None}


def main() -> None:
    torch.set_num_threads(1)
    me = ranks.start(os.environ.get("MEET"))
    jobs = json.loads(Path(sys.argv[1]).read_text())
    results = [globals()[job["do"]](job, me) for job in jobs]
    if me.rank == 0:
        Path(sys.argv[2]).write_text(json.dumps(results))
    ranks.stop()


if __name__ == "__main__":
    main()
