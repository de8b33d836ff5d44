"""Image towers in folders that transformers did not write. No torch: submit reads a tower's shape here, too."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from longclip.model import openclip, timm

if TYPE_CHECKING:
    from torch import Tensor


class Layout(Protocol):
    """A way to save an image tower; each is a module."""

    WEIGHTS: str
    """the file of the weights"""

    def wrote(self, folder: Path) -> bool:
        """Whether the folder is of this layout."""

    def vision_config(self, folder: Path) -> dict[str, Any]:
        """The tower in transformers' words. Raises UserError where it is no plain ViT."""

    def preprocessing(self, folder: Path) -> dict[str, Any]:
        """What the folder says of how the tower was shown its images, by field of
        :class:`longclip.model.towers.Pixels`. Raises UserError where that cannot be done here."""

    def trunk_weights(self, folder: Path) -> dict[str, Tensor]:
        """fp32, under the names of transformers' model. Raises UserError without a safetensors file."""


_LAYOUTS: tuple[Layout, ...] = (openclip, timm)


def layout_of(folder: Path) -> Layout | None:
    """None where the folder is transformers' own, or holds no tower."""
    return next((layout for layout in _LAYOUTS if layout.wrote(folder)), None)
