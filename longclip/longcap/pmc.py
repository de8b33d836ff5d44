"""The PMC Cloud Service: how its public bucket names articles, and what it says of each.

Since August 2026 PMC's article datasets are single files in the bucket pmc-oa-opendata, readable over HTTPS without
signing. As its README.txt (https://pmc-oa-opendata.s3.amazonaws.com/README.txt) and
https://pmc.ncbi.nlm.nih.gov/tools/pmcaws/ describe it:

    PMC13901.1/PMC13901.1.xml       JATS; one prefix an article *version*, of which an article may have several
    PMC13901.1/PMC13901.1.json      metadata: pmcid, version, license_code, is_retracted, ..., xml_url, media_urls
    PMC13901.1/fig1.jpg             images and supplementary files, where the licence lets them be passed on
    metadata/PMC13901.1.json        the same metadata again
    inventory-reports/pmc-oa-opendata/metadata/2026-01-18T01-00Z/manifest.json   names the day's .csv.gz of all metadata

URLs in the metadata read ``s3://pmc-oa-opendata/PMC13901.1/fig1.jpg?md5=<hex>``. Licence codes are Creative Commons'
("CC BY-NC"), "TDM" (author manuscripts: text mining only), or null.

This was written from those pages and from what others report of the bucket, not against the bucket itself. Two things
they leave open: names in ``*_url`` are taken as they stand (not percent-decoded), and of several versions the one with
the highest number is taken for the newest.
"""

from __future__ import annotations

import gzip
import json
import re
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from longclip.data.shards import IMAGE_EXTENSIONS
from longclip.errors import LongclipError, UserError
from longclip.longcap.polite import Failed
from longclip.longcap.store import Store

BUCKET = "https://pmc-oa-opendata.s3.amazonaws.com"
INVENTORY = "inventory-reports/pmc-oa-opendata/metadata/"
LICENSES = ("CC0", "CC BY", "CC BY-SA", "CC BY-ND", "CC BY-NC", "CC BY-NC-SA", "CC BY-NC-ND", "TDM", "unknown")
"""what ``license_code`` may be; "unknown" stands for none"""
MAX_INVENTORY = 2**32
"""bytes; one day's list was about 250 MB in September 2026"""

_ID = re.compile(r"\bPMC(\d{1,12})(?:\.(\d{1,3}))?\b")
_VERSIONS = 1000
"""above any version number: number * _VERSIONS + version is one int64"""


@dataclass(frozen=True)
class ArticleId:
    number: int
    version: int | None = None
    """None: the newest"""

    @property
    def pmcid(self) -> str:
        return f"PMC{self.number}"

    def __str__(self) -> str:
        return self.pmcid if self.version is None else f"{self.pmcid}.{self.version}"


@dataclass(frozen=True)
class MediaFile:
    key: str
    md5: str
    """hex; empty where the metadata give none"""

    @property
    def name(self) -> str:
        return self.key.rpartition("/")[2]


@dataclass(frozen=True)
class Version:
    """One version of an article, as its metadata describe it."""

    id: ArticleId
    license: str
    """one of LICENSES, or what else the service may come to say"""
    files: tuple[MediaFile, ...]
    """the XML, then the images"""
    left_out: tuple[str, ...]
    """names of media that are no images: supplementary tables, films, archives"""
    about: dict[str, Any]
    """pmid, doi, title, is_retracted, is_manuscript"""


def parse_id(text: str) -> ArticleId:
    """``PMC13901``, or one version of it: ``PMC13901.2``. Raises ValueError."""
    if not (found := _ID.fullmatch(text)):
        raise ValueError(f"not a PMCID: {text!r}")
    return ArticleId(int(found[1]), int(found[2]) if found[2] else None)


def read_ids(path: Path) -> list[ArticleId]:
    """Article ids from a file: each once, in its order.

    Three forms are understood: text (or CSV) with one article a line, its id being the first PMCID in that line;
    the same, compressed as ``.gz``; and the JSON that an ESearch in PMC answers (``esearchresult.idlist``).
    A CSV's first line may be a header; empty lines and those that start with # are passed over.

    Raises:
        UserError: no such file, a line without a PMCID, or no line at all.
    """
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        text = data.decode("utf-8-sig")
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {error}") from error
    if text.lstrip().startswith("{"):
        try:
            lines = [f"PMC{int(n)}" for n in json.loads(text)["esearchresult"]["idlist"]]
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path}: JSON without esearchresult.idlist") from error
    else:
        lines = text.splitlines()
    ids: dict[ArticleId, None] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip() or line.startswith("#"):
            continue
        if found := _ID.search(line):
            ids[parse_id(found[0])] = None
        elif number > 1 or "," not in line:
            raise UserError(f"{path}:{number}: no PMCID in {line[:80]!r}", "one article a line, such as PMC13901")
    if not ids:
        raise UserError(f"{path}: no article in it", "one article a line, such as PMC13901")
    return list(ids)


def choose(named: Iterable[str], file: Path | None) -> list[ArticleId] | None:
    """Articles named one by one and by a file, each once; None where neither names any. Raises UserError."""
    try:
        ids = [parse_id(text) for text in named]
    except ValueError as error:
        raise UserError(str(error), "PMC and digits, such as PMC13901") from None
    return list(dict.fromkeys(ids + (read_ids(file) if file is not None else []))) or None


def parse_licenses(text: str) -> frozenset[str]:
    """``CC BY,CC0`` -> the set of both. Raises UserError naming what is valid."""
    asked = frozenset(part.strip() for part in text.split(","))
    if wrong := sorted(asked - set(LICENSES)):
        raise UserError(f"--licenses: {wrong[0]!r} is none of {', '.join(LICENSES)}")
    return asked


def find_version(store: Store, asked: ArticleId) -> Version:
    """The version that was asked for, or the newest one. Raises Failed."""
    if asked.version is None:
        there = [parse_id(p[:-1]).version or 0 for p in store.prefixes(f"{asked.pmcid}.") if _ID.fullmatch(p[:-1])]
        if not there:
            raise Failed(f"is not in {store.where}")
        asked = ArticleId(asked.number, max(there))
    raw = store.read(f"{asked}/{asked}.json")
    try:
        metadata = json.loads(raw)
        return _version(asked, metadata)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise Failed(f"metadata cannot be used: {type(error).__name__}: {error}") from error


def _version(id_: ArticleId, metadata: dict[str, Any]) -> Version:
    if (metadata["pmcid"], int(metadata["version"])) != (id_.pmcid, id_.version):
        raise ValueError(f"they are those of {metadata['pmcid']!r}, version {metadata['version']!r}")
    xml = _media(id_, metadata["xml_url"])
    if xml.name != f"{id_}.xml":
        raise ValueError(f"the article is called {xml.name!r}")
    media = {file.name: file for file in (_media(id_, url) for url in metadata.get("media_urls") or ())}
    # A graphic may be named without its extension, and so may be its file.
    images = [f for f in media.values() if PurePosixPath(f.name).suffix[1:].lower() in ("", *IMAGE_EXTENSIONS)]
    return Version(
        id=id_,
        license=str(metadata.get("license_code") or "unknown"),
        files=(xml, *images),
        left_out=tuple(sorted(set(media) - {f.name for f in images})),
        about={k: metadata.get(k) for k in ("pmid", "doi", "title", "is_retracted", "is_manuscript")},
    )


def _media(id_: ArticleId, url: str) -> MediaFile:
    """``s3://bucket/PMC1.1/name?md5=hex``. The name is somebody else's: it has to be a plain file's, and stay one."""
    address, _, md5 = url.partition("?md5=")
    scheme, _, place = address.partition("://")
    key = place.partition("/")[2]
    folder, _, name = key.partition("/")
    plain = name.isprintable() and not set(name) & set("/\\") and not name.startswith(".")
    if scheme != "s3" or folder != str(id_) or not name or not plain:
        raise ValueError(f"names a file outside its folder: {url[:200]!r}")
    if len(name.encode()) > 240 or name in RESERVED or name.endswith(".part"):
        raise ValueError(f"not a usable file name: {name[:250]!r}")
    if md5 and not re.fullmatch("[0-9a-f]{32}", md5):
        raise ValueError(f"not an md5: {md5[:50]!r}")
    return MediaFile(key, md5)


RESERVED = frozenset({"source.json"})
"""names that a folder of an article needs for itself"""


def inventory(store: Store, dest: Path) -> Iterator[ArticleId]:
    """Every article of the service, newest versions only, in an order that looks random but is always the same.

    The order is that of a hash of the number, so that the first thousand are a sample of all and stay the first
    thousand on another day. ``dest``: a folder that keeps the day's list, so that it is downloaded once.
    Memory: 8 bytes an article version, three times over: 200 MB for 8 million.

    Raises:
        LongclipError: the service has no inventory, or one that cannot be read.
    """
    try:
        days = [p for p in store.prefixes(INVENTORY) if re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d-\d\dZ", p.split("/")[-2])]
        if not days:
            raise Failed("lists none")
        manifest = json.loads(store.read(f"{max(days)}manifest.json"))
        files = [(str(f["key"]), str(f.get("MD5checksum") or "")) for f in manifest["files"]]
        dest.mkdir(parents=True, exist_ok=True)
        codes = []
        for number, (key, md5) in enumerate(files):
            path = dest / f"{max(days).split('/')[-2]}-{number}.csv.gz"
            if not path.exists():
                store.download(key, path, md5, MAX_INVENTORY)
            with gzip.open(path) as lines:
                codes.append(np.fromiter(_codes(lines), np.int64))
    except (Failed, ValueError, KeyError, TypeError, EOFError, OSError, zlib.error) as error:
        raise LongclipError(f"{store.where}: its inventory cannot be had: {error}", "name articles by --ids") from error
    every = np.sort(np.concatenate(codes))
    numbers = every // _VERSIONS
    newest = every[np.append(numbers[1:] != numbers[:-1], True)]
    # Fibonacci hashing (Knuth, TAOCP 3, 6.4): multiples of the golden ratio's fraction spread evenly and never meet.
    scattered = (newest // _VERSIONS).astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    for code in newest[np.argsort(scattered)]:
        yield ArticleId(int(code) // _VERSIONS, int(code) % _VERSIONS)


def _codes(lines: Iterable[bytes]) -> Iterator[int]:
    """Number * _VERSIONS + version of the metadata that an inventory's rows name."""
    row = re.compile(rb'"metadata/PMC(\d{1,12})\.(\d{1,3})\.json"')
    for line in lines:
        if found := row.search(line):
            yield int(found[1]) * _VERSIONS + int(found[2])
