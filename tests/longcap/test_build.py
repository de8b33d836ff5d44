"""From articles to shards: every figure once, the same bytes however they were made, nothing lost silently."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset
from lxml import etree
from PIL import Image
from typer.testing import CliRunner

from longclip.cli import app
from longclip.data.index import index_folder
from longclip.data.shards import Dataset, Sample, open_dataset
from longclip.errors import LongclipError, SiteError, UserError
from longclip.longcap.build import begin
from longclip.longcap.hashes import near
from longclip.longcap.listing import articles_among
from longclip.longcap.options import Options
from longclip.track.lease import Lease
from tests.launch.small import environment
from tests.longcap.corpus import CC_BY, CC_BY_NC, article, jpeg, picture, write_article, write_corpus

REAL = Path(os.environ.get("LONGCLIP_TEST_DATA", Path(__file__).parents[3] / "shared" / "data")) / "jats/with-images"
needs_real = pytest.mark.skipif(not REAL.is_dir(), reason=f"no articles at {REAL} (LONGCLIP_TEST_DATA names others)")


def build(src: Path, dst: Path, *options: str | int | float | Path, code: int = 0) -> str:
    """What the command says; its exit code is asserted. In this process: starting one takes longer."""
    done = CliRunner().invoke(app, ["longcap", "build", *map(str, (src, dst, *options))])
    said = done.output
    if isinstance(done.exception, LongclipError):
        assert done.exception.exit_code == code, done.exception
        return f"{said}error: {done.exception}\n"
    assert done.exit_code == code, (said, done.exc_info)
    return said


def manifest(dst: Path) -> dict[str, Any]:
    return dict(json.loads((dst / "manifest.json").read_text()))


def skipped(dst: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in (dst / "skipped.jsonl").read_text().splitlines()]


def samples(dst: Path, shards: str = "*.tar") -> list[Sample]:
    dataset: Dataset = open_dataset(dst / shards)
    return [dataset.read(shard, i) for shard, size in enumerate(dataset.sizes) for i in range(size)]


def tree(folder: Path) -> dict[str, str]:
    """Name -> sha256 of every file, hidden ones too."""
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


# ------------------------------------------------------------------------------------------------------ what is built


@needs_real
def test_every_figure_of_the_records(tmp_path: Path) -> None:
    """``records.jsonl`` was joined by somebody else's program: figure by figure the same caption and image."""
    said = build(REAL, tmp_path / "out")
    assert "11 articles -> 104 pairs" in said and "skipped" not in said
    records = [json.loads(line) for line in (REAL / "records.jsonl").read_text().splitlines()]
    built = {(s.fields["article_doi"], s.fields["image_file_name"]): s for s in samples(tmp_path / "out")}
    assert len(built) == len(records) == 104
    left, whole = dict(built), 0
    for record in records:
        file = REAL / record["image"]
        doi = next(d for d, name in left if name == file.name and _same_picture(left[d, name].image, file))
        sample = left.pop((doi, file.name))
        ours, theirs = _words(sample.text), _words(record["caption"])
        # eLife puts the captions of its source data files into the figure's; records.jsonl left them there.
        assert theirs.startswith(ours), record["id"]
        assert theirs[len(ours) :] in _source_data(REAL / record["xml"], record["figure_id"]), record["id"]
        whole += ours == theirs
        assert sample.fields["image_figure_id"] == record["figure_id"]
        assert _words(sample.fields["image_label"]) == _words(record["label"] or "")
        assert sample.fields["long_caption"].startswith(sample.text[:40])
        cited = _words(" ".join(p for found in sample.fields["image_context"].values() for p in found))
        assert not record["mentions"] or cited
    assert not left and whole == 93


def _words(text: str) -> str:
    """Letters and digits: markup may or may not leave white space around what it marks."""
    return "".join(c for c in text if c.isalnum())


def _source_data(xml: Path, figure: str) -> str:
    """Words of the supplementary files that a figure names."""
    (found,) = etree.parse(xml).xpath("//fig[@id=$id]", id=figure)
    return _words("".join(t for e in found.iter("supplementary-material") for t in e.itertext()))


def _same_picture(data: bytes, file: Path) -> bool:
    with Image.open(io.BytesIO(data)) as a, Image.open(file) as b:
        if a.size != b.size:
            return False
        apart = np.asarray(a.convert("RGB"), dtype=int) - np.asarray(b.convert("RGB"), dtype=int)
    return float(np.abs(apart).mean()) < 4  # a PNG is encoded as JPEG, once


def test_what_is_built_is_what_webdataset_and_the_index_read(tmp_path: Path) -> None:
    src, dst = write_corpus(tmp_path / "src"), tmp_path / "out"
    build(src, dst, "--shard-size", 5, "--val", 0.3, "--test", 0.2)
    facts = manifest(dst)
    assert sum(facts["pairs"].values()) == 18 and min(facts["pairs"].values()) > 0, "choose other shares"
    sizes = Counter(name.partition("-")[0] for name in facts["sha256"] if name.endswith(".tar"))
    assert sizes == {split: -(-n // 5) for split, n in facts["pairs"].items()}
    stream = webdataset.WebDataset([str(p) for p in sorted(dst.glob("*.tar"))], shardshuffle=False)
    seen = {s["__key__"]: (s["jpg"], s["txt"].decode(), json.loads(s["json"])) for s in stream}
    ours = {s.key: (s.image, s.text, s.fields) for s in samples(dst)}
    assert seen == ours and len(ours) == 18
    written = {name: (dst / name).read_bytes() for name in ("index.json", "train-000000.tar.idx.npz")}
    index_folder(dst)
    assert {name: (dst / name).read_bytes() for name in written} == written
    sample = next(s for s in samples(dst) if s.key == "PMC1002_f1_0")
    assert sample.text == "Cell 2 in light 1. The membrane of cell 2 is seen from side 1, stained, at scale 10 µm."
    assert sample.image == (src / "group0/article2/f1.jpg").read_bytes(), "a sound JPEG is kept as it is"
    fields = sample.fields
    assert fields["article_license"] == "CC BY 4.0" and fields["article_accession_id"] == "PMC1002"
    assert fields["image_size"] == [96, 64] and fields["image_file_name"] == "f1.jpg"
    (cited,) = fields["image_context"]["f1"]
    assert cited.startswith("The membrane of cell 2 is folded twice") and cited in fields["article_text"]
    assert "folded twice" in fields["long_caption"] and sample.text in fields["long_caption"]
    parts = fields["long_caption_sentences"]
    assert " ".join(p["text"] for p in parts) == fields["long_caption"] and parts[0]["source"].startswith("caption")


def test_articles_stay_together_and_figures_are_shuffled(tmp_path: Path) -> None:
    src = write_corpus(tmp_path / "src", articles=24)
    build(src, tmp_path / "a", "--val", 0.3, "--test", 0.3)
    where: dict[str, set[str]] = {}
    for split in ("train", "val", "test"):
        for s in samples(tmp_path / "a", f"{split}-*.tar"):
            where.setdefault(s.fields["article_accession_id"], set()).add(split)
    assert len(where) == 24 and all(len(splits) == 1 for splits in where.values())
    keys = [s.key.partition("_")[0] for s in samples(tmp_path / "a", "train-*.tar")]
    together = sum(a == b for a, b in pairwise(keys))
    assert together < len(keys) / 3, "figures of an article lie apart"
    build(src, tmp_path / "b", "--val", 0.3, "--test", 0.3, "--seed", 1)
    assert [s.key for s in samples(tmp_path / "b")] != [s.key for s in samples(tmp_path / "a")]
    again = {s.key for s in samples(tmp_path / "b", "val-*.tar")}
    assert again == {s.key for s in samples(tmp_path / "a", "val-*.tar")}, "the seed moves no article to another split"
    write_article(src / "more", 99)
    build(src, tmp_path / "c", "--val", 0.3, "--test", 0.3)
    assert again <= {s.key for s in samples(tmp_path / "c", "val-*.tar")}, "nor does an article that is added"


# ----------------------------------------------------------------------------------------------------- the same bytes


def test_same_bytes_for_any_workers_and_after_kills(tmp_path: Path) -> None:
    src = write_corpus(tmp_path / "src")
    options = ("--shard-size", 4, "--val", 0.2, "--test", 0.2)
    build(src, tmp_path / "1", *options)
    whole = tree(tmp_path / "1")
    assert not any(name.startswith(".") for name in whole)
    for workers in (2, 4):
        build(src, tmp_path / str(workers), *options, "--workers", workers)
        assert tree(tmp_path / str(workers)) == whole
    kill_and_go_on(src, tmp_path / "killed", options, 3, whole)


@pytest.mark.slow
@needs_real
def test_same_bytes_after_20_kills(tmp_path: Path) -> None:
    options = ("--shard-size", 7, "--val", 0.2, "--test", 0.2)
    build(REAL, tmp_path / "1", *options)
    kill_and_go_on(REAL, tmp_path / "killed", options, 20, tree(tmp_path / "1"))


def kill_and_go_on(src: Path, dst: Path, options: tuple[Any, ...], kills: int, whole: dict[str, str]) -> None:
    """Starts the build again and again, kills all its processes at a random moment of work, and lets it end.

    Whenever it has ended it must be ``whole``; where that was before the last kill, it begins anew.
    """
    chance = random.Random(kills)
    command = [sys.executable, "-m", "longclip.cli", "longcap", "build", src, dst, *options, "--workers"]
    killed = 0
    for _ in range(3 * kills):
        workers = str(chance.choice([1, 2, 3]))
        work = subprocess.Popen(
            [*map(str, command), workers], env=environment(), start_new_session=True, stdout=subprocess.DEVNULL
        )
        before, deadline = progress_of(dst), time.monotonic() + 120
        wanted = max(1, before + chance.choice([0, 0, 1, 2]))
        while progress_of(dst) < wanted and work.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.005)
        time.sleep(chance.uniform(0, 0.3))
        if work.poll() is None:
            os.killpg(work.pid, signal.SIGKILL)
            killed += not (dst / "manifest.json").exists()
        work.wait()
        if killed == kills:
            break
        if (dst / "manifest.json").exists():
            build(src, dst, *options)  # it may have been killed while it removed what it had needed
            assert tree(dst) == whole
            shutil.rmtree(dst)
    assert killed == kills
    build(src, dst, *options)
    assert tree(dst) == whole


def progress_of(dst: Path) -> int:
    return sum(len(list((dst / ".build" / name).glob("[0-9]*.*"))) for name in ("units", "shards"))


def test_a_finished_build_is_left_alone_and_another_is_refused(tmp_path: Path) -> None:
    src, dst = write_corpus(tmp_path / "src", 3), tmp_path / "out"
    build(src, dst)
    whole = tree(dst)
    assert "was built already" in build(src, dst)
    assert "seed was 0, is 1" in build(src, dst, "--seed", 1, code=2)
    assert 'licenses was [], is ["CC BY"]' in build(src, dst, "--licenses", "cc by", code=2)
    write_article(src / "more", 50)
    assert "3 articles then, 4 now" in build(src, dst, code=2)
    assert tree(dst) == whole
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep")
    assert "holds something else" in build(src, tmp_path / "mine", code=2)
    assert tree(tmp_path / "mine").keys() == {"notes.txt"}
    assert "no article" in build(tmp_path / "mine", tmp_path / "none", code=2)
    assert not (tmp_path / "none").exists()
    assert "no such folder" in build(tmp_path / "gone", tmp_path / "none", code=2)
    assert "no licence is called 'CCBY'" in build(src, tmp_path / "none", "--licenses", "CCBY", code=2)
    assert "leave nothing to train on" in build(src, tmp_path / "none", "--val", 0.5, "--test", 0.5, code=2)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("--val", "1", "--val 1: input should be less than 1"),
        ("--test", "1.5", "--test 1.5: input should be less than 1"),
        ("--test", "inf", "--test inf: input should be a finite number"),
    ],
)
def test_a_share_that_is_none_is_one_line(tmp_path: Path, name: str, value: str, message: str) -> None:
    src = write_corpus(tmp_path / "src", 1)
    assert build(src, tmp_path / "out", name, value, code=2) == f"error: {message}\n"
    assert not (tmp_path / "out").exists()


def test_options_of_an_unfinished_build_cannot_be_changed(tmp_path: Path) -> None:
    src, dst = write_corpus(tmp_path / "src", 4), tmp_path / "out"
    work = subprocess.Popen(
        [sys.executable, "-m", "longclip.cli", "longcap", "build", src, dst], env=environment(), start_new_session=True
    )
    deadline = time.monotonic() + 60
    while not (dst / ".build" / "build.json").exists():
        assert work.poll() is None and time.monotonic() < deadline
        time.sleep(0.002)
    os.killpg(work.pid, signal.SIGKILL)
    work.wait()
    assert not (dst / "manifest.json").exists()
    assert "budget was 512, is 99" in build(src, dst, "--budget", 99, code=2)
    moved = src.rename(tmp_path / "moved")  # the articles are known by their names below SRC
    build(moved, dst)
    build(moved, tmp_path / "whole")
    assert tree(dst) == tree(tmp_path / "whole")


# ------------------------------------------------------------------------------------------------- what is left out


def test_licences_are_asked_for_by_name(tmp_path: Path) -> None:
    src = write_corpus(tmp_path / "src", 2)
    write_article(src / "nc", 30, license=CC_BY_NC)
    write_article(src / "none", 31, license="")
    said = build(src, tmp_path / "by", "--licenses", "CC BY,CC0")
    assert "licences: CC BY 4.0 3" in said and "! skipped 2: licence not asked for" in said
    assert {s["article"]: s["detail"] for s in skipped(tmp_path / "by")} == {
        "nc/article.nxml": "CC BY-NC 4.0",
        "none/article.nxml": "unknown",
    }
    build(src, tmp_path / "all")
    assert manifest(tmp_path / "all")["licenses"] == {"CC BY 4.0": 3, "CC BY-NC 4.0": 2, "unknown": 2}
    build(src, tmp_path / "unknown", "--licenses", "unknown, CC BY-NC 4.0")
    assert manifest(tmp_path / "unknown")["licenses"] == {"CC BY-NC 4.0": 2, "unknown": 2}


def test_a_figure_of_somebody_else_goes_by_its_own_licence(tmp_path: Path) -> None:
    src = tmp_path / "src"
    reserved = "<permissions><copyright-statement>Reprinted with permission from X.</copyright-statement></permissions>"
    for number, said in ((1, reserved), (2, f"<permissions>{CC_BY_NC}</permissions>"), (3, "")):
        file = write_article(src / str(number), number, 2)
        file.write_text(file.read_text().replace('<graphic xlink:href="f2"/>', f'{said}<graphic xlink:href="f2"/>'))
    free = write_article(src / "4", 4, 1, license=CC_BY_NC)  # whose text, the caption, is not free
    free.write_text(free.read_text().replace("<graphic", f"<permissions>{CC_BY}</permissions><graphic"))
    build(src, tmp_path / "by", "--licenses", "CC BY")
    assert {s.key for s in samples(tmp_path / "by")} == {f"PMC100{n}" for n in ("1_f1_0", "2_f1_0", "3_f1_0", "3_f2_0")}
    assert [(s["article"], s.get("figure"), s["reason"], s["detail"]) for s in skipped(tmp_path / "by")] == [
        ("1/article.nxml", "f2", "licence not asked for", "unknown"),
        ("2/article.nxml", "f2", "licence not asked for", "CC BY-NC 4.0"),
        ("4/article.nxml", None, "licence not asked for", "CC BY-NC 4.0"),
    ]
    build(src, tmp_path / "all")
    read = {s.key: (s.fields["article_license"], s.fields["license_source"]) for s in samples(tmp_path / "all")}
    assert read["PMC1001_f1_0"] == ("CC BY 4.0", "link")
    assert read["PMC1001_f2_0"] == ("unknown", "figure prose")
    assert read["PMC1002_f2_0"] == ("CC BY-NC 4.0", "figure link")
    assert read["PMC1004_f1_0"] == ("CC BY-NC 4.0", "link")
    assert manifest(tmp_path / "all")["licenses"] == {"CC BY 4.0": 4, "CC BY-NC 4.0": 2, "unknown": 1}


def test_the_same_article_and_the_same_image_are_built_once(tmp_path: Path) -> None:
    src = tmp_path / "src"
    doi = '<article-id pub-id-type="doi">10.1000/CELLS.1</article-id>'
    write_article(src / "a", 1)
    write_article(src / "b", 1, ids=doi)  # another folder, the DOI in capitals, no PMCID
    write_article(src / "c", 7, ids='<article-id pub-id-type="pmc">1001</article-id>')  # a's PMCID alone
    write_article(src / "d", 4)
    (src / "d" / "f1.jpg").write_bytes(jpeg(picture(101), 85))  # a's first figure, published again
    said = build(src, tmp_path / "out", "--val", 0, "--test", 0)
    assert {s.key for s in samples(tmp_path / "out")} == {"PMC1001_f1_0", "PMC1001_f2_0", "PMC1004_f2_0"}
    assert "! skipped 4: article built already" in said and "! skipped 1: image seen before" in said
    assert {"pair": "PMC1004_f1_0", "reason": "image seen before"} in skipped(tmp_path / "out")


def test_evaluation_images_are_left_out(tmp_path: Path) -> None:
    """A folder of images and indexed shards: found though they were scaled and compressed again."""
    src, held = write_corpus(tmp_path / "src"), tmp_path / "evaluation" / "deep"
    held.mkdir(parents=True)
    picture(401, (300, 200)).save(held / "x.png")
    (held / "broken.jpg").write_bytes(b"no image")
    os.mkfifo(held / "pipe.jpg")  # opened, it would wait for a writer for ever
    (held / "folder.jpg").mkdir()
    other = write_article(tmp_path / "other" / "article8", 8, 3)
    build(other.parents[1], tmp_path / "benchmark", "--val", 0, "--test", 0)
    options = ("--against", tmp_path / "evaluation", "--against", tmp_path / "benchmark", "--val", 0, "--test", 0)
    said = build(src, tmp_path / "out", *options)
    assert "! skipped 4: image of an evaluation set" in said
    out = {(s["article"], s["figure"]) for s in skipped(tmp_path / "out")}
    eight = {("group0/article8/article.nxml", f"f{n}") for n in (1, 2, 3)}
    assert out == {("group0/article4/article.nxml", "f1"), *eight}
    assert manifest(tmp_path / "out")["against"] == {"images": 4, "unreadable": 1}
    (tmp_path / "empty").mkdir()
    assert "no image there that can be read" in build(src, tmp_path / "no", "--against", tmp_path / "empty", code=2)


def test_near_is_what_comparing_all_with_all_finds() -> None:
    rng = np.random.default_rng(0)
    others = rng.integers(0, 2**64, 6000, dtype=np.uint64)
    asked = np.concatenate([rng.integers(0, 2**64, 3000, dtype=np.uint64), others[:600]])
    for i in range(600):  # neighbours at every distance from 0 to 7
        for bit in rng.choice(64, i % 8, replace=False):
            asked[3000 + i] ^= np.uint64(1) << np.uint64(bit)
    for distance in (0, 1, 2, 3, 4, 5, 6, 9, 16):
        expected = [bool((np.bitwise_count(others ^ one) <= distance).any()) for one in asked]
        assert near(asked, others, distance).tolist() == expected
        assert sum(expected) >= 600 * min(distance + 1, 8) // 8
    assert not near(asked, others[:0], 4).any() and not len(near(asked[:0], others, 4))


# ---------------------------------------------------------------------------------------------------- hostile input


def test_hostile_and_broken_input_is_named_and_counted(tmp_path: Path) -> None:
    src = write_corpus(tmp_path / "src", 2)
    secret = tmp_path / "secret.jpg"
    secret.write_bytes(jpeg(picture(9999)))
    for i, href in enumerate(
        ("../../secret", "../../secret.jpg", str(secret), "link", "https://example.org/f1.jpg", "..")
    ):
        write_article(src / f"href{i}", 40 + i, 1, href=href)
    (src / "href3" / "link.jpg").symlink_to(secret)
    names = {"DOI": '<article-id pub-id-type="doi">../../../{}/etc\x7f/.../a..b</article-id>'.format("x" * 300)}
    write_article(src / "name", 60, 1, ids=names["DOI"])
    (src / "new\nline é").mkdir()
    (src / "new\nline é" / "a.xml").write_text(article(61, 1, ids=""))
    (src / "new\nline é" / "f1.jpg").write_bytes(jpeg(picture(6101)))
    latin = Path(os.fsdecode(os.fsencode(src) + b"/\xff\xfe"))
    latin.mkdir()
    (latin / "a.nxml").write_text("<article><body/></article>")
    (src / "pipe").mkdir()
    os.mkfifo(src / "pipe" / "a.xml")
    for name, text in {
        "bomb": BOMB,
        "empty": "",
        "cut": article(62)[:700],
        "text": "no XML",
        "html": "<html/>",
    }.items():
        (src / name).mkdir()
        (src / name / "a.xml").write_text(text)
    images = {"zero": b"", "cut": jpeg(picture(1))[:300], "text": b"<svg/>", "huge": HUGE}
    for i, (name, data) in enumerate(images.items()):
        write_article(src / f"image-{name}", 70 + i, 1)
        (src / f"image-{name}" / "f1.jpg").write_bytes(data)
    (src / "loop").symlink_to(src)
    before = sorted(str(p) for p in tmp_path.iterdir())

    said = build(src, tmp_path / "out")
    assert sorted(str(p) for p in tmp_path.iterdir()) == sorted([*before, str(tmp_path / "out")])
    built = samples(tmp_path / "out")
    assert len(built) == 6 and not any(s.image == secret.read_bytes() for s in built)
    assert all(c.isalnum() or c in "-_" for s in built for c in s.key)
    named = {s["article"].split("/")[0]: s["reason"] for s in skipped(tmp_path / "out")}
    expected = {
        *(f"href{i}" for i in (0, 1, 2, 3, 5)),  # a URL may end in the name of a file beside the XML
        "bomb",
        "empty",
        "cut",
        "text",
        "html",
        "pipe",
        "loop",
        "\\udcff\\udcfe",
    }
    assert named.keys() == expected | {f"image-{name}" for name in images} and all(named.values())
    counts = manifest(tmp_path / "out")["skipped"]
    assert sum(counts.values()) == len(named) == len(skipped(tmp_path / "out"))
    assert all(f"! skipped {number}: {reason}" in said for reason, number in counts.items())


BOMB = (
    '<!DOCTYPE a [<!ENTITY a "aaaaaaaaaa">'
    + "".join(f'<!ENTITY {b} "{f"&{a};" * 10}">' for a, b in zip("abcdefgh", "bcdefghi", strict=True))
    + "]><article><body><p>&i;</p></body></article>"
)


def _huge() -> bytes:
    """The header of a JPEG of 60,000 x 60,000 pixels."""
    data = bytearray(jpeg(picture(3)))
    at = data.index(b"\xff\xc0") + 5
    data[at : at + 4] = (60000).to_bytes(2, "big") * 2
    return bytes(data)


HUGE = _huge()


@pytest.mark.parametrize("inputs", [150, pytest.param(5000, marks=pytest.mark.slow)])
def test_fuzzed_articles_and_images(tmp_path: Path, inputs: int) -> None:
    """Bytes changed at random, in XML and JPEG: the build ends well, and every figure is built or named."""
    chance = random.Random(inputs)
    for i in range(inputs):
        file = write_article(tmp_path / "src" / f"a{i}", i, 1, href="f{n}")
        for target in (file, file.with_name("f1.jpg")):
            if chance.random() < 0.7:
                target.write_bytes(mutated(target.read_bytes(), chance))
    build(tmp_path / "src", tmp_path / "out")
    built, left = samples(tmp_path / "out"), skipped(tmp_path / "out")
    assert len(built) + len(left) >= inputs and len(built) > inputs // 10 and len(left) > inputs // 10
    assert all(s["reason"] for s in left)
    assert index_folder(tmp_path / "out").skipped == {}, "what was built can be read"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "src"]


def mutated(data: bytes, chance: random.Random) -> bytes:
    out = bytearray(data)
    for _ in range(chance.randint(1, 6)):
        at = chance.randrange(max(1, len(out)))
        what = chance.randrange(4)
        if what == 0:
            out[at : at + 1] = bytes([chance.randrange(256)])
        elif what == 1:
            del out[at : at + chance.randrange(1, 60)]
        elif what == 2:
            out[at:at] = out[at : at + chance.randrange(1, 200)]
        else:
            out[at:at] = chance.choice(
                [b"&#0;", b"<!--", b"]]>", b"\xff\xd9", b"</fig>", b"&nbsp;", b"\x00", b"<fig/>"]
            )
    return bytes(out)


def test_a_full_disk_is_one_line_and_the_build_goes_on(tmp_path: Path) -> None:
    src, small = write_corpus(tmp_path / "src", 6), tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=80k", "tmpfs", small], capture_output=True)
    if mounted.returncode != 0:
        pytest.skip("mounting a small disk needs root")
    try:
        said = build(src, small / "out", code=3)
        assert "no room left" in said and "goes on" in said and said.count("\n") <= 4
        subprocess.run(["mount", "-o", "remount,size=8m", small], check=True)
        build(src, small / "out")
        build(src, tmp_path / "whole")
        assert tree(small / "out") == tree(tmp_path / "whole")
    finally:
        subprocess.run(["umount", small], check=True)
        shutil.rmtree(small, ignore_errors=True)


def test_bare_articles_that_share_a_folder_get_their_own_images_only(tmp_path: Path) -> None:
    src = tmp_path / "src"
    src.mkdir()
    for number in (1, 2):
        (src / f"{number}.xml").write_text(article(number, 1, license=CC_BY, href=f"paper{number}.g00{{n}}"))
    (src / "paper1.g001.jpg").write_bytes(jpeg(picture(1)))
    (src / "g001.jpg").write_bytes(jpeg(picture(5)))  # of which of the two?
    build(src, tmp_path / "out")
    assert [s.key for s in samples(tmp_path / "out")] == ["PMC1001_f1_0"]
    assert [(s["article"], s["reason"]) for s in skipped(tmp_path / "out")] == [("2.xml", "image missing")]


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ("PMC1.nxml PMC2.xml PMC3.2.xml", "PMC1.nxml PMC2.xml PMC3.2.xml"),
        ("PMC1.nxml PMC1.xml PMC1-supp.xml supp1.xml", "PMC1.nxml"),
        ("main.nxml supp.XML .PMC2.xml", "main.nxml"),
        ("b.xml a.xml a.jpg", "a.xml b.xml"),
        ("a.jpg", ""),
    ],
)
def test_which_files_of_a_folder_are_articles(files: str, expected: str) -> None:
    assert articles_among(files.split()) == expected.split()


def test_articles_of_both_extensions_in_one_folder_are_all_built(tmp_path: Path) -> None:
    src = tmp_path / "src"
    src.mkdir()
    for number, name in ((1, "PMC1001.nxml"), (2, "PMC1002.xml")):
        (src / name).write_text(article(number, 1, href=f"paper{number}.tif"))  # PMC's files are .jpg
        (src / f"paper{number}.jpg").write_bytes(jpeg(picture(number)))
    build(src, tmp_path / "out")
    assert {s.key for s in samples(tmp_path / "out")} == {"PMC1001_f1_0", "PMC1002_f1_0"}


def test_an_xml_beside_an_article_takes_no_image_from_it(tmp_path: Path) -> None:
    src = tmp_path / "src"
    src.mkdir()
    (src / "main.xml").write_text(article(1, 1, href="f{n}.tif"))
    (src / "supplement.xml").write_text("<data/>")
    (src / "f1.JPG").write_bytes(jpeg(picture(1)))
    build(src, tmp_path / "out")
    assert [s.key for s in samples(tmp_path / "out")] == ["PMC1001_f1_0"]
    assert [(s["article"], s["reason"]) for s in skipped(tmp_path / "out")] == [("supplement.xml", "no article")]


@pytest.mark.parametrize("error", [errno.EACCES, errno.ENOENT, errno.EISDIR])
def test_a_file_that_may_not_be_read_is_named_and_the_rest_is_built(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: int
) -> None:
    src = write_corpus(tmp_path / "src", 3)
    bad = {src / "group0/article0/article.nxml", src / "group1/article1/f2.jpg"}
    fail_to_read(monkeypatch, bad, error)
    build(src, tmp_path / "out")
    assert len(samples(tmp_path / "out")) == 6 - 1 - 1
    named = [(s["article"], s.get("graphic"), s["reason"], s["detail"]) for s in skipped(tmp_path / "out")]
    assert named == [
        ("group0/article0/article.nxml", None, "unreadable file", os.strerror(error)),
        ("group1/article1/article.nxml", "f2", "image: unreadable file", os.strerror(error)),
    ]


@pytest.mark.parametrize("name", ["article.nxml", "f1.jpg"])
def test_a_disk_that_fails_stops_the_build_which_then_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    src = write_corpus(tmp_path / "src", 3)
    with monkeypatch.context() as patched:
        fail_to_read(patched, {src / "group0/article0" / name}, errno.ESTALE)
        said = build(src, tmp_path / "out", code=3)
    assert f"group0/article0/{name}: {os.strerror(errno.ESTALE)}" in said and "the same command goes on" in said
    build(src, tmp_path / "out")
    assert len(samples(tmp_path / "out")) == 6


def fail_to_read(patched: pytest.MonkeyPatch, bad: set[Path], error: int) -> None:
    read = Path.read_bytes

    def reading(path: Path) -> bytes:
        if path in bad:
            raise OSError(error, os.strerror(error), str(path))
        return read(path)

    patched.setattr(Path, "read_bytes", reading)


# Two at once


def test_a_refused_command_leaves_the_build_under_way_as_it_was(tmp_path: Path) -> None:
    """Its tasks, elsewhere, read the listing that it was begun with."""
    src, dst = write_corpus(tmp_path / "src", 4), tmp_path / "dst"
    assert begin(src, dst, Options()) is not None
    before = {path: path.read_bytes() for path in sorted((dst / ".build").glob("articles.*"))}
    assert len(before) == 2
    write_article(src / "aaa", 77, 1)
    with pytest.raises(UserError, match="begun with other articles"):
        begin(src, dst, Options())
    assert {path: path.read_bytes() for path in sorted((dst / ".build").glob("articles.*"))} == before
    assert not (dst / ".build" / "today").exists()


def test_who_does_not_get_the_lease_removes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    src, dst = write_corpus(tmp_path / "src", 2), tmp_path / "dst"
    monkeypatch.setattr("longclip.track.lease.WAIT", 0.1)
    (dst / ".build").mkdir(parents=True)
    with Lease(dst / ".build" / "lock"):
        (dst / ".build" / "against.npy").write_bytes(b"work of the first")
        with pytest.raises(SiteError):
            begin(src, dst, Options())
        assert (dst / ".build" / "against.npy").read_bytes() == b"work of the first"
