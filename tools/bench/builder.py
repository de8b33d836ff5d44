"""How fast `longclip longcap build` is on one core, and whether its memory stays flat.

    python tools/bench/builder.py ARTICLES [--rounds 5] [--articles 10000] [--pairs 24000000]

1. Time: both passes over ARTICLES in one process, against a bare lxml parse of every article and Pillow's decoding and
   JPEG encoding of every image that was built. The stricter ratio leaves out the encoding of sound JPEGs, which the
   builder keeps as they are. They take turns; medians.
2. Memory: a build of so many articles, ARTICLES' own XML over and over under other names, with a small drawn picture
   for every graphic; resident memory along the way.
3. The arrangement of so many pairs (drawn records), which is all that grows with the corpus: time and memory.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import platform
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import webdataset  # noqa: F401  # imported here, or the first build would pay for it
from lxml import etree
from PIL import Image

from longclip.data.shards import open_dataset
from longclip.longcap import images, jats
from longclip.longcap.arrangement import PLACE, Arrangement
from longclip.longcap.build import begin, build_here
from longclip.longcap.listing import find_articles, media_of
from longclip.longcap.options import Options
from longclip.longcap.unit import RECORD, Unit

ARTICLES, FIGURES = 6_000_000, 24_000_000
"""of PMC's open articles, by BIOMEDICA (arXiv 2501.07171)"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, metavar="ARTICLES")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--articles", type=int, default=10_000, help="of the build whose memory is watched; 0: none")
    parser.add_argument("--pairs", type=int, default=FIGURES, help="of the arrangement; 0: none")
    parser.add_argument("--tokenizer", help="counts the budget; default: words")
    asked = parser.parse_args()
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}")
    with tempfile.TemporaryDirectory(prefix="longclip-bench-") as folder:
        bench_time(asked.source, Path(folder), asked.rounds, asked.tokenizer)
        if asked.articles:
            bench_memory(asked.source, Path(folder), asked.articles, asked.tokenizer)
        if asked.pairs:
            bench_arrangement(Path(folder), asked.pairs)


# ------------------------------------------------------------------------------------------------------------- 1. time


def bench_time(source: Path, folder: Path, rounds: int, tokenizer: str | None) -> None:
    options = Options(tokenizer=tokenizer, val=0, test=0)
    build = folder / "build"
    _build(source, build, options)
    files = [(source / place.name).read_bytes() for place in find_articles(source)]
    pictures = _pictures(source, build)
    pairs = len(open_dataset(build))
    work: dict[str, Callable[[], object]] = {
        "build, both passes": lambda: _build(source, build, options),
        "lxml, bare parse": lambda: [etree.fromstring(data, _parser()) for data in files],
        "Pillow, decode + encode": lambda: [_decode(data, encode=True) for data in pictures],
        "Pillow, what must be": lambda: [_decode(data, encode=False) for data in pictures],
    }
    took: dict[str, list[tuple[float, float]]] = {name: [] for name in work}
    for _ in range(rounds):
        shutil.rmtree(build)
        for name, one in work.items():
            took[name].append(_seconds(one))
    print(
        f"\n{len(files)} articles, {pairs} pairs, {sum(map(len, files)) / 1e6:.1f} MB of XML; {rounds} rounds, medians"
    )
    print("                              wall      CPU   seconds, one process")
    middle = {name: np.median(seconds, axis=0) for name, seconds in took.items()}
    for name, (wall, cpu) in middle.items():
        print(f"  {name:24s} {wall:8.2f} {cpu:8.2f}")
    whole, parse, full, less = middle.values()
    print("  to parse, decode, encode {:7.2f}x {:7.2f}x  target: at most 3".format(*whole / (parse + full)))
    print("  to parse and what must be{:7.2f}x {:7.2f}x  a sound JPEG is decoded only".format(*whole / (parse + less)))
    for number, of, what in ((ARTICLES, len(files), "articles"), (FIGURES, pairs, "figures")):
        hours = whole[1] / of * number / 3600
        print(f"  {number:,} {what} like these: {hours:,.0f} CPU-hours, {hours / 24 / 64:.1f} days on 64 cores")


def _build(source: Path, dst: Path, options: Options) -> None:
    work = begin(source, dst, options)
    assert work is not None
    with contextlib.redirect_stderr(io.StringIO()):
        build_here(work, 1)


def _seconds(work: Callable[[], object]) -> tuple[float, float]:
    """By the clock, and of this process's CPU."""
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - wall, time.process_time() - cpu


def _parser() -> etree.XMLParser:
    return etree.XMLParser(resolve_entities=False, load_dtd=False, no_network=True)


def _pictures(source: Path, build: Path) -> list[bytes]:
    """The files of the images that were built, as they lie beside the articles."""
    found = []
    for place in find_articles(source):
        with contextlib.suppress(jats.BadArticle):
            article = jats.parse((source / place.name).read_bytes())
            hrefs = [href for figure in article.figures if figure.caption for href in figure.graphics]
            media = media_of(source, place, hrefs)
            found += [path.read_bytes() for href in hrefs if (path := images.find(href, media)) is not None]
    return found


def _decode(data: bytes, encode: bool) -> int:
    """Pixels."""
    with Image.open(io.BytesIO(data)) as image:
        sound = image.format == "JPEG" and image.mode in ("L", "RGB")
        plain = image.convert("RGB")
        if encode or not sound:
            plain.save(io.BytesIO(), "JPEG", quality=images.QUALITY)
        return plain.width * plain.height


# ----------------------------------------------------------------------------------------------------------- 2. memory


def bench_memory(source: Path, folder: Path, articles: int, tokenizer: str | None) -> None:
    many = folder / "many"
    _repeat(source, many, articles)
    command = [sys.executable, "-m", "longclip.cli", "longcap", "build", str(many), str(folder / "out")]
    command += ["--tokenizer", tokenizer] if tokenizer else []
    print(f"\na build of {articles:,} articles, one process: resident memory by what was done")
    work = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    seen: list[tuple[str, float]] = []
    while work.poll() is None:
        seen.append((_done(folder / "out" / ".build"), _resident(work.pid)))
        time.sleep(0.2)
    assert work.stdout is not None
    said = work.stdout.read()
    for i in range(10):
        at = len(seen) * i // 10
        part = seen[at : max(at + 1, len(seen) * (i + 1) // 10)]
        print(f"  {part[-1][0]:24s} at most {max(rss for _, rss in part):6.0f} MiB")
    print("  " + said.strip().replace("\n", "\n  "))


def _repeat(source: Path, many: Path, articles: int) -> None:
    """``articles`` folders: the XML of ``source`` under another DOI, and drawn pictures under the names of its own."""
    originals = []
    for place in find_articles(source):
        data = (source / place.name).read_bytes()
        article = jats.parse(data)
        hrefs = [href for figure in article.figures for href in figure.graphics]
        media = media_of(source, place, hrefs)
        found = [path.name for href in hrefs if (path := images.find(href, media)) is not None]
        originals.append((data, article.doi.encode(), article.pmcid.removeprefix("PMC").encode(), found))
    rng = np.random.default_rng(0)
    for number in range(articles):
        data, doi, pmcid, names = originals[number % len(originals)]
        folder = many / f"{number // 1000:04d}" / f"{number:07d}"
        folder.mkdir(parents=True)
        for identity in filter(None, (doi, pmcid)):
            data = data.replace(identity, identity + b"%d" % number)
        (folder / "article.nxml").write_bytes(data)
        for name in names:
            cells = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
            picture = Image.fromarray(cells).resize((96, 96), Image.Resampling.BICUBIC)
            picture.save(folder / name, "PNG" if name.endswith(".png") else "JPEG")


def _done(folder: Path) -> str:
    units, shards = (len(list((folder / name).glob("[0-9]*.[nj]*"))) for name in ("units", "shards"))
    return f"{units} units, {shards} shards"


def _resident(pid: int) -> float:
    """MiB"""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0.0
    return next((int(line.split()[1]) / 1024 for line in status.splitlines() if line.startswith("VmRSS")), 0.0)


# ------------------------------------------------------------------------------------------------------ 3. arrangement


def bench_arrangement(folder: Path, pairs: int) -> None:
    script = f"import tools.bench.builder as b; from pathlib import Path; b.arrange(Path({str(folder)!r}), {pairs})"
    root = str(Path(__file__).resolve().parents[2])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    told = json.loads(done.stdout)
    print(f"\nthe arrangement of {pairs:,} pairs: {told['seconds']:.0f} s, {told['peak'] / 2**20:.2f} GiB at most")
    print(f"  on disk {RECORD.itemsize} bytes a pair from the units, {PLACE.itemsize} for its place")


def arrange(folder: Path, pairs: int) -> None:
    """In a process of its own: prints the seconds and the peak in KiB."""
    units, each = folder / "units", 1_000_000
    units.mkdir()
    rng = np.random.default_rng(0)
    number = -(-pairs // each)
    for i in range(number):
        records = np.zeros(min(each, pairs - i * each), dtype=RECORD)
        for name in ("image", "order"):
            records[name] = rng.integers(0, 2**64, len(records), dtype=np.uint64)
        records["article"] = (np.arange(len(records)) + i * each) // 4
        records["doi"] = records["article"] + 1
        records["split"] = np.repeat(rng.choice(3, -(-len(records) // 4), p=[0.98, 0.01, 0.01]), 4)[: len(records)]
        np.savez(Unit(units, i).record, records=records, skips=np.zeros(0, dtype=np.uint8))
        Unit(units, i).pairs.touch()
    start = time.perf_counter()
    Arrangement(folder).make(units, number, Options())
    seconds = time.perf_counter() - start
    print(json.dumps({"seconds": seconds, "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss}))


if __name__ == "__main__":
    main()
