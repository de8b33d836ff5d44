"""Longer windows: the positions of a text tower, carried on beyond where they end.

Learned positions are a table, and a longer table is made of it. Rotary ones are a formula: the angle of position p
becomes that of p * P / W, so that W positions turn as far as P did (arXiv 2306.15595).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from longclip.errors import UserError
from longclip.experiment import kinds
from longclip.experiment.schema import TextTower


def stretch(table_PD: Tensor, window: int, keep: int) -> Tensor:
    """Long-CLIP's stretch (arXiv 2403.15378): the first ``keep`` positions as they are, the others drawn out evenly.

    Position ``keep + j`` of the new table [window, D] lies at ``keep + j * (P - keep) / (window - keep)`` of the old
    one [P, D], on the straight line between its neighbours; past the last, on the line through the last two. At 248
    of CLIP's 77 that is the published table (248 = 20 + 57 * 4).
    """
    at = torch.arange(window - keep, dtype=torch.float64, device=table_PD.device)
    return torch.cat([table_PD[:keep], _lines(table_PD, keep + at * (len(table_PD) - keep) / (window - keep))])


def interpolate(table_PD: Tensor, window: int) -> Tensor:
    """Every position drawn out evenly: first and last [P, D] stay first and last [window, D], lines between."""
    at = torch.arange(window, dtype=torch.float64, device=table_PD.device)
    return _lines(table_PD, at * (len(table_PD) - 1) / (window - 1))


def _lines(table_PD: Tensor, at_W: Tensor) -> Tensor:
    """The table read at places between its rows, in fp64; places past the last row continue the last line."""
    below_W = at_W.floor().clamp(0, len(table_PD) - 2).long()
    share_W1 = (at_W - below_W)[:, None]
    table = table_PD.double()
    return ((1 - share_W1) * table[below_W] + share_W1 * table[below_W + 1]).to(table_PD.dtype)


def extended(table_PD: Tensor, window: int, spec: TextTower, first: int = 0) -> Tensor:
    """A table of positions carried on to ``window``, as ``spec`` asks; ``first`` rows before position 0 stay."""
    own, rest = table_PD[:first], table_PD[first:]
    new = stretch(rest, window, spec.keep) if spec.positions == "stretch" else interpolate(rest, window)
    return torch.cat([own, new])


@torch.no_grad()
def extend(trunk: PreTrainedModel, spec: TextTower, window: int) -> None:
    """Lets a text tower take captions of ``window`` tokens, in place; one that does already stays as it is.

    Raises UserError where it cannot, with how far it goes and what to do.
    """
    config = trunk.config
    facts = config.to_dict()
    if why := kinds.too_short(facts, window, spec.positions, spec.keep):
        raise UserError(f"model.context_length: {why}")
    reach = kinds.reach(facts)
    if window <= reach:
        return
    first = kinds.offset(facts)
    if kinds.TEXT[config.model_type].rotary:
        rope = config.rope_parameters["full_attention"]
        if rope["rope_type"] != "default":
            raise UserError(f"model.text.positions: the tower's are scaled already ({rope['rope_type']})")
        # Local layers compare neighbours only, at distances that the window does not change.
        config.rope_parameters["full_attention"] = {**rope, "rope_type": "linear", "factor": window / reach}
        config.max_position_embeddings = window
        trunk.rotary_emb = type(trunk.rotary_emb)(config)
        return
    table = position_table(trunk)
    weight = extended(table.weight, window, spec, first)
    table.weight = nn.Parameter(weight, requires_grad=table.weight.requires_grad)
    table.num_embeddings = config.max_position_embeddings = len(weight)
    rows = trunk.embeddings
    rows.position_ids = torch.arange(len(weight), device=weight.device)[None]
    if hasattr(rows, "token_type_ids"):
        rows.token_type_ids = torch.zeros_like(rows.position_ids)


def position_table(trunk: PreTrainedModel) -> nn.Embedding:
    """The table of learned positions: BERT's or CLIP's."""
    rows = trunk.embeddings
    table: nn.Embedding = rows.position_embedding if hasattr(rows, "position_embedding") else rows.position_embeddings
    return table
