"""How fast training data is read: python tools/bench/loader.py [--samples N] [--workers N]

Ways through the same shards of 640x480 JPEGs to batches of 224 px, normalised fp32, with tokenized captions:

- longclip: the training loader as a run on CPUs uses it, whose main process normalises;
- longclip, for a GPU: the same up to the bytes that a run on GPUs sends there, where they are normalised;
- webdataset: webdataset's own pipeline, with longclip's decode, crop, tokenizer and normalisation;
- open_clip's recipe: webdataset, Pillow's full decode, RandomResizedCrop (bicubic), ToTensor, Normalize, each sample
  by itself, as its README describes training on WebDataset shards.

Each way reads all samples once, worker processes being started within the time; the ways take turns, and medians over
the repeats are compared. The main process computes on one thread, as a rank of one CPU does: more would spin against
the workers, in every way. Everything lies in the page cache, and nothing is shuffled in the webdataset pipelines: their
best case. Then the first batch of a run that resumes, from a virtual index: one shard, linked under many names.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import os
import platform
import statistics
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from PIL import __version__ as pillow
from torch import Tensor
from torch.utils.data import DataLoader

from longclip.data.decode import square
from longclip.data.index import index_folder
from longclip.data.loader import Batch, Reader, training_batches
from longclip.data.order import Mixture, uniforms
from longclip.data.shards import Index, Sample, open_dataset, write_shard
from longclip.data.synthetic import train_tokenizer
from longclip.data.text import Text
from longclip.data.tokens import Tokenizer
from longclip.model.packing import pack
from longclip.model.towers import Pixels

SIZE, BATCH, WINDOW = 224, 64, 77
CROP = (0.9, 1.0)
FORM = Pixels(SIZE, (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
CPU = torch.device("cpu")
CAPTION = "A photomicrograph of stained tissue shows nuclei of several colours in a montage of eight fields . " * 3


def photograph(rng: np.random.Generator, width: int = 640, height: int = 480) -> bytes:
    """Shapes of many sizes and a little noise: a JPEG of quality 90 of the weight of a photograph's."""
    image = np.zeros((height, width, 3))
    for cells in (4, 16, 64):
        knots = rng.normal(0, 128 / cells**0.5, (cells * height // width + 1, cells, 3))
        scaled = np.clip(knots + 128, 0, 255).astype(np.uint8)
        image += np.asarray(Image.fromarray(scaled).resize((width, height), Image.Resampling.BICUBIC)) - 128.0
    image += rng.normal(128, 3, image.shape[:2])[..., None]
    stream = io.BytesIO()
    Image.fromarray(np.clip(image, 0, 255).astype(np.uint8)).save(stream, "JPEG", quality=90)
    return stream.getvalue()


def draw_shards(folder: Path, samples: int, pictures: list[bytes]) -> None:
    count = max(2, samples // 1000)
    for shard in range(count):
        keys = range(shard, samples, count)
        write_shard(
            folder / f"s-{shard:04}.tar", (Sample(f"{k:08}", pictures[k % len(pictures)], CAPTION, {}) for k in keys)
        )
    index_folder(folder)


# ---- the ways ----------------------------------------------------------------------------------------------------


def ours(folder: Path, tokenizer: Tokenizer, workers: int, normalise: bool = True) -> Iterator[int]:
    dataset = open_dataset(folder)
    reader = Reader(dataset, tokenizer, FORM, Text("txt"))
    steps = range(len(dataset) // BATCH)
    for batch in training_batches(reader, Mixture([dataset.sizes], 0), CROP, BATCH, steps, 0, 1, workers):
        yield len(batch.images(CPU) if normalise else batch.pixels)


def same_decode(folder: Path, tokenizer: Tokenizer, workers: int) -> Iterator[int]:
    import webdataset

    pipeline = (
        webdataset.WebDataset(sorted(map(str, folder.glob("*.tar"))), shardshuffle=False)
        .map(_decoded)
        .batched(BATCH, collation_fn=partial(_collated, tokenizer), partial=False)
    )
    for batch in _loaded(pipeline, workers):
        yield len(batch.images(CPU))


def _decoded(sample: dict[str, Any]) -> tuple[np.ndarray[Any, Any], str]:
    draws = uniforms(4, 0, "crop", sample["__key__"]).tolist()
    return square(sample["jpg"], FORM, (*CROP, *draws)), sample["txt"].decode()


def _collated(tokenizer: Tokenizer, samples: list[tuple[np.ndarray[Any, Any], str]]) -> Batch:
    ids, lengths = tokenizer([text for _, text in samples])
    kept = sum(map(len, ids))
    pixels = torch.from_numpy(np.stack([image for image, _ in samples]))
    valid = torch.ones(len(samples), dtype=torch.bool)
    return Batch(pixels, FORM, pack(ids), valid, (), kept, sum(lengths) - kept)


def recipe(folder: Path, tokenizer: Tokenizer, workers: int) -> Iterator[int]:
    import webdataset

    pipeline = (
        webdataset.WebDataset(sorted(map(str, folder.glob("*.tar"))), shardshuffle=False)
        .decode("pilrgb")
        .to_tuple("jpg", "txt")
        .map_tuple(_transform, partial(_token_row, tokenizer))
        .batched(BATCH, partial=False)
    )
    for images, _ in _loaded(pipeline, workers):
        yield len(images)


def _transform(image: Image.Image) -> Tensor:
    """A random-resized crop of whole pixels, then floats, then normalised."""
    width, height = image.size
    for _ in range(10):
        area = width * height * np.random.uniform(*CROP)
        ratio = math.exp(np.random.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round((area * ratio) ** 0.5), round((area / ratio) ** 0.5)
        if w <= width and h <= height:
            break
    else:
        w, h = min(width, round(height * 4 / 3)), min(height, round(width * 4 / 3))
    x, y = np.random.randint(width - w + 1), np.random.randint(height - h + 1)
    image = image.crop((x, y, x + w, y + h)).resize((SIZE, SIZE), Image.Resampling.BICUBIC)
    tensor = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous().float().div(255)
    mean, std = (torch.tensor(each).view(3, 1, 1) for each in (FORM.mean, FORM.std))
    return tensor.sub_(mean).div_(std)


def _token_row(tokenizer: Tokenizer, text: str) -> Tensor:
    (ids,), _ = tokenizer([text])
    row = torch.zeros(WINDOW, dtype=torch.long)
    row[: len(ids)] = torch.tensor(ids)
    return row


def _loaded(pipeline: Any, workers: int) -> Iterator[Any]:
    return iter(DataLoader(pipeline, batch_size=None, num_workers=workers, prefetch_factor=4 if workers else None))


def rate(
    way: Callable[[Path, Tokenizer, int], Iterator[int]], folder: Path, tokenizer: Tokenizer, workers: int
) -> float:
    """Samples per second."""
    begun = time.perf_counter()
    samples = sum(way(folder, tokenizer, workers))
    return samples / (time.perf_counter() - begun)


# ---- resuming ----------------------------------------------------------------------------------------------------


def virtual(folder: Path, shards: int, samples: int) -> None:
    """An index of ``shards`` x ``samples``: every shard is a link to the first."""
    small = [photograph(np.random.default_rng(i), 64, 48) for i in range(4)]
    write_shard(folder / "s-0000.tar", (Sample(f"{i:08}", small[i % 4], CAPTION, {}) for i in range(samples)))
    index_folder(folder)
    index = json.loads((folder / "index.json").read_text())
    (entry,) = index["shards"]
    names = [f"s-{n:04}.tar" for n in range(shards)]
    for name in names[1:]:
        os.link(folder / "s-0000.tar", folder / name)
        os.link(folder / "s-0000.tar.idx.npz", folder / f"{name}.idx.npz")
    whole = Index(version=1, root=".", shards=tuple({**entry, "name": name} for name in names))
    (folder / "index.json").write_text(whole.model_dump_json())


def first_batch(folder: Path, tokenizer: Tokenizer, sample: int) -> tuple[float, float, float]:
    """Seconds to open the index, and from there to the first batch at ``sample``; MiB that both have taken."""
    tracemalloc.start()
    begun = time.perf_counter()
    dataset = open_dataset(folder)
    opened = time.perf_counter()
    reader = Reader(dataset, tokenizer, FORM, Text("txt"))
    order = Mixture([dataset.sizes], 0)
    step = sample // BATCH
    next(training_batches(reader, order, CROP, BATCH, range(step, step + 1), 0, 1, 0))
    done = time.perf_counter()
    memory = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    return opened - begun, done - opened, memory / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--samples", type=int, default=6000)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--shards", type=int, default=2400, help="of the virtual index")
    parser.add_argument("--per-shard", type=int, default=10_000)
    parser.add_argument("--resume-at", type=int, default=10_000_000)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    import webdataset

    versions = (
        f"torch {torch.__version__}, Pillow {pillow}, webdataset {webdataset.__version__}, numpy {np.__version__}"
    )
    print(
        f"{platform.platform()}, Python {platform.python_version()}, {len(os.sched_getaffinity(0))} cores; {versions}"
    )
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        raw = train_tokenizer()
        (root / "tok").mkdir()
        raw.save(str(root / "tok" / "tokenizer.json"))
        names = {f"{name.lower()}_token": f"[{name}]" for name in ("PAD", "UNK", "CLS", "SEP", "MASK")}
        config = {"tokenizer_class": "PreTrainedTokenizerFast", **names}
        (root / "tok" / "tokenizer_config.json").write_text(json.dumps(config))
        tokenizer = Tokenizer(str(root / "tok"), WINDOW)
        pictures = [photograph(np.random.default_rng(i)) for i in range(64)]
        draw_shards(root / "set", asked.samples, pictures)
        print(
            f"{asked.samples:,} samples of 640x480 JPEG ({np.mean([len(p) for p in pictures]) / 1000:.0f} kB) and "
            f"{len(tokenizer([CAPTION])[0][0])} tokens, batches of {BATCH}, {asked.workers} workers, one thread each, "
            f"median of {asked.repeats} passes [range]:"
        )
        ways: dict[str, Callable[[Path, Tokenizer, int], Iterator[int]]] = {
            "longclip": ours,
            "longclip, for a GPU": partial(ours, normalise=False),
            "webdataset, same decode": same_decode,
            "open_clip's recipe": recipe,
        }
        rates: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(asked.repeats):
            for name, way in ways.items():
                rates[name].append(rate(way, root / "set", tokenizer, asked.workers))
        on_cpu, for_gpu = (statistics.median(rates[name]) for name in ("longclip", "longclip, for a GPU"))
        for name, found in rates.items():
            middle = statistics.median(found)
            spread = f"[{min(found):.0f}, {max(found):.0f}]"
            ratios = f"longclip is {on_cpu / middle:.2f}x, for a GPU {for_gpu / middle:.2f}x"
            print(f"  {name:24}{middle:8.0f} samples/s {spread:14} {ratios}")

        virtual(root / "virtual", asked.shards, asked.per_shard)
        total = asked.shards * asked.per_shard
        print(f"first batch of {BATCH}, virtual index of {total:,} samples in {asked.shards:,} shards, one process:")
        first_batch(root / "virtual", tokenizer, 0)
        at_start = 0.0
        for place in (0, min(asked.resume_at, total - BATCH)):
            measured = [first_batch(root / "virtual", tokenizer, place) for _ in range(asked.repeats)]
            opened, taken, memory = (statistics.median(each) for each in zip(*measured, strict=True))
            at_start = at_start or taken
            print(
                f"  at sample {place:>12,}: {taken:.3f} s, {taken / at_start:.2f}x that at 0; "
                f"index.json opened in {opened:.3f} s; {memory:.1f} MiB in all"
            )


if __name__ == "__main__":
    main()
