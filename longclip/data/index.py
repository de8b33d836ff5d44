"""The index of a folder of shards: one pass over each tar says where samples lie, what is unusable, and what it is.

What a hostile or broken tar may hold (links, names that point out of the folder, members cut off, images of a billion
pixels) is skipped with its reason or refused with the file's name; nothing is ever left out in silence.
"""

from __future__ import annotations

import hashlib
import os
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from itertools import repeat
from pathlib import Path
from typing import BinaryIO, cast

import numpy as np

from longclip.data.shards import (
    IMAGE_EXTENSIONS,
    MAX_MEMBER,
    MAX_PIXELS,
    MEMBER,
    Index,
    ShardEntry,
    Skipped,
    image_format,
    json_object,
    unsafe,
    write_aside,
)
from longclip.errors import SiteError, UserError


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
            json_object(fields[2])
        if image_format(image[2])[1] > MAX_PIXELS:
            raise ValueError(f"image has more than {MAX_PIXELS // 10**6} MPixel")
        return [*image[:2], *text[:2], *fields[:2]]


def _groups(tar: tarfile.TarFile, skipped: list[Skipped]) -> Iterator[_Group]:
    group: _Group | None = None
    for member in tar:
        if member.isdir():
            continue
        found = MEMBER.fullmatch(member.name)
        if unsafe(member.name):
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


def index_shard(path: Path, out: Path) -> ShardEntry:
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
    with write_aside(out / f"{path.name}.idx.npz") as file:
        np.savez(
            file,
            allow_pickle=False,
            sha256=np.array(sha256),
            keys=np.frombuffer(b"".join(names), dtype=np.uint8),
            key_ends=np.cumsum([len(name) for name in names], dtype=np.int64),
            members=np.array(list(keys.values()), dtype=np.int64).reshape(len(keys), 6),
        )
    return ShardEntry(name=path.name, bytes=source.bytes, sha256=sha256, samples=len(keys), skipped=tuple(skipped))


def _index_shards(paths: list[Path], out: Path, workers: int) -> Iterator[ShardEntry]:
    if workers <= 1 or len(paths) == 1:
        yield from (index_shard(path, out) for path in paths)
        return
    with ProcessPoolExecutor(min(workers, len(paths))) as pool:
        yield from pool.map(index_shard, paths, repeat(out))


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
    entries: list[ShardEntry] = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with write_aside(folder / "index.json") as file:
            for entry in _index_shards(paths, folder, workers):
                entries.append(entry)
                if progress is not None:
                    progress(entry.name, entry.samples, entry.bytes)
            root = "." if folder.resolve() == shards.resolve() else str(shards.resolve())
            file.write(Index(version=1, root=root, shards=tuple(entries)).model_dump_json(indent=1).encode() + b"\n")
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
