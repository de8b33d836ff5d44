"""From positions to a rank's batch: read, decode, crop, tokenize.

A batch belongs to a step, a step to positions, and every draw for a sample to (seed, epoch, sample); worker processes
only do the work. A sample that cannot be decoded keeps its place and is masked; a disk that cannot be read is tried
again, then fails.
"""

from __future__ import annotations

import io
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from longclip.data.order import Order, uniforms
from longclip.data.shards import Dataset, Sample
from longclip.data.tokens import Tokenizer
from longclip.model.packing import Packed, pack
from longclip.model.towers import Pixels

RETRIES = 3
"""times that a failed read is tried again before the attempt fails; the wait doubles from one second"""


@dataclass(frozen=True)
class Batch:
    """One rank's part of a global batch."""

    pixels: Tensor
    """[b, 3, size, size], normalised"""
    text: Packed
    valid: Tensor
    """[b] bool; False where the sample could not be used"""
    bad: tuple[str, ...]
    """keys of those, with the reason"""
    tokens: int
    """tokens that the tower sees"""
    tokens_cut: int
    """tokens that the window cut off"""


@dataclass(frozen=True)
class Reader:
    """Turns samples into batches. Picklable, so that loader workers can hold it."""

    dataset: Dataset
    tokenizer: Tokenizer
    pixels: Pixels
    field: str
    """``txt`` or the name of a json field"""

    def batch(self, places: Sequence[tuple[int, int]], crops: Sequence[tuple[float, ...] | None]) -> Batch:
        """The batch of samples at ``(shard, index)``; ``crops[i]`` is ``(scale_low, scale_high, *4 uniforms)``."""
        images = np.zeros((len(places), self.pixels.size, self.pixels.size, 3), dtype=np.uint8)
        texts, bad, valid = [""] * len(places), [], torch.ones(len(places), dtype=torch.bool)
        for i, ((shard, index), crop) in enumerate(zip(places, crops, strict=True)):
            sample = self._read(shard, index)
            try:
                texts[i] = self._text(sample)
                images[i] = square(sample.image, self.pixels.size, crop)
            except ValueError as error:
                texts[i] = ""
                valid[i] = False
                bad.append(f"{sample.key}: {error}")
        ids, lengths = self.tokenizer(texts)
        kept = sum(map(len, ids))
        mean, std = (torch.tensor(x).view(1, 3, 1, 1) for x in (self.pixels.mean, self.pixels.std))
        pixels = (torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255 - mean) / std
        return Batch(pixels, pack(ids), valid, tuple(bad), kept, sum(lengths) - kept)

    def _read(self, shard: int, index: int) -> Sample:
        for wait in range(RETRIES):
            try:
                return self.dataset.read(shard, index)
            except OSError:
                time.sleep(2.0**wait)
        return self.dataset.read(shard, index)

    def _text(self, sample: Sample) -> str:
        text = sample.text if self.field == "txt" else sample.fields.get(self.field)
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"no text in {self.field}")
        return text


def square(data: bytes, size: int, crop: tuple[float, ...] | None) -> NDArray[np.uint8]:
    """A decoded RGB image of ``size`` x ``size`` pixels.

    Without ``crop`` the middle square, as CLIP's evaluation; else a random-resized crop: area drawn from the scale,
    aspect from 3/4 to 4/3 (as torchvision's RandomResizedCrop), clipped to the image.

    Raises:
        ValueError: the bytes are not an image.
    """
    try:
        with Image.open(io.BytesIO(data)) as opened:
            image = opened.convert("RGB")
    except MemoryError:
        raise
    except Exception as error:  # the bytes are in memory, so this is the image's fault; decoders raise nearly anything
        raise ValueError(f"not a readable image ({error})") from None
    width, height = image.size
    if crop is None:
        side = min(width, height)
        box = ((width - side) / 2, (height - side) / 2, (width + side) / 2, (height + side) / 2)
    else:
        low, high, area, aspect, left, top = crop
        ratio = float(np.exp(np.log(4 / 3) * (2 * aspect - 1))) if (low, high) != (1.0, 1.0) else width / height
        pixels = width * height * (low + (high - low) * area)
        w, h = min(width, (pixels * ratio) ** 0.5), min(height, (pixels / ratio) ** 0.5)
        x, y = left * (width - w), top * (height - h)
        box = (x, y, x + w, y + h)
    return np.asarray(image.resize((size, size), Image.Resampling.BICUBIC, box=box))


class _Steps(TorchDataset[Batch]):
    """Item ``step`` is this rank's batch of that step."""

    def __init__(
        self, reader: Reader, order: Order, crop: tuple[float, float], batch: int, rank: int, ranks: int
    ) -> None:
        self.reader, self.order, self.crop = reader, order, crop
        self.batch, self.rank, self.share = batch, rank, batch // ranks

    def __getitem__(self, step: int) -> Batch:
        first = step * self.batch + self.rank * self.share
        places, crops = [], []
        for position in range(first, first + self.share):
            epoch, shard, index = self.order.locate(position)
            draws = uniforms(4, self.order.seed, "crop", epoch, shard, index)
            places.append((shard, index))
            crops.append((*self.crop, *draws.tolist()))
        return self.reader.batch(places, crops)


def training_batches(
    reader: Reader,
    order: Order,
    crop: tuple[float, float],
    batch: int,
    steps: range,
    rank: int,
    ranks: int,
    workers: int,
) -> Iterator[Batch]:
    """This rank's batches of ``steps``; ``batch`` is the global size and divides by ``ranks``."""
    items = _Steps(reader, order, crop, batch, rank, ranks)
    loader: DataLoader[Batch] = DataLoader(
        items,
        batch_size=None,
        sampler=steps,
        num_workers=workers,
        prefetch_factor=4 if workers else None,
        multiprocessing_context="fork" if workers else None,
    )
    return iter(loader)


def evaluation_batches(
    reader: Reader, batch: int, rank: int, ranks: int, first: int | None = None
) -> Iterator[tuple[Batch, int]]:
    """All samples in order (or the ``first`` ones), ``batch`` at a time per rank, with how many of a batch count.

    Every rank yields the same number of batches (ZeRO-3 hangs otherwise); where a rank has run out, a batch of one
    sample that does not count stands in.
    """
    places = [(s, i) for s, size in enumerate(reader.dataset.sizes) for i in range(size)][:first]
    for start in range(0, len(places), batch * ranks):
        mine = places[start + rank * batch : start + (rank + 1) * batch]
        yield reader.batch(mine or places[:1], [None] * max(1, len(mine))), len(mine)
