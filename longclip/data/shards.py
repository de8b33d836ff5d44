"""Shards: image-text pairs as plain WebDataset tars, written, indexed once, and then read at random.

A sample is ``<key>.jpg .txt .json`` lying side by side in a tar, the form of BIOMEDICA (arXiv 2501.07171); the json
member is optional. Any program that reads WebDataset reads these shards, and shards written by others are read here.

An index is built once, in a single pass over each tar: where each member lies, what is unreadable and why, and the
hash of the whole file. After that a sample is ``os.pread`` at a known place: order and resuming become arithmetic
(webdataset itself has no mid-epoch resume), and what the index found unreadable is not in the order at all. A shard
that was changed and not indexed again is noticed by its size when it is opened, and by keys and sizes of its samples
when they are read; other bytes in members of the same keys and sizes are not, for no hash is computed then.

    FOLDER/train-0000.tar            the shard
    FOLDER/index.json                the shards, their sizes and hashes, and what was skipped
    FOLDER/train-0000.tar.idx.npz    the places of its samples' members
"""

from __future__ import annotations

import errno
import fnmatch
import hashlib
import io
import json
import os
import re
import secrets
import tarfile
import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from longclip.errors import SiteError, UserError

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "tif", "tiff", "gif", "bmp")
MAX_PIXELS = 50_000_000
"""width x height above which an image is skipped: shards come from outside, and a header may promise anything"""
MAX_MEMBER = 256 * 2**20
"""bytes above which a member is skipped"""
OPEN_SHARDS = 64
"""shards of a dataset that a process keeps open: a global batch, of which a rank sees all lengths, may lie in three of
the blocks that the order shuffles in"""

IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "GIF", "BMP")
_EXTENSION_OF = dict(zip(IMAGE_FORMATS, ("jpg", "png", "webp", "tif", "gif", "bmp"), strict=True))
MEMBER = re.compile(r"((?:.*/)?[^./]+)\.([^/]*)", re.DOTALL)
"""key and extension, split at the first dot of the file name, as webdataset does"""


@dataclass(frozen=True)
class Sample:
    """One image-text pair as stored: nothing decoded but the text."""

    key: str
    image: bytes
    text: str
    fields: dict[str, Any]
    """the json member; empty where the shard has none"""


class Skipped(BaseModel):
    """A sample (or a member, by its full name) that cannot be used, and why."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    key: str
    reason: str


class ShardEntry(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)
    name: str = Field(pattern=r"^[^/]+\.tar$")
    bytes: int = Field(ge=0)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    samples: int = Field(ge=0)
    skipped: tuple[Skipped, ...] = ()


class Index(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)
    version: Literal[1]
    root: str
    shards: tuple[ShardEntry, ...]


# ---------------------------------------------------------------------------------------------------------- writing


@contextmanager
def write_aside(path: Path) -> Iterator[BinaryIO]:
    """A file that becomes ``path`` when the block ends well, and leaves nothing behind when it does not."""
    aside = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with open(aside, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def image_format(data: bytes) -> tuple[str, int]:
    """Format and pixels (width x height) from the header alone. Raises ValueError saying what is wrong."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # pillow warns from 89 MPixel on; the limit here is lower and not a warning
        try:
            with Image.open(io.BytesIO(data), formats=IMAGE_FORMATS) as image:
                # MPO: a JPEG with further pictures behind the first, as phones write it.
                return "JPEG" if image.format == "MPO" else str(image.format), image.width * image.height
        except Image.DecompressionBombError:
            raise ValueError(f"image has more than {MAX_PIXELS // 10**6} MPixel") from None
        except Exception:  # a hostile header raises nearly anything: struct.error, SyntaxError, ...
            raise ValueError("image header is not readable") from None


def write_shard(path: Path, samples: Iterable[Sample]) -> None:
    """Writes samples as a WebDataset tar: the same samples give the same bytes (no times, no owner).

    The image's extension follows its header. Written aside and renamed, so that a shard is whole or absent.

    Raises:
        ValueError: a key that is empty, repeated, or not a plain relative name without dots; bytes that are no image.
        SiteError: webdataset is not installed.
    """
    try:
        from webdataset import TarWriter  # imports torch: only where shards are written
    except ImportError:
        raise SiteError("writing shards needs webdataset", 'pip install "longclip[train]"') from None
    path.parent.mkdir(parents=True, exist_ok=True)
    seen: set[str] = set()
    with write_aside(path) as file, TarWriter(file, user="", group="", mtime=0, encoder=False) as tar:
        for sample in samples:
            if not (found := MEMBER.fullmatch(f"{sample.key}.x")) or found[2] != "x" or unsafe(sample.key):
                raise ValueError(f"not a usable key: {sample.key!r}")
            if sample.key in seen:
                raise ValueError(f"key {sample.key!r} occurs twice")
            seen.add(sample.key)
            members = {
                _EXTENSION_OF[image_format(sample.image)[0]]: sample.image,
                "txt": sample.text.encode(),
                "json": json.dumps(sample.fields, ensure_ascii=False).encode(),
            }
            tar.write({"__key__": sample.key, **members})


def json_object(data: bytes) -> dict[str, Any]:
    try:
        fields = json.loads(data.decode())
    except (ValueError, RecursionError):
        fields = None
    if isinstance(fields, dict):
        return fields
    raise ValueError("json is not a JSON object")


def unsafe(name: str) -> bool:
    return name.startswith("/") or ".." in name.split("/")


# ---------------------------------------------------------------------------------------------------------- reading


class _OpenShard:
    """An open tar and the places in it. Closed when the last user lets go of it, never under a reader's hands."""

    def __init__(self, tar: Path, index: Path, sha256: str, samples: int) -> None:
        self.path, self.fd = tar, -1
        try:
            with np.load(index, allow_pickle=False) as arrays:
                # [samples, 6] int64: offset and size of image, text and json, in bytes
                self.members = arrays["members"]
                self.keys: bytes = arrays["keys"].tobytes()
                self.key_ends = arrays["key_ends"]  # [samples] int64: where in ``keys`` (UTF-8) each key ends
                same = str(arrays["sha256"]) == sha256 and self.members.shape == (samples, 6)
                same = (
                    same and self.key_ends.shape == (samples,) and self.members.dtype == self.key_ends.dtype == np.int64
                )
        except OSError:
            raise
        except Exception as error:  # of a broken file numpy and zipfile raise nearly anything
            message = f"cannot be read ({error}); index the folder again"
            raise OSError(errno.EIO, message, str(index)) from error
        if not same:
            raise OSError(errno.ESTALE, "belongs to another index.json; index the folder again", str(index))
        self.fd = os.open(tar, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)

    def key(self, index: int) -> str:
        start = int(self.key_ends[index - 1]) if index else 0
        return self.keys[start : int(self.key_ends[index])].decode()

    def member(self, index: int, which: int) -> bytes:
        offset, size = (int(x) for x in self.members[index, 2 * which : 2 * which + 2])
        if offset < 0:
            return b""
        if not (offset >= tarfile.BLOCKSIZE and 0 <= size <= MAX_MEMBER):
            raise OSError(errno.EIO, f"has no such place as {offset}, {size}; index the folder again", str(self.path))
        # Together with the header before it, which tells whether this is still the member that was indexed.
        data = self._pread(index, offset - tarfile.BLOCKSIZE, size + tarfile.BLOCKSIZE)
        if not _is_header(data[: tarfile.BLOCKSIZE], self.key(index), size):
            message = f"sample {self.key(index)} is not where it was indexed; the shard has changed: index it again"
            raise OSError(errno.ESTALE, message, str(self.path))
        return data[tarfile.BLOCKSIZE :]

    def _pread(self, index: int, offset: int, size: int) -> bytes:
        parts: list[bytes] = []
        while size > 0 and (part := os.pread(self.fd, size, offset)):
            parts.append(part)
            offset, size = offset + len(part), size - len(part)
        if size:
            raise OSError(errno.EIO, f"ends within sample {self.key(index)}", str(self.path))
        return b"".join(parts)


def _is_header(header: bytes, key: str, size: int) -> bool:
    """Whether a tar header (POSIX ustar, section "ustar Interchange Format" of pax(1)) can be of a member of ``key``.

    Long or non-ASCII names stand elsewhere, in forms of their own: of them only the size is looked at.
    """
    if len(key) <= 80 and key.isascii() and not header.startswith(f"{key}.".encode()):
        return False
    try:
        return int(header[124:136].strip(b" \0") or b"0", 8) == size
    except ValueError:
        return False


class _Handles:
    """The shards that this process has open, least recently used first. Never pickled, never shared over a fork."""

    def __init__(self) -> None:
        self._start()

    def _start(self) -> None:
        self._pid, self._lock = os.getpid(), threading.Lock()
        self._shards: OrderedDict[int, _OpenShard] = OrderedDict()

    def __reduce__(self) -> tuple[type[_Handles], tuple[()]]:
        return _Handles, ()

    def get(self, shard: int, open_: Callable[[], _OpenShard]) -> _OpenShard:
        if self._pid != os.getpid():  # a forked worker: another lock, which no thread of the parent can be holding
            self._start()
        with self._lock:
            found = self._shards.pop(shard, None) or open_()
            self._shards[shard] = found
            if len(self._shards) > OPEN_SHARDS:
                self._shards.popitem(last=False)
            return found


@dataclass(frozen=True)
class Dataset:
    """Indexed shards, read by (shard, index). May be pickled and forked: files are opened where they are read."""

    folder: Path
    """holds index.json"""
    root: Path
    """holds the tars"""
    names: tuple[str, ...]
    sizes: tuple[int, ...]
    """readable samples of each shard, in the order of ``names``; may be 0 for some"""
    hash: str
    """sha256 (hex) over the shards' own sha256 and how many of their samples are readable: the content, wherever it
    lies and whatever its files are called"""
    sha256: tuple[str, ...] = field(repr=False)
    _handles: _Handles = field(default_factory=_Handles, repr=False, compare=False)

    def __len__(self) -> int:
        return sum(self.sizes)

    def _shard(self, shard: int, index: int) -> _OpenShard:
        if not (0 <= shard < len(self.names) and 0 <= index < self.sizes[shard]):
            raise IndexError(f"no sample {index} in shard {shard} of {self.folder}")
        name = self.names[shard]
        return self._handles.get(
            shard,
            lambda: _OpenShard(
                self.root / name, self.folder / f"{name}.idx.npz", self.sha256[shard], self.sizes[shard]
            ),
        )

    def read(self, shard: int, index: int) -> Sample:
        """One sample. ``shard`` counts ``names``, ``index`` counts that shard's readable samples, both from 0.

        Raises:
            IndexError: there is no such sample.
            OSError: the bytes are not those that were indexed: a short read, a lost file, text that does not decode.
        """
        key, text, fields = self.fields_and_text(shard, index)
        return Sample(key=key, image=self._shard(shard, index).member(index, 0), text=text, fields=fields)

    def text_bytes(self, shard: int, indices: NDArray[np.int64], fields: bool) -> NDArray[np.int64]:
        """Bytes of the text members of a shard's samples, or of their json members; by the index alone."""
        members = self._shard(shard, int(indices.max())).members
        return np.asarray(members[indices, 5 if fields else 3])

    def fields_and_text(self, shard: int, index: int) -> tuple[str, str, dict[str, Any]]:
        """Key, text and json member, without reading the image. Raises as :meth:`read`."""
        source = self._shard(shard, index)
        key = "?"
        try:
            key = source.key(index)
            fields = source.member(index, 2)
            return key, source.member(index, 1).decode(), json_object(fields) if fields else {}
        except ValueError as error:
            message = f"sample {key} is not as it was indexed ({error})"
            raise OSError(errno.EIO, message, str(source.path)) from error


def open_dataset(spec: str | Path) -> Dataset:
    """Opens an indexed folder, or those of its shards that match: ``folder`` or ``folder/train-*.tar``.

    Every selected shard must be there with the size that was indexed; its content is not read.

    Raises:
        UserError: no such folder, no index or one that does not match, nothing selected, or no readable sample.
    """
    path, pattern = Path(spec), "*"
    if not path.is_dir() and (path.suffix == ".tar" or any(c in path.name for c in "*?[")):
        path, pattern = path.parent, path.name
    if not path.is_dir():
        raise UserError(f"no such folder: {path}", "give a folder of indexed shards, or FOLDER/GLOB.tar")
    again = f"longclip data index {path}"
    try:
        index = Index.model_validate_json((path / "index.json").read_bytes())
    except FileNotFoundError:
        raise UserError(f"not indexed: {path} holds no index.json", again) from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        message = f"not an index that this version reads: {path / 'index.json'} ({where}: {first['msg']})"
        raise UserError(message, again) from error
    except OSError as error:
        raise SiteError(f"cannot read {path / 'index.json'}: {error.strerror or error}") from error
    root = path / index.root
    if index.root != ".":
        again = f"longclip data index {index.root} --out {path}"
    chosen = [entry for entry in index.shards if entry.name == pattern or fnmatch.fnmatchcase(entry.name, pattern)]
    if not chosen:
        there = ", ".join(entry.name for entry in index.shards[:3]) + (", ..." if len(index.shards) > 3 else "")
        raise UserError(f"no shard matches {pattern!r} in {path}", f"the index lists {there or 'nothing'}")
    for entry in chosen:
        try:
            size = (root / entry.name).stat().st_size
        except OSError:
            raise UserError(f"index does not match: {root / entry.name} is not there", f"{again} (again)") from None
        if size != entry.bytes:
            what = f"{root / entry.name} is {size:,} bytes, the index says {entry.bytes:,}"
            raise UserError(f"index does not match: {what}", f"{again} (again)")
        if not (path / f"{entry.name}.idx.npz").is_file():
            raise UserError(f"index does not match: {path / entry.name}.idx.npz is not there", f"{again} (again)")
    if not any(entry.samples for entry in chosen):
        raise UserError(f"no readable sample in {spec}", f"{path / 'index.json'} says under `skipped` why")
    hashes = tuple(entry.sha256 for entry in chosen)
    return Dataset(
        folder=path,
        root=root,
        names=tuple(entry.name for entry in chosen),
        sizes=tuple(entry.samples for entry in chosen),
        hash=hashlib.sha256(" ".join(f"{e.sha256}:{e.samples}" for e in chosen).encode()).hexdigest(),
        sha256=hashes,
    )
