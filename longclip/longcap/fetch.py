"""Fetch: articles with their images into folders, one an article, that ``longcap build`` reads.

    DEST/PMC13901/PMC13901.1.xml    the article
    DEST/PMC13901/fig1.jpg          its images, under the names that they have in the bucket
    DEST/PMC13901/source.json       where from, which version, licence, sizes and hashes; written last
    DEST/failed.txt                 what could not be had and why; absent when nothing failed. An ``--ids`` file

Nothing is fetched twice: a folder with a record and all of its files is left alone, a file that is there with the right
hash is kept, a ``.part`` is continued. A kill at any moment leaves nothing that the next call would take for whole.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from longclip.data.shards import IMAGE_EXTENSIONS, MAX_MEMBER, write_aside
from longclip.errors import SiteError, told_as_no_space
from longclip.longcap.abreast import abreast
from longclip.longcap.pmc import ArticleId, find_version
from longclip.longcap.polite import Failed, Stopped
from longclip.longcap.progress import progress
from longclip.longcap.store import AGAIN, Store, md5_of

RECORD = "source.json"
FAILED = "failed.txt"
UNREACHABLE = 10
"""articles in a row for which nothing came from the server, after which no other is tried"""


class FileRecord(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)
    name: str
    bytes: int
    md5: str


class Source(BaseModel):
    """``source.json``: what was fetched, and from where."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    version: Literal[1] = 1
    article: str
    """PMCID and version: PMC13901.1"""
    source: str
    license: str
    files: tuple[FileRecord, ...]
    left_out: tuple[str, ...]
    """media of the article that are no images, and were not fetched"""
    about: dict[str, Any]
    """pmid, doi, title, is_retracted, is_manuscript, as the service says"""


@dataclass
class Outcome:
    """What came of a call. All counts are of articles unless they say otherwise."""

    fetched: int = 0
    there: int = 0
    """whole from an earlier call"""
    files: int = 0
    """files downloaded"""
    bytes: int = 0
    """of those files"""
    left_out: Counter[str] = field(default_factory=Counter)
    """media that are no images, by extension"""
    skipped: Counter[str] = field(default_factory=Counter)
    """by reason: their licence was not asked for"""
    retracted: int = 0
    """of the fetched and those there, how many the service marks as retracted"""
    failed: dict[str, str] = field(default_factory=dict)
    """id -> reason"""
    stopped: str = ""
    """why it ended before its end: interrupted, or the server is out of reach"""


@dataclass(frozen=True)
class _Got:
    source: Source
    files: int = 0
    bytes: int = 0
    fresh: bool = True


def fetch(
    store: Store,
    ids: Iterable[ArticleId],
    dest: Path,
    licenses: frozenset[str] | None = None,
    limit: int | None = None,
    connections: int = 4,
) -> Outcome:
    """Fetches articles, several at a time. A failure is one article's; it is named, counted, and stops no other.

    Args:
        licenses: licence codes to keep; None keeps all.
        limit: articles after which it is enough, those that are there already included.

    Raises:
        SiteError: ``dest`` cannot be written to (NoSpace: full). What is whole stays, and the next call continues.
    """
    dest.mkdir(parents=True, exist_ok=True)
    outcome, unreachable = Outcome(), 0
    most = [n for n in (limit, len(ids) if isinstance(ids, list) else None) if n is not None]

    def wanted() -> int:
        if outcome.stopped:
            return 0
        return 2**63 if limit is None else limit - outcome.fetched - outcome.there

    with progress("articles", min(most, default=None)) as tell:
        try:
            for article, answer in abreast(
                ids, lambda article: fetch_article(store, article, dest, licenses), connections, wanted
            ):
                unreachable = unreachable + 1 if isinstance(answer, Failed) and answer.unreachable else 0
                if unreachable >= UNREACHABLE:
                    outcome.stopped = f"{store.where} is out of reach"
                _count(outcome, article, answer)
                note = f"{outcome.bytes / 1e6:,.1f} MB, {len(outcome.failed):,} failed"
                tell(outcome.fetched + outcome.there + outcome.skipped.total() + len(outcome.failed), note)
        except KeyboardInterrupt:
            outcome.stopped = "interrupted"
    _write_failed(dest / FAILED, outcome.failed)
    return outcome


def fetch_article(store: Store, asked: ArticleId, dest: Path, licenses: frozenset[str] | None) -> _Got | str:
    """One article into its folder; a text says why it was skipped. Raises Failed, or NoSpace."""
    folder = dest / asked.pmcid
    record = _read_record(folder)
    if record is not None:
        if asked.version is not None and record.article != str(asked):
            raise Failed(f"{folder} holds {record.article}; remove it to fetch another version")
        if licenses is not None and record.license not in licenses:
            return f"licence {record.license}"
        if all(_size(folder / f.name) == f.bytes for f in record.files):
            return _Got(record, fresh=False)
    found = find_version(store, asked)
    if licenses is not None and found.license not in licenses:
        return f"licence {found.license}"
    with told_as_no_space(folder, AGAIN):
        folder.mkdir(parents=True, exist_ok=True)
        _remove_other_version(folder, {file.name for file in found.files}, found.files[0].name)
        files, count, size = [], 0, 0
        for file in found.files:
            path = folder / file.name
            if not (file.md5 and path.exists() and md5_of(path) == file.md5):
                try:
                    size += store.download(file.key, path, file.md5, MAX_MEMBER)
                except Failed as error:
                    raise Failed(f"{file.key}: {error.reason}", error.unreachable) from error
                count += 1
            files.append(FileRecord(name=file.name, bytes=path.stat().st_size, md5=file.md5 or md5_of(path)))
        source = Source(
            article=str(found.id),
            source=store.where,
            license=found.license,
            files=tuple(files),
            left_out=found.left_out,
            about=found.about,
        )
        with write_aside(folder / RECORD) as out:
            out.write(source.model_dump_json(indent=1).encode() + b"\n")
    return _Got(source, count, size)


def _remove_other_version(folder: Path, wanted: set[str], article: str) -> None:
    """Removes what another version has left, whole or in part: its article would be a second one, its images ours."""
    others = [path for path in folder.glob("*.xml") if path.name != article]
    if others:
        for path in folder.iterdir():
            # Nothing that fetch does not bring: there may be notes of somebody.
            fetched = path.suffix.lower()[1:] in ("", "part", *IMAGE_EXTENSIONS)
            if fetched and path.name not in wanted and path.is_file():
                path.unlink()
    for path in others:  # last, for they tell that there is something to remove
        path.unlink()


def _count(outcome: Outcome, article: ArticleId, answer: _Got | str | BaseException) -> None:
    if isinstance(answer, _Got):
        outcome.fetched += answer.fresh
        outcome.there += not answer.fresh
        outcome.files += answer.files
        outcome.bytes += answer.bytes
        outcome.left_out.update(PurePosixPath(name).suffix.lower() or "none" for name in answer.source.left_out)
        outcome.retracted += answer.source.about.get("is_retracted") is True
    elif isinstance(answer, str):
        outcome.skipped[answer] += 1
    elif isinstance(answer, Failed):
        outcome.failed[str(article)] = answer.reason
    elif isinstance(answer, OSError):
        raise SiteError(f"{answer.filename}: {answer.strerror}") from answer
    elif not isinstance(answer, Stopped):
        raise answer


def _read_record(folder: Path) -> Source | None:
    """None where there is none, or none that can be read: then the files are looked at one by one."""
    with suppress(OSError, ValidationError):
        return Source.model_validate_json((folder / RECORD).read_bytes())
    return None


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return -1


def _write_failed(path: Path, failed: dict[str, str]) -> None:
    if not failed:
        path.unlink(missing_ok=True)
        return
    with write_aside(path) as out:
        out.writelines(f"{article}  {reason}\n".encode() for article, reason in failed.items())


def report(outcome: Outcome, dest: Path, again: str, say: Callable[[str], None] = print) -> None:
    """What came of it, in lines. ``again``: the command that tries once more what failed."""
    say(
        f"fetched {outcome.fetched:,} articles ({outcome.files:,} files, {outcome.bytes / 1e6:,.1f} MB) into {dest}"
        + (f"; {outcome.there:,} were there" if outcome.there else "")
    )
    for reason, count in outcome.skipped.most_common():
        say(f"skipped {count:,}: {reason}")
    if outcome.left_out:
        kinds = ", ".join(f"{count:,} {kind}" for kind, count in outcome.left_out.most_common(8))
        say(f"left out {outcome.left_out.total():,} media files that are no images: {kinds}")
    if outcome.retracted:
        say(f"! {outcome.retracted:,} are marked as retracted ({RECORD}: about.is_retracted)")
    for article, reason in list(outcome.failed.items())[:20]:
        say(f"! {article}: {reason}")
    if outcome.failed:
        more = f", {len(outcome.failed) - 20:,} more in {dest / FAILED}" if len(outcome.failed) > 20 else ""
        say(f"! failed {len(outcome.failed):,}{more}\n  next: {again}")
