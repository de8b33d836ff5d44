"""The articles of a folder: found once, kept in one order, and dealt into work units.

A unit holds the same articles however many workers there are, so that what it writes may be made by any of them, and
made again.
"""

from __future__ import annotations

import hashlib
import os
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from longclip.data.shards import write_aside
from longclip.errors import SiteError, UserError
from longclip.longcap import images

_MOST_UNITS, _LARGEST_UNIT = 256, 256
"""up to so many articles a unit has one; above, units grow up to so many articles each, and then in number"""

_PMC = re.compile(r"PMC\d+(?:\.\d+)?\.xml", re.IGNORECASE)


@dataclass(frozen=True)
class Place:
    """Where an article lies."""

    name: str
    """its XML file, relative to the folder of articles"""
    alone: bool
    """it is the only article of its folder, so the media files there are its own"""


def find_articles(root: Path) -> Iterator[Place]:
    """Every article below ``root``, in the order of their folders' names.

    Hidden folders are passed over. Links are listed but not followed, for an unpacked archive may hold links that lead
    anywhere.

    Raises:
        OSError: a folder cannot be listed.
    """

    def fail(error: OSError) -> None:
        raise error

    for folder, folders, files in os.walk(root, onerror=fail):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for link in (name for name in folders if Path(folder, name).is_symlink()):
            yield Place(os.path.relpath(os.path.join(folder, link), root), False)
        found = articles_among(files)
        for file in found:
            yield Place(os.path.relpath(os.path.join(folder, file), root), len(found) == 1)


def articles_among(files: list[str]) -> list[str]:
    """Those file names of one folder that are articles, sorted.

    Every ``.nxml`` is one. So is every ``.xml`` where there is no ``.nxml``; beside one an ``.xml`` is a supplement,
    unless PMC names articles so (``PMC2.xml``, ``PMC2.1.xml``) and no ``.nxml`` has the same name.
    """
    nxml = [f for f in files if f.lower().endswith(".nxml") and not f.startswith(".")]
    xml = [f for f in files if f.lower().endswith(".xml") and not f.startswith(".")]
    stems = {f.lower().removesuffix(".nxml") for f in nxml}
    return sorted(nxml + [f for f in xml if not nxml or (_PMC.fullmatch(f) and f.lower()[:-4] not in stems)])


def media_of(root: Path, place: Place, hrefs: list[str]) -> dict[str, Path]:
    """File name -> path of the media that may belong to an article: the files beside it.

    Where several articles share a folder, only files that have the very name of one of ``hrefs``, with any image's
    extension or none: a looser match could give one article the figure of another.
    """
    folder = (root / place.name).parent
    if place.alone:
        found = images.listing(folder)
        found.pop(Path(place.name).name, None)
        return found
    wanted = dict.fromkeys(name for href in hrefs for name in images.exact_names(href))
    return {name: folder / name for name in wanted if "\0" not in name and is_regular(folder / name)}


def is_regular(file: Path) -> bool:
    try:
        return stat.S_ISREG(os.lstat(file).st_mode)
    except OSError:
        return False


class Listing:
    """The articles of one build, on disk: read a unit at a time, so that millions need no memory."""

    def __init__(self, folder: Path) -> None:
        self._names = folder / "articles.bin"
        self._starts = folder / "articles.npy"

    def write(self, root: Path) -> tuple[int, str]:
        """Lists ``root``; the number of articles and the sha256 (hex) over their names.

        Raises:
            UserError: there is no article in it.
            SiteError: it cannot be read.
        """
        ends, digest = [0], hashlib.sha256()
        try:
            with write_aside(self._names) as file:
                for place in find_articles(root):
                    line = (b"+" if place.alone else b"*") + os.fsencode(place.name) + b"\0"
                    digest.update(line)
                    file.write(line)
                    ends.append(ends[-1] + len(line))
        except OSError as error:
            if error.filename and Path(os.fsdecode(error.filename)).is_relative_to(root):
                raise SiteError(f"cannot list {error.filename}: {error.strerror}") from None
            raise
        if len(ends) == 1:
            raise UserError(f"no article in {root}: no .xml and no .nxml file", "longclip longcap fetch brings some")
        with write_aside(self._starts) as file:
            np.save(file, np.array(ends, dtype=np.int64))
        return len(ends) - 1, digest.hexdigest()

    def unit(self, number: int) -> list[tuple[int, Place]]:
        """The articles of a unit, each with its number in the listing."""
        ends: NDArray[np.int64] = np.load(self._starts, mmap_mode="r")
        size = unit_size(len(ends) - 1)
        first, last = number * size, min((number + 1) * size, len(ends) - 1)
        with open(self._names, "rb") as file:
            file.seek(int(ends[first]))
            lines = file.read(int(ends[last] - ends[first])).split(b"\0")[:-1]
        return [(first + i, Place(os.fsdecode(line[1:]), line[:1] == b"+")) for i, line in enumerate(lines)]


def unit_size(articles: int) -> int:
    """Articles of a unit: decided by their number alone."""
    return min(_LARGEST_UNIT, -(-articles // _MOST_UNITS))


def units(articles: int) -> int:
    return -(-articles // unit_size(articles))
