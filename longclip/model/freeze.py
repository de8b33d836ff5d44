"""Frozen towers: weights that stay as they were at the start."""

from __future__ import annotations

from typing import Literal

from torch import nn
from transformers import PreTrainedModel

from longclip.errors import UserError


def freeze(trunk: PreTrainedModel, layers: int | Literal["all"] | None, key: str) -> None:
    """Take ``trunk`` as a whole, or its lowest ``layers`` and everything below them, out of training.

    ``key`` is what the experiment calls the setting. Raises UserError where the tower has fewer layers.
    """
    if layers is None:
        return
    if layers == "all":
        trunk.requires_grad_(False)
        return
    count = trunk.config.num_hidden_layers
    if layers > count:
        raise UserError(f"{key} is {layers}, but the tower has {count} layers; at most {count}, or all")
    stack = next(m for m in trunk.modules() if isinstance(m, nn.ModuleList) and len(m) == count)
    highest = set(stack[layers - 1].parameters())
    parameters = list(trunk.parameters())  # in the order of the forward pass: embeddings, layers, last norm
    last = max(place for place, parameter in enumerate(parameters) if parameter in highest)
    for parameter in parameters[: last + 1]:
        parameter.requires_grad_(False)
