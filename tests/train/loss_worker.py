"""The loss on groups of ranks: ``python loss_worker.py FOLDER`` computes the cases of ``FOLDER/cases.json``.

Every group of ranks computes every case, and writes ``FOLDER/<ranks>.json``.
"""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from longclip.train import loss
from longclip.train.ranks import Ranks
from tests.forked import fork_ranks
from tests.train.two_towers import whole_loss


def both(job: dict[str, Any], me: Ranks) -> dict[str, Any]:
    """The loss in tiles and its gradients, and both computed whole in double precision; largest differences."""
    b, d = job["pairs"] // me.size, 11
    drawn = torch.Generator().manual_seed(job.get("seed", 0))
    image_Bd, text_Bd = (functional.normalize(torch.randn(2, b * me.size, d, generator=drawn), dim=-1)).unbind()
    text_Bd = functional.normalize(text_Bd + job.get("alike", 0.0) * image_Bd, dim=-1)
    numbers = [torch.tensor([job["scale"]]), *([torch.tensor([-4.0])] if job["kind"] == "sigmoid" else [])]
    valid_B = torch.tensor(job["valid"]) if "valid" in job else torch.ones(b * me.size, dtype=torch.bool)
    whole = [x.double().requires_grad_() for x in (image_Bd, text_Bd, *numbers)]
    expected = whole_loss(job["kind"], *(x[valid_B] for x in whole[:2]), *whole[2:])
    expected.backward()
    mine = [x.chunk(me.size)[me.rank].clone().requires_grad_() for x in (image_Bd, text_Bd)]
    mine += [number.clone().requires_grad_() for number in numbers]
    tile, loss.TILE = loss.TILE, job.get("tile", loss.TILE)
    try:
        valid_b = valid_B.chunk(me.size)[me.rank] if "valid" in job else None
        value = loss.LOSSES[job["kind"]](*mine, me, valid_b)
        (3 * value).backward()
    finally:
        loss.TILE = tile
    # What a rank holds is the sum over ranks for features, and its own part for numbers; ZeRO divides both.
    right = [x.grad.chunk(me.size)[me.rank] for x in whole[:2]]
    wrong_by = [float((x.grad.double() / 3 / me.size - y).abs().max()) for x, y in zip(mine[:2], right, strict=True)]
    for number, whole_number in zip(mine[2:], whole[2:], strict=True):
        wrong_by.append(abs(me.sum_across([number.grad.item()])[0] / 3 / me.size - whole_number.grad.item()))
    largest = max(float(x.grad.abs().max()) for x in whole)
    return {
        "loss": me.sum_across([value.item()])[0] / me.size,
        "expected": expected.item(),
        "gradients": max(me.sum_across([max(wrong_by)])) / max(largest, 1e-9),
    }


def compute(folder: Path, cases: dict[str, Any], me: Ranks) -> None:
    results = {label: both(case, me) for label, case in cases.items()}
    if me.rank == 0:
        (folder / f"{me.size}.json").write_text(json.dumps(results))


if __name__ == "__main__":
    torch.set_num_threads(1)
    here = Path(sys.argv[1])
    asked = json.loads((here / "cases.json").read_text())
    for size in asked["ranks"]:
        codes = fork_ranks(here / f"meet-{size}", ["node"] * size, partial(compute, here, asked["cases"]))
        if any(codes):
            sys.exit(f"a rank of {size} failed: {codes}")
