"""What a tower wants to see, for tests."""

from __future__ import annotations

from longclip.model.towers import Pixels


def form(size: int, whole: bool = False, resample: str = "bicubic") -> Pixels:
    return Pixels(size, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), whole, resample)
