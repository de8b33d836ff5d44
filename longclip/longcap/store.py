"""Where articles come from: a bucket over HTTPS, or a folder that is laid out like one.

Objects are named by keys such as ``PMC13901.1/PMC13901.1.xml``. What is downloaded is a ``.part`` until all of it is
there and its hash is right; a ``.part`` that an earlier attempt (or an earlier command) left is continued, by a range
request, where the hash is known that the whole must have.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import quote

from longclip.errors import UserError, told_as_no_space
from longclip.longcap.polite import CHUNK, Again, Client, Failed, Manners

SMALL = 16 * 2**20
"""bytes that ``read`` takes at most: listings and metadata are a few kB"""
AGAIN = "make room: the same command continues"

_MD5 = re.compile(r'"?([0-9a-f]{32})"?')


class Store(Protocol):
    where: str
    """URL or folder, for messages and records"""

    def prefixes(self, start: str) -> list[str]:
        """The "folders" whose names begin so, one level deep, each with its final slash."""

    def read(self, key: str) -> bytes:
        """A small object. Raises Failed."""

    def download(self, key: str, path: Path, md5: str, limit: int) -> int:
        """An object into a file, whole and verified or not at all. Returns bytes.

        ``md5`` (hex) is what the file must hash to; empty: not known. Raises Failed; NoSpace on a full disk.
        """


def open_store(where: str, manners: Manners, client: Client | None = None) -> Store:
    """A URL or a folder. Raises UserError where it is neither."""
    if re.match(r"https?://[^/]", where):
        return Bucket(where, client or Client(manners))
    if "://" in where:
        raise UserError(f"cannot fetch from {where}", "give an https:// URL, or a folder laid out like the bucket")
    if not Path(where).is_dir():
        raise UserError(f"no such folder: {where}", "give a folder laid out like the bucket, or an https:// URL")
    return Folder(Path(where))


class Bucket:
    """A public S3 bucket, or a server that answers like one (ListObjectsV2 for ``prefixes``)."""

    def __init__(self, url: str, client: Client) -> None:
        self.where, self._client = url.rstrip("/"), client

    def prefixes(self, start: str) -> list[str]:
        listing = self._read(f"{self.where}/?list-type=2&delimiter=/&prefix={quote(start, safe='')}").decode(
            errors="replace"
        )
        if "<ListBucketResult" not in listing:
            raise Failed("the server lists no versions; name one, as in PMC13901.1")
        if "<IsTruncated>true" in listing:
            raise Failed(f"more than a page of names begin with {start}")
        # Not an XML parser: names that are wanted have no character that XML would escape, and others are not wanted.
        return [name for name in re.findall(r"<Prefix>([^<&]*/)</Prefix>", listing) if name.startswith(start)]

    def read(self, key: str) -> bytes:
        return self._read(self._url(key))

    def _url(self, key: str) -> str:
        return f"{self.where}/{quote(key)}"

    def _read(self, url: str) -> bytes:
        def once() -> bytes:
            with self._client.send("GET", url) as response:
                data = bytearray()
                self._client.body(response, SMALL, data.extend)
            _verify(hashlib.md5(data, usedforsecurity=False).hexdigest(), _etag(response))
            return bytes(data)

        return self._client.insist(url, once)

    def download(self, key: str, path: Path, md5: str, limit: int) -> int:
        part = _part(path)

        def once() -> int:
            digest, start = hashlib.md5(usedforsecurity=False), 0
            if md5 and part.exists():
                start = _feed(part, digest.update)
                if digest.hexdigest() == md5:  # all of it came, and the command ended before it was renamed
                    return start
            with self._client.send("GET", self._url(key), headers={"Range": f"bytes={start}-"} if start else {}) as r:
                if r.status_code == 416 or (r.status_code == 206 and not _continues(r, start)):
                    part.unlink(missing_ok=True)
                    raise Again(f"{r.status_code}: has not the bytes from {start:,} on")
                if r.status_code == 200:
                    digest, start = hashlib.md5(usedforsecurity=False), 0

                def write(data: bytes) -> None:
                    file.write(data)
                    digest.update(data)

                with open(part, "ab" if start else "wb") as file:
                    size = start + self._client.body(r, limit - start, write)
            try:
                _verify(digest.hexdigest(), md5 or _etag(r))
            except Again:
                part.unlink()
                raise
            return size

        with told_as_no_space(path, AGAIN):
            size = self._client.insist(key, once)
            os.replace(part, path)
        return size


class Folder:
    """A copy of (a part of) the bucket on a disk, as ``aws s3 sync`` makes it."""

    def __init__(self, root: Path) -> None:
        self.where, self._root = str(root), root

    def prefixes(self, start: str) -> list[str]:
        parent, slash, begin = start.rpartition("/")
        folder = self._root / parent
        if not folder.is_dir():
            return []
        return sorted(f"{parent}{slash}{p.name}/" for p in folder.iterdir() if p.name.startswith(begin) and p.is_dir())

    def read(self, key: str) -> bytes:
        try:
            with open(self._root / key, "rb") as file:
                return file.read(SMALL)
        except OSError as error:
            raise Failed(f"{key}: {error.strerror}") from error

    def download(self, key: str, path: Path, md5: str, limit: int) -> int:
        digest = hashlib.md5(usedforsecurity=False)
        source, part = self._root / key, _part(path)
        try:
            if (size := source.stat().st_size) > limit:
                raise Failed(f"{size:,} bytes, more than {limit:,}")
            reading = open(source, "rb")  # noqa: SIM115  (closed below; only opening it is the source's fault)
        except OSError as error:
            raise Failed(str(error.strerror)) from error
        with reading, told_as_no_space(path, AGAIN):
            with open(part, "wb") as file:
                while data := reading.read(CHUNK):
                    file.write(data)
                    digest.update(data)
            if md5 and digest.hexdigest() != md5:
                part.unlink()
                raise Failed(f"md5 is {digest.hexdigest()}, not {md5}")
            os.replace(part, path)
        return size


def md5_of(path: Path) -> str:
    digest = hashlib.md5(usedforsecurity=False)
    _feed(path, digest.update)
    return digest.hexdigest()


def _part(path: Path) -> Path:
    return path.with_name(f"{path.name}.part")


def _feed(path: Path, update: Callable[[bytes], Any]) -> int:
    size = 0
    with open(path, "rb") as file:
        while data := file.read(2**20):
            update(data)
            size += len(data)
    return size


def _continues(response: Any, start: int) -> bool:
    return bool(start) and str(response.headers.get("Content-Range", "")).startswith(f"bytes {start}-")


def _etag(response: Any) -> str:
    """The body's md5 where the ETag is one: S3's is for objects that were put in one part and not encrypted by KMS."""
    found = _MD5.fullmatch(response.headers.get("ETag", ""))
    return found[1] if found and "x-amz-server-side-encryption-aws-kms-key-id" not in response.headers else ""


def _verify(got: str, wanted: str) -> None:
    if wanted and got != wanted:
        raise Again(f"md5 is {got}, not {wanted}")
