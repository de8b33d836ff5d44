"""A work unit: the pairs of some articles, made ready for any shard, and what was skipped of them.

    units/000012.bin    key, head (JSON) and JPEG of each pair, end to end
    units/000012.npz    where each lies, with the hashes that decide its place; and the skips. Written last.

A unit depends on its articles and on the options alone. It is written aside and renamed: whole or absent.
"""

from __future__ import annotations

import json
import os
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from longclip.data.shards import MAX_MEMBER, MAX_PIXELS, write_aside
from longclip.errors import SiteError
from longclip.longcap import hashes, images, jats, pairs
from longclip.longcap.article import Article, Figure
from longclip.longcap.context import Context
from longclip.longcap.listing import Place, is_regular, media_of
from longclip.longcap.markup import MAX_BYTES
from longclip.longcap.options import Options

SPLITS = ("train", "val", "test")

RECORD = np.dtype(
    [
        ("article", "<u4"),  # number in the listing
        ("doi", "<u8"),  # hashes of what the article is called; 0: it is not
        ("pmcid", "<u8"),
        ("image", "<u8"),  # perceptual hash
        ("order", "<u8"),  # hash of seed and key: sorted by it, pairs are shuffled
        ("split", "u1"),
        ("start", "<u8"),  # place in the .bin, and sizes, in bytes
        ("key", "<u2"),
        ("head", "<u4"),
        ("jpeg", "<u4"),
    ]
)
"""one pair, 55 bytes"""


class Count(Protocol):
    """Counts tokens, or words."""

    def __call__(self, text: str, /) -> int: ...


class Words:
    """Words between white space: what counts where no tokenizer is named."""

    def __call__(self, text: str, /) -> int:
        return len(text.split())


@dataclass(frozen=True)
class Pair:
    """A pair as a shard will hold it."""

    key: str
    text: str
    fields: dict[str, Any]
    tokens: tuple[int, int]
    """of the caption and of the long caption"""
    jpeg: bytes


class Unit:
    def __init__(self, folder: Path, number: int) -> None:
        self.pairs = folder / f"{number:06d}.bin"
        self.record = folder / f"{number:06d}.npz"

    def done(self) -> bool:
        return self.record.is_file()

    def records(self) -> NDArray[np.void]:
        with np.load(self.record, allow_pickle=False) as arrays:
            return np.asarray(arrays["records"])

    def skips(self) -> list[dict[str, str]]:
        with np.load(self.record, allow_pickle=False) as arrays:
            return [json.loads(line) for line in arrays["skips"].tobytes().splitlines()]

    def write(
        self, root: Path, articles: list[tuple[int, Place]], options: Options, count: Count, against: NDArray[np.uint64]
    ) -> None:
        """Makes the pairs of ``articles``, which lie below ``root``.

        Raises:
            SiteError: a file cannot be read.
            OSError: the unit cannot be written.
        """
        records: list[tuple[int, ...]] = []
        skips: list[dict[str, str]] = []
        with write_aside(self.pairs) as file:
            for number, place in articles:
                maker = _Maker(root, place, options, count, against, skips)
                for pair, picture, article in maker.pairs():
                    head = json.dumps([pair.text, pair.fields, pair.tokens], ensure_ascii=False).encode()
                    key = pair.key.encode()
                    names = (_hash("doi", article.doi.lower()), _hash("pmcid", article.pmcid))
                    order = _hash(str(options.seed), pair.key)
                    split = split_of(article, place, options)
                    sizes = (len(key), len(head), len(pair.jpeg))
                    records.append((number, *names, picture, order, split, file.tell(), *sizes))
                    file.write(key + head + pair.jpeg)
        with write_aside(self.record) as file:
            lines = "".join(json.dumps(skip) + "\n" for skip in skips).encode()
            np.savez(
                file,
                allow_pickle=False,
                records=np.array(records, dtype=RECORD),
                skips=np.frombuffer(lines, dtype=np.uint8),
            )


def split_of(article: Article, place: Place, options: Options) -> int:
    """Index into SPLITS: by what the article is called, so that it is the same in every build."""
    share = _hash("split", article.doi.lower() or article.pmcid or place.name) / 2**64
    return 2 if share < options.test else 1 if share < options.test + options.val else 0


def _hash(*parts: str) -> int:
    """64 bits; 0 where the last part is empty."""
    if not parts[-1]:
        return 0
    text = "\0".join(parts).encode(errors="surrogateescape")
    return int.from_bytes(blake2b(text, digest_size=8).digest(), "little")


@dataclass(frozen=True)
class _Maker:
    """Makes the pairs of one article, and names what it leaves out."""

    root: Path
    place: Place
    options: Options
    count: Count
    against: NDArray[np.uint64]
    skips: list[dict[str, str]]

    def _skip(self, reason: str, detail: str = "", **where: str) -> None:
        said = {"article": self.place.name, **where, "reason": reason, **({"detail": detail} if detail else {})}
        self.skips.append({k: v.encode(errors="backslashreplace").decode() for k, v in said.items()})

    def pairs(self) -> Iterator[tuple[Pair, int, Article]]:
        """Each pair with its image's hash."""
        file = self.root / self.place.name
        if not is_regular(file):
            return self._skip("link or special file")
        try:
            if file.stat().st_size > MAX_BYTES:
                raise jats.BadArticle("too large", f"{file.stat().st_size:,} bytes")
            article = jats.parse(_read(file))
        except jats.BadArticle as error:
            return self._skip(error.reason, error.detail)
        except _UNREADABLE as error:
            return self._skip("unreadable file", error.strerror or "")
        if not self.options.allows(article.license.name):
            return self._skip("licence not asked for", article.license.name)
        if not article.figures:
            return self._skip("article without figures")
        hrefs = [href for figure in article.figures for href in figure.graphics]
        media = media_of(self.root, self.place, hrefs)
        fields, context = pairs.article_fields(article), Context(article, self.count)
        for figure in article.figures:
            for pair, picture in self._figure(context, figure, media, fields):
                yield pair, picture, article

    def _figure(
        self, context: Context, figure: Figure, media: dict[str, Path], fields: dict[str, Any]
    ) -> Iterator[tuple[Pair, int]]:
        if not figure.caption:
            return self._skip("figure without caption", figure=figure.id)
        if not figure.graphics:
            return self._skip("figure without graphic", figure=figure.id)
        license = pairs.license_of(context.article, figure)
        if not self.options.allows(license.name):
            return self._skip("licence not asked for", license.name, figure=figure.id)
        found = list(self._images(figure, media))
        if not found:
            return
        description = context.describe(figure, self.options.budget)
        tokens = (self.count(figure.caption), description.tokens)
        shared = {**fields, **pairs.figure_fields(context.article, figure, description)}
        for number, name, image in found:
            key = pairs.key_of(context.article, self.place.name, figure, number)
            said = {**shared, **pairs.image_fields(name, image)}
            yield Pair(key, figure.caption, said, tokens, image.jpeg), image.phash

    def _images(self, figure: Figure, media: dict[str, Path]) -> Iterator[tuple[int, str, images.EncodedImage]]:
        """Number, file name and image of each of the figure's graphics."""
        for number, href in enumerate(figure.graphics):
            where = {"figure": figure.id, "graphic": href}
            path = images.find(href, media)
            if path is None:
                self._skip("image missing", **where)
                continue
            try:
                if (size := path.stat().st_size) > MAX_MEMBER:
                    raise images.BadImage("too large", f"{size:,} bytes, at most {MAX_MEMBER:,}")
                image = images.encode(_read(path), max_pixels=MAX_PIXELS)
            except images.BadImage as error:
                self._skip(f"image: {error.reason}", error.detail, **where)
                continue
            except _UNREADABLE as error:
                self._skip("image: unreadable file", error.strerror or "", **where)
                continue
            if hashes.near(np.array([image.phash], dtype=np.uint64), self.against, self.options.distance)[0]:
                self._skip("image of an evaluation set", **where)
                continue
            yield number, path.name, image


_UNREADABLE = (PermissionError, FileNotFoundError, IsADirectoryError)
"""what another attempt would meet as well; any other error (a network's disk that is away) may pass"""


def _read(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except _UNREADABLE:
        raise
    except OSError as error:
        raise SiteError(f"cannot read {file}: {error.strerror}", "the same command goes on") from None


class Pairs:
    """The pairs of all units, read from any place in them; the files used last stay open."""

    _MOST_OPEN = 128

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._open: OrderedDict[int, int] = OrderedDict()

    def __enter__(self) -> Pairs:
        return self

    def __exit__(self, *error: object) -> None:
        while self._open:
            os.close(self._open.popitem()[1])

    def _bytes(self, unit: int, start: int, size: int) -> bytes:
        fd = self._open.pop(unit, -1)
        if fd < 0:
            fd = os.open(Unit(self._folder, unit).pairs, os.O_RDONLY | os.O_CLOEXEC)
        self._open[unit] = fd
        if len(self._open) > self._MOST_OPEN:
            os.close(self._open.popitem(last=False)[1])
        data = os.pread(fd, size, start)
        while len(data) < size:  # one call reads at most 2 GiB, and a network's disk may give less
            more = os.pread(fd, size - len(data), start + len(data))
            if not more:
                raise SiteError(f"{Unit(self._folder, unit).pairs}: ends before byte {start + size:,}", "build anew")
            data += more
        return data

    def key(self, unit: int, row: np.void) -> str:
        return self._bytes(unit, int(row["start"]), int(row["key"])).decode()

    def read(self, unit: int, row: np.void) -> Pair:
        key, head, jpeg = (int(row[k]) for k in ("key", "head", "jpeg"))
        data = self._bytes(unit, int(row["start"]), key + head + jpeg)
        text, fields, (short, long) = json.loads(data[key : key + head])
        return Pair(data[:key].decode(), text, fields, (short, long), data[key + head :])
