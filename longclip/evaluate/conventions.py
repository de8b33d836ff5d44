"""Conventions of Recall@K, by name and in words; a figure without its convention says little. How each is counted is in
ranking.py."""

from __future__ import annotations

from typing import Literal, get_args

Convention = Literal["strict", "open_clip", "clip_benchmark"]
CONVENTIONS: tuple[Convention, ...] = get_args(Convention)
SAYS: dict[Convention, str] = {
    "strict": "ties = misses",
    "open_clip": "open_clip's convention: an image's first caption, ties by index",
    "clip_benchmark": "CLIP_benchmark's convention: any caption of an image, ties by index",
}
