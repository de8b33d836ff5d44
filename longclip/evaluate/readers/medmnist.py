"""MedMNIST's ``.npz``: arrays ``test_images``, ``test_labels`` and the same of train and val, all in one file.

The larger sizes (MedMNIST+, to 224 px) take gigabytes unpacked, so images are read one at a time from the packed file.
"""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from longclip.data.shards import MAX_PIXELS
from longclip.errors import UserError
from longclip.evaluate.classes import Classification
from longclip.evaluate.readers.labels import Forward, Labelled, Labels, file_there, no_such, reading

MOST_LABELS = 2**28
"""bytes of labels that are read: a header may promise anything"""


def read(task: Classification, data: Path, labels: Path | None) -> Labelled:
    """Images are uint8, [N, height, width] or [N, height, width, 3]; labels whole numbers, [N], [N, 1] or [N, L]."""
    file_there(data, "a MedMNIST .npz")
    images, answers = f"{task.split}_images", f"{task.split}_labels"
    with _opened(data) as archive:
        shape, kind = _head(archive, data, images)
        check_pixels(f"{data}: {images}", shape, kind)
        form, kind = _head(archive, data, answers)
        if kind.kind not in "ui" or len(form) not in (1, 2) or form[0] != shape[0]:
            valid = f"whole numbers, one row for each of the {shape[0]} images"
            raise UserError(f"{data}: {answers} is {kind} {list(form)}; valid are {valid}")
        if int(np.prod(form)) * kind.itemsize > MOST_LABELS:
            raise UserError(f"{data}: {answers} is {list(form)}, more than is read")
        with archive.open(f"{answers}.npy") as file:
            sums = [archive.getinfo(f"{name}.npy").CRC for name in (images, answers)]
            numbers = npy.read_array(file, allow_pickle=False).reshape(form[0], *(form[1:] or (1,)))
    check_labels(f"{data}: {answers}", numbers, task)
    rows = Labels(task)
    for row, values in enumerate(numbers):
        value = values if task.multi_label else values[0]
        rows.add(row, f"{task.split}-{row}", [value], None, f"{data}: {answers}[{row}]")
    return rows.labelled(Forward(lambda: _stream(data, images)), sums)


def check_pixels(where: str, shape: tuple[int, ...], kind: np.dtype[np.generic]) -> None:
    """Raises UserError for an array that is not one of grey or RGB images, or of too large ones."""
    if kind != np.uint8 or len(shape) not in (3, 4) or shape[3:] not in ((), (1,), (3,)):
        valid = "valid is uint8, [images, height, width] or [images, height, width, 3]"
        raise UserError(f"{where} is {kind} {list(shape)}; {valid}")
    if not 0 < shape[1] * shape[2] <= MAX_PIXELS:
        raise UserError(f"{where} is {list(shape)}; images have 1 to {MAX_PIXELS // 10**6} MPixel")


def check_labels(where: str, numbers_NL: NDArray[np.generic], task: Classification) -> None:
    if numbers_NL.shape[1] > 1 and not task.multi_label:
        what = f"{where} holds {numbers_NL.shape[1]} labels an image"
        raise UserError(f"{what}; valid is one, or `multi_label: true` in the suite")


def _stream(data: Path, name: str) -> Iterator[NDArray[np.uint8]]:
    with _opened(data) as archive:
        (count, *one), _ = _head(archive, data, name)
        with archive.open(f"{name}.npy") as file:
            _read_head(file)
            size = int(np.prod(one))
            for i in range(count):
                pixels = file.read(size)
                if len(pixels) < size:
                    raise UserError(f"{data}: {name} ends within image {i} of {count}")
                yield np.frombuffer(pixels, dtype=np.uint8).reshape(one)


@contextmanager
def _opened(data: Path) -> Iterator[zipfile.ZipFile]:
    try:
        with reading(data), zipfile.ZipFile(data) as archive:
            yield archive
    # what zipfile and numpy raise of a broken or hostile file; a password is a RuntimeError
    except (zipfile.BadZipFile, zlib.error, ValueError, EOFError, NotImplementedError, RuntimeError) as error:
        raise UserError(f"{data} is not a readable .npz ({error})") from None


def _head(archive: zipfile.ZipFile, data: Path, name: str) -> tuple[tuple[int, ...], np.dtype[np.generic]]:
    """Shape and type of an array, which is not read."""
    if f"{name}.npy" not in archive.namelist():
        raise no_such(data, "array", name, [n.removesuffix(".npy") for n in archive.namelist()])
    with archive.open(f"{name}.npy") as file:
        shape, fortran, kind = _read_head(file)
    if kind.hasobject or (fortran and len(shape) > 1):
        raise UserError(f"{data}: {name} is of {'Python objects' if kind.hasobject else 'column-major order'}")
    return shape, kind


def _read_head(file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[np.generic]]:
    version = npy.read_magic(file)
    read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
    shape, fortran, kind = read(file)
    return tuple(int(n) for n in shape), fortran, kind
