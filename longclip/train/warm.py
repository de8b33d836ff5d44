"""A run's first weights from those of another model with the same towers, its positions carried on to the window."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from longclip.errors import UserError
from longclip.experiment import kinds
from longclip.experiment.schema import Init, Model
from longclip.model.clip import DualEncoder
from longclip.model.window import extended, position_table
from longclip.run import lineage
from longclip.run.folder import RunFolder, read_json, write_json
from longclip.train import checkpoint
from longclip.train.ranks import Ranks


def start(model: DualEncoder, spec: Model, init: Init, folder: Path, run: RunFolder, ranks: Ranks) -> None:
    """Sets the weights that ``init`` means into ``model``; ``folder`` is where submit found them. Collective.

    Rank 0 verifies them and writes the lineage into the run's folder. An attempt before this one that left no
    checkpoint has written it already: then they have to be the same. Raises LongclipError on all ranks.
    """
    weights, record = checkpoint.read_origin(folder, init.source, ranks)
    pinned = run.identity()[lineage.KEY]
    if "run" not in record and record["sha256"] != pinned:
        raise UserError(
            f"{lineage.KEY}: {folder} does not hold the weights that this run was made for "
            f"(content {record['sha256'][:12]}, the run's is {pinned[:12]})",
            "longclip submit: other weights are another run",
        )
    file = run.path / lineage.ORIGIN
    first = checkpoint.on_rank_0(ranks, file, lambda: read_json(file)["sha256"] if file.is_file() else None)
    if first not in (None, record["sha256"]):
        raise UserError(
            f"{lineage.KEY}: those in {folder} are not the weights that this run began with "
            f"(content {record['sha256'][:12]}, at first {first[:12]}, see {file})",
            "put the first ones back, or submit it under other --runs to begin with these",
        )
    load(model, weights, spec, init.source)
    if ranks.rank == 0:
        write_json(file, record)
        print(f"begins with {lineage.line(record)}", flush=True)


@torch.no_grad()
def load(model: DualEncoder, weights: Mapping[str, Tensor], spec: Model, name: str) -> None:
    """Copies ``weights`` (fp32, by parameter name) into ``model``; a shorter table of positions is extended.

    Raises UserError where a parameter is missing, left over, or of another shape.
    """
    own = dict(model.named_parameters())
    trunk = model.text.trunk
    rotary = kinds.TEXT[trunk.config.model_type].rotary
    table = None if rotary else position_table(trunk).weight
    differing = sorted(set(own) ^ set(weights))
    for key in own.keys() & weights.keys():
        parameter, weight = own[key], weights[key]
        if parameter is table and len(weight) < len(table):
            first = model.text.offset
            theirs, ours = len(weight) - first, len(table) - first
            if spec.text.positions is None:
                raise UserError(
                    f"{lineage.KEY}: {name} has {theirs} text positions, this model {ours}",
                    "model.text.positions: stretch or interpolate",
                )
            weight = extended(weight, ours, spec.text, first)
        if parameter.shape != weight.shape:
            differing.append(f"{key} {list(weight.shape)} there, {list(parameter.shape)} here")
        else:
            parameter.copy_(weight)
    if differing:
        raise UserError(
            f"{lineage.KEY}: {name} is of another model, {len(differing)} parameters differ: {'; '.join(differing[:3])}"
        )
