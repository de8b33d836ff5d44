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
import signal
import sys
import traceback
import weakref
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from longclip.data.loader import Reader
from longclip.data.shards import open_dataset
from longclip.data.text import Text
from longclip.data.tokens import Tokenizer
from longclip.errors import LongclipError
from longclip.evaluate.embed import Embedder
from longclip.evaluate.gallery import open_gallery
from longclip.evaluate.pairs import retrieve
from longclip.evaluate.ranking import both_ways, retrieval
from longclip.evaluate.retrieval import evaluate
from longclip.evaluate.suite import Retrieval
from longclip.launch import direct
from longclip.launch.site import Site
from longclip.model.clip import as_bf16, build
from longclip.model.compiled import compile_layers
from longclip.model.towers import Pixels
from longclip.run.attempts import Attempt, attempts_of, claim
from longclip.run.checkpoints import published, state_of
from longclip.run.folder import RunFolder, read_json
from longclip.run.journal import effective
from longclip.train import cached, checkpoint, engine, loop, loss, masters, ranks
from tests.train import small_clip
from tests.train.two_towers import STEPS, TwoTowers, batch, experiment, pushed, valid_mask, whole_loss


def own_part(me: ranks.Ranks, *tensors: torch.Tensor) -> list[torch.Tensor]:
    return [tensor.chunk(me.size)[me.rank] for tensor in tensors]


def train(job: dict[str, Any], me: ranks.Ranks) -> dict[str, Any]:
    """Steps on this rank's part of each global batch, from the start or from a checkpoint."""
    asked = experiment(job["stage"], job.get("precision", "fp32"))
    near_bound = bool(job.get("near_bound"))
    running = engine.start(TwoTowers(scale=95.0) if near_bound else TwoTowers(), asked, me)
    first = checkpoint.restore(running, Path(job["restore"]), me)["step"] if "restore" in job else 0
    losses, norms, scales = [], [], []
    for step in range(first, job.get("last", STEPS)):
        pixels, tokens, valid = own_part(me, *batch(step), valid_mask(step))
        if asked.train.precision == "bf16":
            pixels = pixels.bfloat16()
        image, text, scale = running(pixels, tokens)
        local = loss.contrastive_loss(image, text, scale, me, valid if job.get("masked") else None)
        if near_bound:
            local = pushed(local, scale, step)
        running.backward(local)
        engine.set_lr(running, engine.learning_rate(asked.train, step, STEPS))
        norms.append(engine.step(running))
        engine.bound_scale(running, scale.item())
        scales.append(masters.weight(running, running.module.log_scale).exp().item())
        losses.append(me.sum_across([local.item()])[0] / me.size)
        if step + 1 == job.get("save_at"):
            checkpoint.save(running, Path(job["folder"]), f"step-{step + 1:08d}", {"step": step + 1}, me)
    running.destroy()
    return {"losses": losses, "norms": norms, "scales": scales}


def clip(job: dict[str, Any], me: ranks.Ranks) -> dict[str, Any]:
    """Steps of a real dual encoder as the training loop takes them."""
    asked = small_clip.experiment(job)
    running = started(asked, me)
    first = checkpoint.restore(running, Path(job["restore"]), me)["step"] if "restore" in job else 0
    losses, norms = [], []
    for step in range(first, small_clip.STEPS):
        own, _, norm = loop.take_step(running, small_clip.part(step, me.rank, me.size), asked.train.loss, me)
        losses.append(me.sum_across([own])[0] / me.size)
        norms.append(norm)
        if step + 1 == job.get("save_at"):
            checkpoint.save(running, Path(job["folder"]), f"step-{step + 1:08d}", {"step": step + 1}, me)
    running.destroy()
    return {"losses": losses, "norms": norms}


def started(asked: Any, me: ranks.Ranks) -> Any:
    model = build(asked.model, asked.train.seed, asked.engine.activation_checkpointing, asked.train.loss)
    if asked.engine.compile:
        compile_layers(model)
    return engine.start(model, asked, me)


def dropout(job: dict[str, Any], me: ranks.Ranks) -> dict[str, Any]:
    """A two-pass step with dropout, and the same draws of all ranks with every graph kept; largest difference."""
    from deepspeed.utils import safe_get_full_grad

    asked = small_clip.experiment({**job, "dropout": True})
    running = started(asked, me)
    running.train()
    count = running.gradient_accumulation_steps()
    torch.manual_seed(100 + me.rank)
    part = small_clip.part(0, me.rank, me.size)
    value, _ = cached.backward(running, part, loss.contrastive_loss, count, me)
    gradients = {name: safe_get_full_grad(p) for name, p in running.module.named_parameters()}

    whole = build(asked.model, asked.train.seed).train()
    if asked.engine.compile:  # its draws are others
        compile_layers(whole)
    outputs = []
    for rank in range(me.size):
        torch.manual_seed(100 + rank)
        _, micros = cached.deal(small_clip.part(0, rank, me.size), count)
        outputs += [whole(micro.images(me.device), micro.text) for micro in micros]
    image, text, scale = zip(*outputs, strict=True)
    expected = whole_loss("contrastive", torch.cat(image), torch.cat(text), scale[0])
    expected.backward()
    wrong_by = max(float((gradients[name].float() - p.grad).norm() / p.grad.norm()) for name, p in named_grads(whole))
    engine.step(running)
    running.destroy()
    return {
        "loss": me.sum_across([value.item()])[0] / me.size,
        "expected": expected.item(),
        "gradients": wrong_by,
    }


def named_grads(model: torch.nn.Module) -> list[tuple[str, Any]]:
    """Parameters whose gradient is more than the rounding of a zero (a key's bias has none)."""
    named = [(name, p) for name, p in model.named_parameters() if p.grad is not None]
    largest = max(float(p.grad.norm()) for _, p in named)
    return [(name, p) for name, p in named if p.grad.norm() > 1e-5 * largest]


def score(job: dict[str, Any], me: ranks.Ranks) -> dict[str, Any]:
    """Retrieval by the engine of all ranks, and by one model that sees all pairs at once; both ways of scoring, in
    turn, so that the towers are called together, then apart, then together."""
    asked = small_clip.experiment(job)
    half = (0.5, 0.5, 0.5)
    reader = Reader(open_dataset(job["data"]), Tokenizer(job["tokenizer"], 48), Pixels(16, half, half), Text("txt"))
    running = started(asked, me)
    signal.alarm(60)  # ranks that wait for each other are ended
    gallery = open_gallery(job["data"], "txt")
    asked_of = Retrieval.model_validate({"kind": "retrieval", "data": "x", "windows": [9], "probes": ["first"]})

    def towers_apart(called: Any, module: torch.nn.Module, who: ranks.Ranks) -> dict[str, Any]:
        embedder = Embedder(called, module, reader.tokenizer, reader.pixels, who, job["batch"])
        return retrieve(embedder, asked_of, gallery).facts

    apart = towers_apart(running, running.module, me)
    scores = [evaluate(running, running.module, reader, job["batch"], me, first=first).facts for first in job["first"]]
    apart_again = towers_apart(running, running.module, me)
    signal.alarm(0)
    running.destroy()
    model, expected = build(asked.model, asked.train.seed).eval(), []
    alone = towers_apart(model, model, ranks.Ranks(0, 1, 0, me.device))
    for first in job["first"]:
        whole = reader.batch([(0, i) for i in range(first)], [None] * first)
        with torch.no_grad():
            image, text, _ = model(whole.images(me.device), whole.text)
        expected.append(
            retrieval(*both_ways(image[whole.valid], text[whole.valid], ranks.Ranks(0, 1, 0, me.device)))
            | {"pairs": int(whole.valid.sum())}
        )
    return {"scores": scores, "expected": expected, "apart": [apart, apart_again], "alone": alone}


def in_bf16(job: dict[str, Any], me: ranks.Ranks) -> dict[str, Any]:
    """Largest difference between the features of the engine and those of the model that ``evaluate`` makes of it."""
    asked = small_clip.experiment(job)
    running, model = started(asked, me), as_bf16(build(asked.model, asked.train.seed)).eval()
    running.eval()
    part = small_clip.part(0, me.rank, me.size)
    with torch.no_grad():
        pictures = part.images(me.device).bfloat16()
        pairs = list(zip(running(pictures, part.text)[:2], model(pictures, part.text)[:2], strict=True))
    running.destroy()
    return {"by": [float((ours - theirs).abs().max()) for ours, theirs in pairs]}


def memory(job: dict[str, Any], me: ranks.Ranks) -> dict[str, Any]:
    """The most bytes that a step's graph held at a time."""
    asked = small_clip.experiment(job)
    running = started(asked, me)
    alive, peak = {"bytes": 0}, {"bytes": 0}

    def lose(size: int) -> None:
        alive["bytes"] -= size

    class Held:
        def __init__(self, tensor: torch.Tensor) -> None:
            self.tensor = tensor
            size = tensor.numel() * tensor.element_size()
            alive["bytes"] += size
            peak["bytes"] = max(peak["bytes"], alive["bytes"])
            weakref.finalize(self, lose, size)

    with torch.autograd.graph.saved_tensors_hooks(Held, lambda held: held.tensor):
        loop.take_step(running, small_clip.part(0, me.rank, me.size), asked.train.loss, me)
    running.destroy()
    return peak


def wrong(job: dict[str, Any], me: ranks.Ranks) -> dict[str, Any]:
    """Training with an exchange of gradients whose result is too large by the number of ranks."""
    right = loss.own_rows
    loss.own_rows = lambda x_Bd, me: right(x_Bd, me) * me.size
    try:
        return train(job, me)
    finally:
        loss.own_rows = right


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


def interrupted(job: dict[str, Any], me: ranks.Ranks) -> dict[str, Any]:
    """A run by the attempts that its stops make: its curves, its verdicts, what the validations said of each state.

    A stop is ``["step", n]``, the n-th time that the last rank asks whether to stop after a step of the attempt, or
    ``["validation 2", n]``, the n-th time within its second validation. None is an attempt that is left in peace.
    """
    run = RunFolder(Path())
    verdicts, validated = [], loop.evaluate
    for stop in job["stops"]:
        told = None
        if me.rank == 0:
            site = Site(name="test", runs=Path(job["runs"]))
            told = direct._record(Path(job["file"]), [f"engine.zero_stage={job['stage']}"], site)
        path, number = me.tell(told)
        run = RunFolder(Path(path))
        if me.rank == 0:
            claim(run, number, "1", {"ranks": me.size})
        me.agree(False)
        attempt = Attempt(run.attempts / f"{number:04d}")
        asked: Counter[str] = Counter()
        places = ["step"]

        def should_stop() -> bool:
            asked[places[-1]] += 1  # noqa: B023
            return me.rank == me.size - 1 and [places[-1], asked[places[-1]]] == stop  # noqa: B023

        def evaluate_and_tell(*args: Any) -> Any:
            asked["validations"] += 1  # noqa: B023
            places.append(f"validation {asked['validations']}")  # noqa: B023
            try:
                return validated(*args)
            finally:
                places.pop()  # noqa: B023

        loop.evaluate = evaluate_and_tell
        whole = loop.Job(run, attempt, run.experiment(), (attempt.submitted or {})["paths"])
        verdicts.append(loop.train(whole, me, should_stop))
        loop.evaluate = validated
        if me.rank == 0:
            attempt.end(verdicts[-1], 0)
        me.agree(False)
    curves: dict[str, list[tuple[int, float]]] = {}
    for point in effective(run):
        for name, value in point.metrics.items():
            curves.setdefault(name, []).append((point.samples, value))
    state = state_of(published(run.checkpoints)[-1])
    return {
        "verdicts": verdicts,
        "curves": {name: points for name, points in curves.items() if name.startswith(("train/", "val/", "text/tok"))},
        "resumed": [attempt.resumed_at for attempt in attempts_of(run)],
        "best": state["best"],
        "due": state.get("validation_due"),
        "test": read_json(run.evaluations / "test.json")["metrics"],
    }


def held(job: dict[str, Any], me: ranks.Ranks) -> dict[str, Any]:
    """Whether the engine that saved a checkpoint computes what one computes that has restored it, to the last bit."""
    asked = experiment(job["stage"], job["precision"])
    running = engine.start(TwoTowers(), asked, me)
    pixels, tokens = own_part(me, *batch(0))
    pixels = pixels.bfloat16() if asked.train.precision == "bf16" else pixels
    for _ in range(3):
        running.backward(loss.contrastive_loss(*running(pixels, tokens), me))
        engine.step(running)
    checkpoint.save(running, Path(job["folder"]), "step-00000003", {"step": 3}, me)

    def features() -> list[torch.Tensor]:
        running.eval()
        with torch.no_grad():
            return [side.clone() for side in running(pixels, tokens)]

    before = features()
    checkpoint.restore(running, Path(job["folder"]) / "step-00000003", me)
    same = all(map(torch.equal, before, features()))
    running.destroy()
    return {"same": not me.agree(not same)}


def timeouts(job: dict[str, Any], me: ranks.Ranks) -> dict[str, Any]:
    """Seconds after which torch gives up on a collective, in each process group that an engine brought along."""
    from torch.distributed import distributed_c10d as c10d

    running = engine.start(TwoTowers(), experiment(job["stage"]), me)
    running.backward(loss.contrastive_loss(*running(*own_part(me, *batch(0))), me))
    engine.step(running)
    groups = {**c10d._world.pg_names, running.data_parallel_group: "the engine's"}
    seconds = {
        name: group._get_backend(me.device).options._timeout.total_seconds()  # type: ignore[attr-defined]
        for group, name in groups.items()
    }
    running.destroy()
    return seconds


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
