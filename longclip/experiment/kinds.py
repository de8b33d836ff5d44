"""The kinds of towers that are known, and how far a text tower's positions go: facts that need no torch.

The schema asks them of a configuration in the experiment file, submit of a tower's ``config.json``, so that a tower
that cannot do what is asked costs no place in the queue.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

IMAGE = ("clip_vision_model", "siglip_vision_model", "vit")


@dataclass(frozen=True)
class Text:
    """One kind of text tower."""

    positions: int
    """transformers' default of ``max_position_embeddings``"""
    rotary: bool = False
    causal: bool = False
    padding_first: bool = False
    """RoBERTa's: a token's row in the table is its position + pad_token_id + 1"""


TEXT = {
    "modernbert": Text(8192, rotary=True),
    "bert": Text(512),
    "roberta": Text(512, padding_first=True),
    "xlm-roberta": Text(512, padding_first=True),
    "clip_text_model": Text(77, causal=True),
}

_PARTS = {
    "image": {"clip": ("vision_config", "clip_vision_model"), "siglip": ("vision_config", "siglip_vision_model")},
    "text": {"clip": ("text_config", "clip_text_model")},
}
"""Checkpoints of both towers: where the configuration of one of them stands, and its kind"""

KEEP = 20
"""positions that Long-CLIP keeps as they are (arXiv 2403.15378)"""


def part(config: Mapping[str, Any], side: str) -> dict[str, Any]:
    """The configuration of one tower; ``side`` is image or text. One of both towers (``clip``) is opened."""
    key, kind = _PARTS[side].get(str(config.get("model_type")), (None, None))
    return dict(config) if key is None else {**(config.get(key) or {}), "model_type": kind}


def known(side: str) -> tuple[str, ...]:
    """What ``model_type`` may be in a checkpoint's config.json."""
    return (*(IMAGE if side == "image" else TEXT), *_PARTS[side])


def offset(config: Mapping[str, Any]) -> int:
    """Rows of the table of positions before that of the first token."""
    pad = config.get("pad_token_id")
    return (1 if pad is None else int(pad)) + 1 if TEXT[config["model_type"]].padding_first else 0


def reach(config: Mapping[str, Any]) -> int:
    """The longest caption that a text tower takes, in tokens."""
    table = config.get("max_position_embeddings")
    return (table if isinstance(table, int) else TEXT[config["model_type"]].positions) - offset(config)


def too_short(config: Mapping[str, Any], window: int, extension: str | None, keep: int) -> str | None:
    """Why ``window`` tokens do not fit a text tower, and what would do; None where they fit.

    ``extension`` and ``keep`` are ``model.text.positions`` and ``model.text.keep``.
    """
    far, rotary = reach(config), TEXT[config["model_type"]].rotary
    if window <= far or extension == "interpolate" or (extension == "stretch" and not rotary and keep <= far - 2):
        return None
    if extension == "stretch" and not rotary:
        return f"is {window}: of {far} positions, {keep} kept leave none to stretch; model.text.keep: at most {far - 2}"
    count = f"is {window}, but the text tower has {far} positions (max_position_embeddings); at most {far}"
    if rotary:
        return f"{count}, or model.text.positions: interpolate (its positions are rotary: none to keep or stretch)"
    return f"{count}, or model.text.positions: stretch (keeps the first {KEEP}) or interpolate"


def image_pool(kind: str, pool: str) -> str | None:
    """Why an image tower cannot be pooled so; None where it can."""
    if kind.startswith("siglip"):
        return "is cls, but SigLIP has no class token; valid: map (its own attention), mean" if pool == "cls" else None
    return f"is map, which is SigLIP's attention; valid for {kind}: cls, mean" if pool == "map" else None


def text_pool(kind: str, pool: str) -> str | None:
    """Why a text tower cannot be pooled so; None where it can."""
    if TEXT[kind].causal and pool == "cls":
        return "is cls, but in a causal tower the first token sees itself only; valid: last (end of text), mean"
    return None
