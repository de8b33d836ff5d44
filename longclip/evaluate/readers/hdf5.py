"""HDF5 as PCam has it: an array of images in one file, an array of labels in the same or in another."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from longclip.errors import SiteError, UserError
from longclip.evaluate.classes import Classification
from longclip.evaluate.readers.labels import Labelled, Labels, file_there, no_such
from longclip.evaluate.readers.medmnist import MOST_LABELS, check_labels, check_pixels

BLOCK = 2**22
"""bytes of pixels read at once: compressed chunks hold many images"""


def read(task: Classification, data: Path, labels: Path | None) -> Labelled:
    """Images as in ``medmnist``, by default array ``x``; labels whole numbers, [N] with any number of ones after it
    (PCam: [N, 1, 1, 1]), or [N, L], by default array ``y``. Arrays that lie in further files are refused."""
    answers = labels or data
    for path in {data, answers}:
        file_there(path, "an HDF5 file (gunzip it first if its name ends in .gz)")
    image, (label, *_) = task.columns()
    with _array(data, image) as array:
        shape = tuple(int(n) for n in array.shape)
        check_pixels(f"{data}: {image}", shape, array.dtype)
    with _array(answers, label) as array:
        rest = [n for n in array.shape[1:] if n != 1]
        if array.dtype.kind not in "uib" or not array.shape or array.shape[0] != shape[0] or len(rest) > 1:
            valid = f"whole numbers, one row for each of the {shape[0]} images"
            raise UserError(f"{answers}: {label} is {array.dtype} {list(array.shape)}; valid are {valid}")
        if array.nbytes > MOST_LABELS:
            raise UserError(f"{answers}: {label} is {list(array.shape)}, more than is read")
        numbers = np.asarray(array[()]).reshape(shape[0], *(rest or [1]))
    check_labels(f"{answers}: {label}", numbers, task)
    rows = Labels(task)
    for row, values in enumerate(numbers):
        value = values if task.multi_label else values[0]
        rows.add(row, f"{image}[{row}]", [value], None, f"{answers}: {label}[{row}]")
    return rows.labelled(_Blocks(data, image, shape), [path.stat().st_size for path in (data, answers)])


class _Blocks:
    """Image i, a block of neighbours read at once and kept."""

    def __init__(self, data: Path, name: str, shape: tuple[int, ...]) -> None:
        self._data, self._name = data, name
        self._rows = max(1, BLOCK // int(np.prod(shape[1:])))
        self._start, self._block = -1, np.zeros(0, dtype=np.uint8)

    def __call__(self, row: int) -> NDArray[np.uint8]:
        start = row - row % self._rows
        if start != self._start:
            with _array(self._data, self._name) as array:
                self._start, self._block = start, array[start : start + self._rows]
        pixels: NDArray[np.uint8] = self._block[row - start]
        return pixels


@contextmanager
def _array(path: Path, name: str) -> Iterator[Any]:
    try:
        import h5py
    except ImportError:
        raise SiteError(f"reading {path.name} needs h5py", 'pip install "longclip[evaluate]"') from None
    try:
        with h5py.File(path, "r") as file:
            if not _inside(file, name) or not isinstance(file[name], h5py.Dataset):
                there = [n for n in file if _inside(file, n) and isinstance(file[n], h5py.Dataset)]
                raise no_such(path, "array", name, there)
            array = file[name]
            if array.external or array.is_virtual:
                raise UserError(f"{path}: {name} lies in other files; valid is an array within the file")
            yield array
    # h5py raises OSError for a file that is no HDF5, and for one that is damaged
    except (OSError, RuntimeError, KeyError, ValueError) as error:
        raise UserError(f"{path} cannot be read as HDF5 ({error})", "was it downloaded whole, and unpacked?") from None


def _inside(file: Any, name: str) -> bool:
    """Whether there is such an object, and no link leads to it: a link may lead into any file of this machine."""
    from h5py import Group, HardLink

    at = file
    for part in name.strip("/").split("/"):
        if not isinstance(at, Group) or not isinstance(at.get(part, getlink=True), HardLink):
            return False
        at = at[part]
    return True
