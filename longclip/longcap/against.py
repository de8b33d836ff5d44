"""Evaluation images that training data must not hold."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from longclip.data.shards import IMAGE_EXTENSIONS, MAX_MEMBER, open_dataset
from longclip.errors import SiteError, UserError
from longclip.longcap import images
from longclip.longcap.progress import progress


def evaluation_hashes(places: Sequence[str]) -> tuple[NDArray[np.uint64], int]:
    """The distinct perceptual hashes of all images at ``places``, sorted; and how many images cannot be read.

    A place is a folder of images, at any depth, or indexed shards, as :func:`open_dataset` takes them.

    Raises:
        UserError: no such place, or no readable image there.
        SiteError: a file cannot be read.
    """
    found: set[int] = set()
    unreadable = 0
    for place in places:
        readable = 0
        with progress(f"images of {place}", None) as tell:
            for i, data in enumerate(_images(place)):
                try:
                    found.add(images.encode(data).phash)
                    readable += 1
                except images.BadImage:
                    unreadable += 1
                tell(i)
        if not readable:
            raise UserError(f"--against {place}: no image there that can be read")
    return np.array(sorted(found), dtype=np.uint64), unreadable


def _images(place: str) -> Iterator[bytes]:
    path = Path(place)
    if not path.is_dir() or (path / "index.json").is_file():
        dataset = open_dataset(place)
        for shard, size in enumerate(dataset.sizes):
            for i in range(size):
                yield dataset.read(shard, i).image
        return
    for folder, folders, files in os.walk(path):
        folders.sort()
        for name in sorted(files):
            file = Path(folder) / name
            if name.rpartition(".")[2].lower() not in IMAGE_EXTENSIONS:
                continue
            try:
                found = file.stat()
                if stat.S_ISREG(found.st_mode):  # a pipe would be waited for
                    yield file.read_bytes() if found.st_size <= MAX_MEMBER else b""
            except OSError as error:
                raise SiteError(f"cannot read {file}: {error.strerror}") from None
