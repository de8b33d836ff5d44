"""Images and their captions as a retrieval task reads them: indexed shards, or a folder with a captions file.

    FOLDER/captions.csv        with the columns image and caption, or
    FOLDER/captions.jsonl      {"image": "sub/a.jpg", "caption": "..."} a line
    FOLDER/sub/a.jpg           an image's path in the folder; several rows may name it, each with a caption of its own

Nothing here needs torch: that the data are there, and what they are, is known before a job is queued.
"""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from longclip.data.shards import MAX_MEMBER, Dataset, open_dataset, unsafe
from longclip.data.text import Text
from longclip.errors import SiteError, UserError

FILES = ("captions.csv", "captions.jsonl")


class Gallery(Protocol):
    """Images in a fixed order, each with its captions."""

    @property
    def hash(self) -> str:
        """sha256 (hex) of the content, wherever it lies."""

    def __len__(self) -> int:
        """How many images."""

    def read(self, i: int) -> tuple[bytes, list[str]]:
        """The file of image ``i`` and its captions. Raises ValueError where it has none, OSError of the disk."""


@dataclass(frozen=True)
class Shards:
    """One caption an image: the text that evaluation takes."""

    dataset: Dataset
    text: Text
    places: tuple[tuple[int, int], ...]

    @property
    def hash(self) -> str:
        return self.dataset.hash

    def __len__(self) -> int:
        return len(self.places)

    def read(self, i: int) -> tuple[bytes, list[str]]:
        sample = self.dataset.read(*self.places[i])
        return sample.image, [self.text(sample.text, sample.fields)]


@dataclass(frozen=True)
class Folder:
    """Any number of captions an image, in the order of the file's rows."""

    folder: Path
    images: tuple[str, ...]
    captions: tuple[tuple[str, ...], ...]
    hash: str
    """of captions, and of names and sizes of images: these are too many to be read before a job is queued"""

    def __len__(self) -> int:
        return len(self.images)

    def read(self, i: int) -> tuple[bytes, list[str]]:
        captions = [caption for caption in self.captions[i] if caption.strip()]
        if not captions:
            raise ValueError(f"{self.images[i]} has no caption")
        return (self.folder / self.images[i]).read_bytes(), captions


def open_gallery(path: str, text: str) -> Gallery:
    """What lies at ``path``; ``text`` is what to take of shards.

    Raises UserError where there is no such data, or a row that cannot be used.
    """
    folder = Path(path)
    file = next((folder / name for name in FILES if (folder / name).is_file()), None)
    if file is not None:
        return _folder(folder, file)
    if folder.is_dir() and not (folder / "index.json").is_file():
        raise UserError(
            f"no pairs in {folder}: neither shards' index.json nor {' nor '.join(FILES)}", f"longclip data index {path}"
        )
    dataset = open_dataset(path)
    places = tuple((shard, i) for shard, size in enumerate(dataset.sizes) for i in range(size))
    return Shards(dataset, Text(text), places)


def _folder(folder: Path, file: Path) -> Folder:
    captions: dict[str, list[str]] = {}
    try:
        for line, row in _rows(file):
            image, caption = row.get("image"), row.get("caption")
            if not (isinstance(image, str) and isinstance(caption, str)) or unsafe(image):
                raise UserError(f"{file}:{line}: a row has an image, a path in this folder, and a caption")
            captions.setdefault(image, []).append(caption)
        digest = hashlib.sha256()
        for image, texts in captions.items():
            size = (folder / image).stat().st_size
            if size > MAX_MEMBER:
                raise UserError(f"{folder / image} is {size:,} bytes, which is no image")
            digest.update(f"{json.dumps([image, size, texts])}\n".encode())
    except FileNotFoundError as error:
        raise UserError(f"{file}: names an image that is not there: {error.filename}") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{file}: cannot be read: {error}") from None
    except OSError as error:
        raise SiteError(f"{error.filename or file}: {error.strerror}") from None
    if not captions:
        raise UserError(f"{file}: no rows")
    return Folder(folder, tuple(captions), tuple(map(tuple, captions.values())), digest.hexdigest())


def _rows(file: Path) -> Iterator[tuple[int, dict[str, object]]]:
    """Each row with its line."""
    with file.open(encoding="utf-8-sig", newline="") as f:
        if file.suffix == ".csv":
            reader = csv.DictReader(f)
            missing = [name for name in ("image", "caption") if name not in (reader.fieldnames or ())]
            if missing:
                raise UserError(f"{file}:1: no column {missing[0]!r}; there are {', '.join(reader.fieldnames or ())}")
            for row in reader:
                yield reader.line_num, dict(row)
            return
        for number, line in enumerate(f, 1):
            if line.strip():
                try:
                    made = json.loads(line)
                except ValueError:
                    made = None
                yield number, made if isinstance(made, dict) else {}
