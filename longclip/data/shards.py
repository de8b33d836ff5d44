"""Shards: image-text pairs as plain WebDataset tars, written, indexed once, and then read at random.

A sample is ``<key>.jpg .txt .json`` lying side by side in a tar, the form of BIOMEDICA (arXiv 2501.07171); the json
member is optional. Any program that reads WebDataset reads these shards, and shards written by others are read here.

An index is built once, in a single pass over each tar: where each member lies, what is unreadable and why, and the
hash of the whole file. After that a sample is ``os.pread`` at a known place: order and resuming become arithmetic
(webdataset itself has no mid-epoch resume), and what the index found unreadable is not in the order at all.

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
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import repeat
from pathlib import Path
from typing import Any, BinaryIO, Literal, cast

import numpy as np
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from longclip.errors import SiteError, UserError

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "tif", "tiff", "gif", "bmp")
MAX_PIXELS = 50_000_000
"""width x height above which an image is skipped: shards come from outside, and a header may promise anything"""
MAX_MEMBER = 256 * 2**20
"""bytes above which a member is skipped"""
OPEN_SHARDS = 64
"""shards that a process keeps open; above the size of the blocks that the order shuffles in"""

_IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "GIF", "BMP")
_EXTENSION_OF = dict(zip(_IMAGE_FORMATS, ("jpg", "png", "webp", "tif", "gif", "bmp"), strict=True))
_MEMBER = re.compile(r"((?:.*/)?[^./]+)\.([^/]*)", re.DOTALL)
"""key and extension, split at the first dot of the file name, as webdataset does"""


@dataclass(frozen=True)
class Sample:
    """One image-text pair as stored: nothing decoded but the text."""

    key: str
    image: bytes
    text: str
    fields: dict[str, Any]
    """the json member; empty where the shard has none"""


@dataclass(frozen=True)
class IndexSummary:
    """What :func:`index_folder` found."""

    folder: Path
    """where index.json was written"""
    shards: int
    samples: int
    bytes: int
    skipped: dict[str, int]
    """reason -> number of samples, most frequent first"""


class Skipped(BaseModel):
    """A sample (or a member, by its full name) that cannot be used, and why."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    key: str
    reason: str


class _ShardEntry(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)
    name: str = Field(pattern=r"^[^/]+\.tar$")
    bytes: int = Field(ge=0)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    samples: int = Field(ge=0)
    skipped: tuple[Skipped, ...] = ()


class _Index(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)
    version: Literal[1]
    root: str
    shards: tuple[_ShardEntry, ...]


# ---------------------------------------------------------------------------------------------------------- writing


@contextmanager
def _aside(path: Path) -> Iterator[BinaryIO]:
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


def _image_format(data: bytes) -> tuple[str, int]:
    """Format and pixels (width x height) from the header alone. Raises ValueError saying what is wrong."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # pillow warns from 89 MPixel on; the limit here is lower and not a warning
        try:
            with Image.open(io.BytesIO(data), formats=_IMAGE_FORMATS) as image:
                return str(image.format), image.width * image.height
        except Image.DecompressionBombError:
            raise ValueError(f"image has more than {MAX_PIXELS // 10**6} MPixel") from None
        except Exception:  # a hostile header raises nearly anything: struct.error, SyntaxError, ...
            raise ValueError("image header is not readable") from None


def write_shard(path: Path, samples: Iterable[Sample]) -> None:
    """Writes samples as a WebDataset tar: the same samples give the same bytes (no times, no owner).

    The image's extension follows its header. Written aside and renamed, so that a shard is whole or absent.

    Raises:
        ValueError: a key that is empty, repeated, or not a plain relative name without dots; bytes that are no image.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    seen: set[str] = set()
    with _aside(path) as file, tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for sample in samples:
            if not (found := _MEMBER.fullmatch(f"{sample.key}.x")) or found[2] != "x" or _unsafe(sample.key):
                raise ValueError(f"not a usable key: {sample.key!r}")
            if sample.key in seen:
                raise ValueError(f"key {sample.key!r} occurs twice")
            seen.add(sample.key)
            for extension, data in (
                (_EXTENSION_OF[_image_format(sample.image)[0]], sample.image),
                ("txt", sample.text.encode()),
                ("json", json.dumps(sample.fields, ensure_ascii=False).encode()),
            ):
                member = tarfile.TarInfo(f"{sample.key}.{extension}")  # mtime, uid and gid are 0, the owner is empty
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))


# --------------------------------------------------------------------------------------------------------- indexing


class _Hashing:
    """A file read once, front to back, and hashed on the way."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self.hash, self.bytes = file, hashlib.sha256(), 0

    def read(self, size: int = -1) -> bytes:
        data = self._file.read(size)
        self.hash.update(data)
        self.bytes += len(data)
        return data


@dataclass
class _Group:
    """Neighbouring members with one key."""

    key: str
    members: dict[str, tuple[int, int, bytes]] = field(default_factory=dict)
    """extension -> offset, size, content"""

    def places(self) -> list[int]:
        """Offset and size of image, text and json (-1, 0 where there is none). Raises ValueError with the reason."""
        images = [extension for extension in self.members if extension in IMAGE_EXTENSIONS]
        if not images:
            raise ValueError("no image member")
        if len(images) > 1:
            raise ValueError("more than one image member")
        if "txt" not in self.members:
            raise ValueError("no text member")
        if max(size for _, size, _ in self.members.values()) > MAX_MEMBER:
            raise ValueError(f"a member is larger than {MAX_MEMBER // 2**20} MiB")
        image, text, fields = (self.members.get(e, (-1, 0, b"")) for e in (images[0], "txt", "json"))
        try:
            if not text[2].decode().strip():
                raise ValueError("empty text")
        except UnicodeDecodeError:
            raise ValueError("text is not UTF-8") from None
        if "json" in self.members:
            _json_object(fields[2])
        if _image_format(image[2])[1] > MAX_PIXELS:
            raise ValueError(f"image has more than {MAX_PIXELS // 10**6} MPixel")
        return [*image[:2], *text[:2], *fields[:2]]


def _json_object(data: bytes) -> dict[str, Any]:
    try:
        fields = json.loads(data.decode())
    except (ValueError, RecursionError):
        fields = None
    if isinstance(fields, dict):
        return fields
    raise ValueError("json is not a JSON object")


def _unsafe(name: str) -> bool:
    return name.startswith("/") or ".." in name.split("/")


def _groups(tar: tarfile.TarFile, skipped: list[Skipped]) -> Iterator[_Group]:
    group: _Group | None = None
    for member in tar:
        if member.isdir():
            continue
        found = _MEMBER.fullmatch(member.name)
        if _unsafe(member.name):
            reason = "name points out of the folder"
        elif not member.isreg() or member.issparse():
            reason = "a link or a special file"
        elif found is None:
            reason = "name is not <key>.<extension>"
        else:
            key, extension = found[1], found[2].lower()
            if group is None or group.key != key or extension in group.members:
                if group is not None:
                    yield group
                group = _Group(key)
            data = b""
            if extension in (*IMAGE_EXTENSIONS, "txt", "json") and member.size <= MAX_MEMBER:
                content = tar.extractfile(member)
                data = content.read() if content is not None else b""
            group.members[extension] = (member.offset_data, member.size, data)
            continue
        skipped.append(Skipped(key=member.name.encode(errors="replace").decode(), reason=reason))
    if group is not None:
        yield group


def _index_shard(path: Path, out: Path) -> _ShardEntry:
    """Reads one tar front to back, writes its ``.idx.npz`` into ``out``, and returns its line of index.json."""
    keys: dict[str, list[int]] = {}
    seen: set[str] = set()
    skipped: list[Skipped] = []
    try:
        with open(path, "rb", buffering=0) as file:
            source = _Hashing(file)
            try:
                with tarfile.open(fileobj=cast(BinaryIO, source), mode="r|", bufsize=2**20) as tar:
                    for group in _groups(tar, skipped):
                        try:
                            if group.key in seen:
                                raise ValueError("key occurs again (a sample's members must lie side by side)")
                            seen.add(group.key)
                            group.key.encode()
                            keys[group.key] = group.places()
                        except ValueError as error:
                            reason = "name is not UTF-8" if isinstance(error, UnicodeError) else str(error)
                            skipped.append(Skipped(key=group.key.encode(errors="replace").decode(), reason=reason))
                    end = tar.offset
            except (tarfile.TarError, ValueError, OverflowError, EOFError) as error:
                raise UserError(f"not a whole, uncompressed tar: {path} ({error})", _REWRITE) from error
            while source.read(2**20):
                pass
            # tarfile takes a header that is cut off or garbled for the end; a whole tar ends in a block of zeros
            if os.pread(file.fileno(), tarfile.BLOCKSIZE, end) != bytes(tarfile.BLOCKSIZE):
                what = "cut off" if end + tarfile.BLOCKSIZE > source.bytes else "damaged"
                raise UserError(f"not a whole, uncompressed tar: {path} ({what} at byte {end:,})", _REWRITE)
    except OSError as error:
        raise SiteError(f"cannot read {path}: {error.strerror or error}") from error
    sha256 = source.hash.hexdigest()
    names = [key.encode() for key in keys]
    with _aside(out / f"{path.name}.idx.npz") as file:
        np.savez(
            file,
            allow_pickle=False,
            sha256=np.array(sha256),
            keys=np.frombuffer(b"".join(names), dtype=np.uint8),
            key_ends=np.cumsum([len(name) for name in names], dtype=np.int64),
            members=np.array(list(keys.values()), dtype=np.int64).reshape(len(keys), 6),
        )
    return _ShardEntry(name=path.name, bytes=source.bytes, sha256=sha256, samples=len(keys), skipped=tuple(skipped))


def _index_shards(paths: list[Path], out: Path, workers: int) -> Iterator[_ShardEntry]:
    if workers <= 1 or len(paths) == 1:
        yield from (_index_shard(path, out) for path in paths)
        return
    with ProcessPoolExecutor(min(workers, len(paths))) as pool:
        yield from pool.map(_index_shard, paths, repeat(out))


_REWRITE = "copy or write this shard again, or move it out of the folder (gunzip it first if it is compressed)"


def index_folder(
    shards: Path, out: Path | None = None, workers: int = 1, progress: Callable[[str, int, int], None] | None = None
) -> IndexSummary:
    """Indexes every ``*.tar`` of a folder; each is read once, front to back. Run again after shards change.

    Args:
        shards: the folder of tars; may be read-only when ``out`` is given.
        out: where the index is written and what :func:`open_dataset` is then given; default: ``shards`` itself.
        workers: processes, one shard each at a time.
        progress: called after each shard, with its name, readable samples and bytes.

    Raises:
        UserError: no such folder, no tar in it, or a file that is not a whole tar.
        SiteError: a shard cannot be read, or the index cannot be written.
    """
    if not shards.is_dir():
        raise UserError(f"no such folder: {shards}", "give the folder that holds the *.tar shards")
    paths = sorted(path for path in shards.glob("*.tar") if path.is_file() and not path.name.startswith("."))
    if not paths:
        raise UserError(f"no *.tar in {shards}", "give the folder that holds the shards, not one above or below it")
    folder = shards if out is None else out
    entries: list[_ShardEntry] = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _aside(folder / "index.json") as file:  # opened first: hours of reading are not lost to a read-only folder
            for entry in _index_shards(paths, folder, workers):
                entries.append(entry)
                if progress is not None:
                    progress(entry.name, entry.samples, entry.bytes)
            root = "." if folder.resolve() == shards.resolve() else str(shards.resolve())
            file.write(_Index(version=1, root=root, shards=tuple(entries)).model_dump_json(indent=1).encode() + b"\n")
    except OSError as error:
        raise SiteError(f"cannot write the index into {folder}: {error.strerror or error}", "--out FOLDER") from error
    reasons = Counter(skip.reason for entry in entries for skip in entry.skipped)
    return IndexSummary(
        folder=folder,
        shards=len(entries),
        samples=sum(entry.samples for entry in entries),
        bytes=sum(entry.bytes for entry in entries),
        skipped=dict(reasons.most_common()),
    )


# ---------------------------------------------------------------------------------------------------------- reading


class _OpenShard:
    """An open tar and the places in it. Closed when the last user lets go of it, never under a reader's hands."""

    def __init__(self, tar: Path, index: Path, sha256: str, samples: int) -> None:
        self.path, self.fd = tar, -1
        with np.load(index, allow_pickle=False) as arrays:
            self.members = arrays["members"]  # [samples, 6] int64: offset and size of image, text and json, in bytes
            self.keys: bytes = arrays["keys"].tobytes()
            self.key_ends = arrays["key_ends"]  # [samples] int64: where in ``keys`` (UTF-8) each key ends
            same = str(arrays["sha256"]) == sha256 and self.members.shape == (samples, 6)
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
        parts: list[bytes] = []
        while size > 0:
            part = os.pread(self.fd, size, offset)
            if not part:
                raise OSError(errno.EIO, f"ends within sample {self.key(index)}", str(self.path))
            parts.append(part)
            offset, size = offset + len(part), size - len(part)
        return b"".join(parts)


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
    """sha256 (hex) over the shards' own sha256: the content, wherever it lies and whatever its files are called"""
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

    def fields_and_text(self, shard: int, index: int) -> tuple[str, str, dict[str, Any]]:
        """Key, text and json member, without reading the image. Raises as :meth:`read`."""
        source = self._shard(shard, index)
        key = source.key(index)
        try:
            fields = source.member(index, 2)
            return key, source.member(index, 1).decode(), _json_object(fields) if fields else {}
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
        index = _Index.model_validate_json((path / "index.json").read_bytes())
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
        hash=hashlib.sha256("".join(hashes).encode()).hexdigest(),
        sha256=hashes,
    )
