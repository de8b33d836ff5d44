"""Labelled images in the forms in which they are published, one file a form. Labels are read and checked at once,
images when they are asked for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from longclip.errors import UserError
from longclip.evaluate.classes import Classification
from longclip.evaluate.readers import csv_file, folder, hdf5, medmnist, parquet, shards
from longclip.evaluate.readers.labels import Labelled, Labels

_READERS: dict[str, Callable[[Classification, Path, Path | None], Labelled]] = {
    "shards": shards.read,
    "images": folder.read,
    "medmnist": medmnist.read,
    "hdf5": hdf5.read,
    "parquet": parquet.read,
    "csv": csv_file.read,
}


def open_labelled(task: Classification, data: str | Path, labels: str | Path | None = None) -> Labelled:
    """The images of a task. ``data`` and ``labels`` are the paths that the task's keys of these names stand for.

    Raises:
        UserError: nothing there, not of this form, or a label that is none of the classes.
        SiteError: a file cannot be read, or the package that reads its form is not installed.
    """
    found = _READERS[task.reader](task, Path(data), None if labels is None else Path(labels))
    if not len(found):
        why = f": {found.left_out[0]}" if found.left_out else ""
        raise UserError(f"no images to classify in {data}{why}")
    return found


__all__ = ["Labelled", "Labels", "open_labelled"]
