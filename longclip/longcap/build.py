"""A folder of articles becomes shards: in two passes over units of work that any number of workers may do.

    DST/train-000000.tar ...       the shards, with index.json and an .idx.npz each (longclip/data/index.py)
    DST/manifest.json              what is in them and what they were made with; written last
    DST/skipped.jsonl              what was left out, by name and reason

    DST/.build/build.json          what the build was begun with; it goes on with nothing else
    DST/.build/articles.*          the listing of SRC
    DST/.build/units/              first pass: the pairs of some articles each (unit.py)
    DST/.build/*.npy               which pair goes where (arrangement.py)
    DST/.build/shards/             second pass: what is said of a shard that is written

Whatever is there was renamed into place when it was whole, so a build that was killed goes on with what is missing.
Nothing depends on which worker did what, or when: the same articles and options give the same bytes. While it is built
the pairs lie there twice; ``.build`` is removed in the end.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from functools import cached_property
from hashlib import sha256
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from longclip.data.counter import TokenCounter
from longclip.data.index import index_shard
from longclip.data.shards import Sample, write_aside, write_shard
from longclip.errors import SiteError, UserError, told_as_no_space
from longclip.longcap import listing, manifest, options
from longclip.longcap.against import evaluation_hashes
from longclip.longcap.arrangement import Arrangement
from longclip.longcap.listing import Listing
from longclip.longcap.manifest import Tally
from longclip.longcap.options import Options
from longclip.longcap.progress import progress
from longclip.longcap.unit import Count, Pairs, Unit, Words
from longclip.run.folder import read_json, write_json
from longclip.track.lease import Lease

AGAIN = "the same command goes on where this one stopped"
FRESH = "give the same as then, or a fresh folder"


class Build:
    """One build under way, in its folder. Made by :func:`begin`, done by steps, from any process."""

    def __init__(self, dst: Path) -> None:
        self.dst = dst
        self.folder = dst / ".build"
        self.facts: dict[str, Any] = read_json(self.folder / "build.json")
        self.options = Options.model_validate(self.facts["options"])
        self.units = listing.units(self.facts["articles"])
        self.arrangement = Arrangement(self.folder)
        if changed := options.differences(self.facts["versions"], options.versions()):
            raise UserError(f"{dst} was begun with other versions: {'; '.join(changed)}", FRESH)

    @cached_property
    def _count(self) -> Count:
        return TokenCounter(self.folder / "tokenizer.json") if self.options.tokenizer else Words()

    def missing_units(self) -> list[int]:
        return [i for i in range(self.units) if not Unit(self.folder / "units", i).done()]

    def unit(self, number: int) -> None:
        articles = Listing(self.folder).unit(number)
        against = np.load(self.folder / "against.npy")
        unit = Unit(self.folder / "units", number)
        with _explained(self.dst):
            unit.write(
                Path(read_json(self.folder / "source.json")["src"]), articles, self.options, self._count, against
            )

    def arrange(self) -> None:
        if not self.arrangement.done():
            with _explained(self.dst):
                self.arrangement.make(self.folder / "units", self.units, self.options)

    def missing_shards(self) -> list[int]:
        """Of the shards in the arrangement's order."""
        return [i for i, _ in enumerate(self.arrangement.shards()) if not self._shard(i).is_file()]

    def shard(self, number: int) -> None:
        split, i = self.arrangement.shards()[number]
        path = self.dst / f"{split}-{i:06d}.tar"
        places, tally = self.arrangement.places(split, i), Tally()
        with Pairs(self.folder / "units") as pairs, _explained(self.dst):
            read = (pairs.read(int(place["unit"]), place) for place in places)
            write_shard(path, (Sample(p.key, p.jpeg, p.text, p.fields) for p in tally.passing(read)))
            entry = index_shard(path, self.dst).model_dump(mode="json")
            write_json(self._shard(number), {"entry": entry, "tally": tally.as_dict()})

    def _shard(self, number: int) -> Path:
        return self.folder / "shards" / f"{number:06d}.json"

    def finish(self) -> None:
        """Writes index and manifest, and removes what was needed on the way."""
        arrangement = self.arrangement
        counts = {"pairs": arrangement.facts()["pairs"]}
        shards = [read_json(self._shard(i)) for i in range(len(arrangement.shards()))]
        with _explained(self.dst):
            manifest.finish(self.dst, self.facts, counts, shards, chain(self._skips(), arrangement.skips()))
        for path in self.dst.glob(".*.tmp"):  # of writers that were killed
            path.unlink()
        shutil.rmtree(self.folder)

    def _skips(self) -> Iterator[bytes]:
        for i in range(self.units):
            for skip in Unit(self.folder / "units", i).skips():
                yield json.dumps(skip, ensure_ascii=False).encode() + b"\n"


def begin(src: Path, dst: Path, asked: Options) -> Build | None:
    """Begins a build, or finds the one that was begun; None where it has been finished.

    Raises:
        UserError: no article in ``src``; ``dst`` holds something else, or a build that was begun with other options,
            articles or versions.
        SiteError: something cannot be read or written.
    """
    if asked.val + asked.test >= 1:
        raise UserError(f"--val {asked.val:g} and --test {asked.test:g} leave nothing to train on")
    if not src.is_dir():
        raise UserError(f"no such folder: {src}", "give the folder that holds the articles")
    folder = dst / ".build"
    finished, begun = dst / manifest.MANIFEST, folder / "build.json"

    def known() -> Path | None:
        return next((file for file in (finished, begun) if file.is_file()), None)

    with _explained(dst):
        there = known()
        if there is None and dst.exists() and any(path != folder for path in dst.iterdir()):
            raise UserError(f"{dst} holds something else than a build", "give a folder that is not there yet")
        folder.mkdir(parents=True, exist_ok=True)
        held = False
        try:
            with Lease(folder / "lock"):
                held, there = True, known()  # which another may have begun meanwhile
                # A build under way reads its listing: that of today is only compared with it.
                place = folder if there is None else folder / "today"
                place.mkdir(exist_ok=True)
                articles, names = Listing(place).write(src)
                facts = {"options": asked.model_dump(mode="json"), "articles": articles, "listing": names}
                facts["versions"] = options.versions()
                if there is not None:
                    _check_same(dst, read_json(there), facts)
                if there is None:
                    _prepare(folder, asked, facts)
                write_json(folder / "source.json", {"src": str(src.resolve())})
        finally:
            shutil.rmtree(folder / "today", ignore_errors=True)
            if held and (finished.is_file() or not begun.is_file()):
                shutil.rmtree(folder, ignore_errors=True)
                if there is None:
                    with suppress(OSError):
                        dst.rmdir()
    return None if finished.is_file() else Build(dst)


def _prepare(folder: Path, asked: Options, facts: dict[str, Any]) -> None:
    for name in ("units", "shards"):
        (folder / name).mkdir(exist_ok=True)
    if asked.tokenizer:
        counter = TokenCounter(asked.tokenizer)
        if counter.specials >= asked.budget:
            raise UserError(f"--budget {asked.budget}: {counter.specials} tokens of it are special ones")
        counter.save(folder / "tokenizer.json")
        facts["tokenizer"] = sha256((folder / "tokenizer.json").read_bytes()).hexdigest()
    hashes, unreadable = evaluation_hashes(asked.against)
    with write_aside(folder / "against.npy") as file:
        np.save(file, hashes)
    facts["against"] = {"images": len(hashes), "unreadable": unreadable}
    write_json(folder / "build.json", facts)


def _check_same(dst: Path, theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> None:
    """Raises UserError naming what differs."""
    if changed := options.differences(theirs["options"], ours["options"]):
        raise UserError(f"{dst} was begun with other options: {'; '.join(changed)}", FRESH)
    if theirs["listing"] != ours["listing"]:
        what = f"{theirs['articles']:,} articles then, {ours['articles']:,} now"
        raise UserError(f"{dst} was begun with other articles ({what}, or other names)", "build into a fresh folder")
    if changed := options.differences(theirs["versions"], ours["versions"]):
        raise UserError(f"{dst} was begun with other versions: {'; '.join(changed)}", FRESH)


@contextmanager
def _explained(dst: Path) -> Iterator[None]:
    """Errors of the disk in one line."""
    try:
        with told_as_no_space(dst, f"make room; {AGAIN}"):
            yield
    except OSError as error:
        raise SiteError(f"{error.filename or dst}: {error.strerror or error}", AGAIN) from error


def build_here(build: Build, workers: int) -> None:
    """Does all that is missing, in ``workers`` processes of this machine.

    Raises:
        SiteError: the disk is full, a file cannot be read, a worker was killed. What is done stays.
    """
    with Lease(build.folder / "lock") as lease:
        _all(build, "unit", build.missing_units(), build.units, workers, lease)
        build.arrange()
        _all(build, "shard", build.missing_shards(), len(build.arrangement.shards()), workers, lease)
        build.finish()


def _all(build: Build, what: str, missing: list[int], of: int, workers: int, lease: Lease) -> None:
    with progress(f"{what}s", of) as tell:
        if workers == 1 or len(missing) < 2:
            for i, number in enumerate(missing):
                tell(of - len(missing) + i)
                getattr(build, what)(number)
                lease.renew()
            return
        # spawn: a fork would take along the locks of whatever threads there are
        pool = ProcessPoolExecutor(
            min(workers, len(missing)), multiprocessing.get_context("spawn"), _start_worker, (build.dst,)
        )
        with pool:
            try:
                for done in as_completed([pool.submit(_work, what, number) for number in missing]):
                    done.result()
                    missing.pop()
                    tell(of - len(missing))
                    lease.renew()
            except BrokenProcessPool:
                raise SiteError("a worker was killed (out of memory?)", f"{AGAIN}; fewer --workers need less") from None
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise


_build: Build | None = None


def _start_worker(dst: Path) -> None:
    global _build
    _build = Build(dst)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    # A parent that is killed cannot tell its workers, and they would wait for more work for ever.
    threading.Thread(target=_leave_with_parent, daemon=True).start()


def _leave_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _work(what: str, number: int) -> None:
    getattr(_build, what)(number)


# ---------------------------------------------------------------------------------------------- as jobs of a cluster


def units_of(dst: str, worker: int, workers: int) -> None:
    """What array task ``worker`` of ``workers`` does in the first pass."""
    build = Build(Path(dst))
    for number in build.missing_units():
        if number % workers == worker:
            build.unit(number)


def arrange(dst: str) -> None:
    Build(Path(dst)).arrange()


def shards_of(dst: str, worker: int, workers: int) -> None:
    """What array task ``worker`` of ``workers`` does in the second pass."""
    build = Build(Path(dst))
    for number in build.missing_shards():
        if number % workers == worker:
            build.shard(number)


def finish(dst: str) -> None:
    Build(Path(dst)).finish()
