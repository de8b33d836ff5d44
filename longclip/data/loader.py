"""From positions to a rank's batch: read, decode, crop, tokenize.

A batch belongs to a step, a step to positions, and every draw for a sample to (seed, epoch, sample); worker processes
only do the work. Which rank takes which samples of a global batch goes by the length of their texts. Pixels travel as
bytes and are normalised where they are used. A sample that cannot be decoded keeps its place and is masked; a disk that
cannot be read is tried again, then fails.
"""

from __future__ import annotations

import atexit
import multiprocessing
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from longclip.data.decode import square
from longclip.data.order import Draw, Mixture, Order
from longclip.data.shards import Dataset, Sample
from longclip.data.sources import Sources
from longclip.data.text import Text
from longclip.data.tokens import Tokenizer
from longclip.model.packing import Packed, pack
from longclip.model.towers import Pixels

T = TypeVar("T")

RETRIES = 3
"""times that a failed read is tried again before the attempt fails; the wait doubles from one second"""

AHEAD = 4
"""batches that each worker process of a loader holds ready, in shared memory"""


@dataclass(frozen=True)
class Batch:
    """One rank's part of a global batch."""

    pixels: Tensor
    """[b, size, size, 3] uint8, RGB"""
    form: Pixels
    """how the tower wants them normalised"""
    text: Packed
    valid: Tensor
    """[b] bool; False where the sample could not be used"""
    bad: tuple[str, ...]
    """keys of those, with the reason"""
    tokens: int
    """tokens that the tower sees"""
    tokens_cut: int
    """tokens that the window cut off"""
    full: tuple[int, ...] = ()
    """length of each caption in tokens, before it was cut"""

    def images(self, device: torch.device) -> Tensor:
        """[b, 3, size, size] fp32 on ``device``, normalised; the channels lie innermost in memory."""
        return normalised(self.pixels, self.form, device)


def normalised(pixels: Tensor, form: Pixels, device: torch.device) -> Tensor:
    """[b, size, size, 3] uint8 as [b, 3, size, size] fp32 on ``device``; the channels lie innermost in memory."""
    b, height, width, channels = pixels.shape
    rows = pixels.to(device).view(b, height, width * channels)
    # Laid out as a row of pixels, so that the innermost loop is long.
    # (x / 255 - mean) / std as one product and one sum, which takes a third of the time
    gain = torch.tensor([1 / (255 * std) for std in form.std], device=device).repeat(width)
    shift = torch.tensor([-mean / std for mean, std in zip(form.mean, form.std, strict=True)], device=device)
    shift = shift.repeat(width)
    on_cpu = device.type == "cpu"
    # numpy asks the kernel for huge pages, torch does not: most of the time would go into taking 4 KiB at a time.
    out = torch.from_numpy(np.empty(rows.shape, np.float32)) if on_cpu else torch.empty(rows.shape, device=device)
    # On a CPU one image at a time, which its cache holds through both passes.
    step = 1 if on_cpu else max(1, b)
    for image, normal in zip(torch.split(rows, step), torch.split(out, step), strict=True):
        torch.addcmul(shift, normal.copy_(image), gain, out=normal)
    return out.view(b, height, width, channels).permute(0, 3, 1, 2)


@dataclass(frozen=True)
class Reader:
    """Turns samples into batches. Picklable, so that loader workers can hold it."""

    dataset: Dataset | Sources
    tokenizer: Tokenizer
    pixels: Pixels
    text: Text

    def batch(
        self,
        places: Sequence[tuple[int, int]],
        draws: Sequence[Draw | None],
        crop: tuple[float, float] = (1.0, 1.0),
    ) -> Batch:
        """The batch of samples at ``(shard, index)``: without a draw as evaluation sees them, else as training does,
        ``crop`` being the least and largest area of the random crop."""
        images = np.empty((len(places), self.pixels.size, self.pixels.size, 3), dtype=np.uint8)
        texts, bad, valid = [""] * len(places), [], torch.ones(len(places), dtype=torch.bool)
        for i, ((shard, index), draw) in enumerate(zip(places, draws, strict=True)):
            sample = self._read(shard, index)
            try:
                texts[i] = self.text(sample.text, sample.fields, draw)
                drawn = None if draw is None else (*crop, *draw.uniforms(4, "crop").tolist())
                images[i] = square(sample.image, self.pixels, drawn)
            except ValueError as error:
                texts[i], images[i], valid[i] = "", 0, False
                bad.append(f"{sample.key}: {error}")
        ids, lengths = self.tokenizer(texts)
        kept = sum(map(len, ids))
        cut_off = sum(lengths) - kept
        return Batch(torch.from_numpy(images), self.pixels, pack(ids), valid, tuple(bad), kept, cut_off, tuple(lengths))

    def text_bytes(self, places: NDArray[np.int64]) -> NDArray[np.int64]:
        """What the index knows of the length of the texts at ``(shard, index)``, [n, 2]: bytes, fields and all."""
        fields = self.text.names != ("txt",)
        found = np.empty(len(places), dtype=np.int64)
        for shard in np.unique(places[:, 0]).tolist():
            here = places[:, 0] == shard
            found[here] = patiently(partial(self.dataset.text_bytes, shard, places[here, 1], fields))
        return found

    def _read(self, shard: int, index: int) -> Sample:
        return patiently(lambda: self.dataset.read(shard, index))


def patiently(read: Callable[[], T]) -> T:
    """What ``read`` returns; where the disk fails it is asked again, a few times."""
    for wait in range(RETRIES):
        try:
            return read()
        except OSError:
            time.sleep(2.0**wait)
    return read()


class _Steps(TorchDataset[Batch]):
    """Item ``step`` is this rank's batch of that step."""

    def __init__(
        self, reader: Reader, order: Order | Mixture, crop: tuple[float, float], batch: int, rank: int, ranks: int
    ) -> None:
        self.reader, self.order, self.crop, self.seed = reader, order, crop, int(order.seed)
        self.batch, self.rank, self.ranks = batch, rank, ranks

    def __getitem__(self, step: int) -> Batch:
        located = self.order.locate(np.arange(step * self.batch, (step + 1) * self.batch))
        mine = deal(self.reader.text_bytes(located[:, 1:]), self.ranks)[self.rank]
        draws = [Draw(self.seed, epoch, shard, index) for epoch, shard, index in located[mine].tolist()]
        return self.reader.batch([(draw.shard, draw.index) for draw in draws], draws, self.crop)


def deal(lengths: NDArray[np.int64], ranks: int) -> NDArray[np.int64]:
    """Which places of a global batch each rank takes, [ranks, b], ascending; ``ranks`` divides the batch.

    From the shortest text to the longest, to and fro: all ranks wait for the one with the most tokens.
    """
    rows = np.argsort(lengths, kind="stable").reshape(-1, ranks)
    rows[1::2] = rows[1::2, ::-1]
    return np.sort(rows.T, axis=1)


def training_batches(
    reader: Reader,
    order: Order | Mixture,
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
        prefetch_factor=AHEAD if workers else None,
        multiprocessing_context="fork" if workers else None,
        worker_init_fn=_undisturbed if workers else None,
    )
    if workers:
        atexit.register(_end_workers)
    return iter(loader)


def _undisturbed(worker: int) -> None:
    """TERM is for the process that trains, which goes on to the next save; some schedulers and torchrun send it to all
    processes, and to torch a worker that it ends is a crash."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _end_workers() -> None:
    """Those that are left when the interpreter ends: multiprocessing would send them TERM, and wait."""
    for child in multiprocessing.active_children():
        if child.daemon:
            child.kill()


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
