"""The same labelled images in each of the forms that readers read, written by the plain libraries."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from PIL import Image

from longclip.data.index import index_folder
from longclip.data.shards import Sample, write_shard
from longclip.evaluate.classes import Classification

NAMES = ("w1", "w2", "w3")
CLASSES = {"w1": ["w1 w11", "w21"], "w2": ["w2"], "w3": ["w3 w33 w13"]}
TEMPLATES = ["w50 {}", "{} w51 w52"]
FORMS = ("shards", "images", "medmnist", "hdf5", "parquet", "csv")
SEVERAL = ("shards", "medmnist", "hdf5", "parquet", "csv")


def pixels(count: int, size: int = 16, seed: int = 0) -> NDArray[np.uint8]:
    """[count, size, size, 3]: coloured noise, each image of its own brightness."""
    random = np.random.default_rng(seed)
    return (random.random((count, size, size, 3)) * random.integers(20, 256, (count, 1, 1, 3))).astype(np.uint8)


def png(image: NDArray[np.uint8]) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, "PNG")
    return stream.getvalue()


def task(reader: str, **more: Any) -> Classification:
    words = {} if "candidates" in more else {"classes": CLASSES, "templates": TEMPLATES}
    label = {"label": "facts.1"} if reader == "shards" else {}
    return Classification.model_validate(
        {"kind": "classification", "reader": reader, "data": "d", **words, **label, **more}
    )


def write(
    reader: str, root: Path, images: NDArray[np.uint8], labels: NDArray[np.int64], **more: Any
) -> tuple[Classification, Path, Path | None]:
    """``labels``: [N] numbers, or [N, 3] of 0 and 1. The task, its data, and its file of labels if that is another."""
    several = labels.ndim == 2
    asked = task(reader, **({"multi_label": True} if several else {}), **more)
    match reader:
        case "shards":
            kept = [
                [n for n, there in zip(NAMES, row, strict=True) if there] if several else NAMES[row] for row in labels
            ]
            samples = [Sample(f"k{i:03}", png(x), "t", {"facts": ["-", kept[i]]}) for i, x in enumerate(images)]
            for shard in range(2):
                write_shard(root / f"{shard}.tar", samples[shard * 7 :][: 7 if shard == 0 else None])
            index_folder(root)
            return asked, root, None
        case "images":
            for i, (image, label) in enumerate(zip(images, labels, strict=True)):
                (root / "set" / NAMES[label]).mkdir(parents=True, exist_ok=True)
                (root / "set" / NAMES[label] / f"{i:03}.png").write_bytes(png(image))
            (root / "set" / "w1" / "Thumbs.db").write_text("not an image")
            return asked, root, None
        case "medmnist":
            answers = labels.astype(np.uint8).reshape(len(labels), -1)
            more_arrays = {"train_images": images[:1], "train_labels": answers[:1]}
            np.savez_compressed(root / "x.npz", test_images=images, test_labels=answers, **more_arrays)  # type: ignore[arg-type]
            return asked, root / "x.npz", None
        case "hdf5":
            with h5py.File(root / "x.h5", "w") as file:
                file.create_dataset("x", data=images, chunks=(4, *images.shape[1:]), compression="gzip")
            with h5py.File(root / "y.h5", "w") as file:
                file["y"] = labels if several else labels.astype(np.uint8).reshape(-1, 1, 1, 1)
            return asked, root / "x.h5", root / "y.h5"
        case "parquet":
            half = len(images) // 2
            for name, part in (("test-0.parquet", slice(None, half)), ("test-1.parquet", slice(half, None))):
                column = [{"bytes": png(x), "path": None} for x in images[part]]
                rows = {"image": column, "label": labels[part].tolist(), "other": list(range(len(column)))}
                pq.write_table(pa.table(rows), root / name, row_group_size=5)
            pq.write_table(pa.table({"image": [b""], "label": [0]}), root / "train-0.parquet")
            return asked, root / "test-*.parquet", None
        case "csv":
            (root / "png").mkdir()
            with open(root / "set.csv", "w", newline="") as file:
                writer = csv.writer(file)
                writer.writerow(["n", "image", "label"])
                for i, (image, label) in enumerate(zip(images, labels, strict=True)):
                    (root / "png" / f"{i}.png").write_bytes(png(image))
                    writer.writerow([i, f"png/{i}.png", json.dumps(label.tolist()) if several else NAMES[label]])
            return asked, root / "set.csv", None
    raise AssertionError(reader)


def order(reader: str, labels: NDArray[np.int64]) -> list[int]:
    """The order in which a reader has the images: that of the folders, or as they were."""
    return sorted(range(len(labels)), key=lambda i: (labels[i], i)) if reader == "images" else list(range(len(labels)))
