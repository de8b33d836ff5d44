"""Shards: what is written is read back, by us and by webdataset; what cannot be read is named, with its reason."""

from __future__ import annotations

import gzip
import io
import json
import os
import pickle
import shutil
import tarfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from longclip.data import shards
from longclip.data.index import index_folder
from longclip.data.shards import Sample, open_dataset, write_shard
from longclip.errors import SiteError, UserError


def picture(seed: int = 0, form: str = "JPEG", size: tuple[int, int] = (12, 8)) -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, form)
    return buffer.getvalue()


def sample(number: int, form: str = "JPEG") -> Sample:
    fields = {"article_license": "CC0-1.0", "number": number, "title": "Käfer"}
    return Sample(f"s{number:05}", picture(number, form), f"Fig. {number}: β-cells, 4 °C.\nB, detail. ", fields)


def write_tar(path: Path, members: list[tuple[str, bytes]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three shards of 3, 4 and 2 samples."""
    folder = tmp_path / "set"
    for name, numbers in (("train-0000", range(3)), ("train-0001", range(3, 7)), ("val-0000", range(7, 9))):
        write_shard(folder / f"{name}.tar", (sample(n) for n in numbers))
    return folder


def test_round_trip(folder: Path) -> None:
    seen: list[tuple[str, int]] = []
    summary = index_folder(folder, progress=lambda name, samples, _: seen.append((name, samples)))
    assert (summary.folder, summary.shards, summary.samples, summary.skipped) == (folder, 3, 9, {})
    assert seen == [("train-0000.tar", 3), ("train-0001.tar", 4), ("val-0000.tar", 2)]
    dataset = open_dataset(folder)
    assert dataset.names == ("train-0000.tar", "train-0001.tar", "val-0000.tar")
    assert dataset.sizes == (3, 4, 2)
    assert len(dataset) == 9
    read = [dataset.read(s, i) for s, size in enumerate(dataset.sizes) for i in range(size)]
    assert read == [sample(n) for n in range(9)]
    assert dataset.fields_and_text(1, 2) == (sample(5).key, sample(5).text, sample(5).fields)
    for shard, index in ((0, 3), (0, -1), (3, 0), (-1, 0)):
        with pytest.raises(IndexError):
            dataset.read(shard, index)


def test_same_samples_same_bytes(tmp_path: Path) -> None:
    for name in ("a.tar", "b.tar"):
        write_shard(tmp_path / name, (sample(n) for n in range(3)))
    assert (tmp_path / "a.tar").read_bytes() == (tmp_path / "b.tar").read_bytes()


def test_a_shard_is_whole_or_absent(tmp_path: Path) -> None:
    for bad in ("", "a.b", "/a", "../a", "a/../b", "folder/", sample(0).key):
        with pytest.raises(ValueError, match="key"):
            write_shard(tmp_path / "a.tar", [sample(0), Sample(bad, picture(), "text", {})])
    with pytest.raises(ValueError, match="image"):
        write_shard(tmp_path / "a.tar", [Sample("a", b"no image", "text", {})])
    assert list(tmp_path.iterdir()) == []


def test_a_jpeg_of_several_pictures_is_written_as_jpeg(tmp_path: Path) -> None:
    """MPO, from phones: to every reader of JPEG its first picture."""
    buffer = io.BytesIO()
    first, second = (Image.open(io.BytesIO(picture(n))) for n in range(2))
    first.save(buffer, "MPO", save_all=True, append_images=[second])
    with Image.open(io.BytesIO(buffer.getvalue())) as image:
        assert image.format == "MPO"
    write_shard(tmp_path / "a.tar", [Sample("a", buffer.getvalue(), "text", {})])
    with tarfile.open(tmp_path / "a.tar") as tar:
        assert tar.getnames()[0] == "a.jpg"
    assert index_folder(tmp_path).skipped == {}
    assert open_dataset(tmp_path).read(0, 0).image == buffer.getvalue()


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "TIFF", "GIF", "BMP"])
def test_image_formats(tmp_path: Path, form: str) -> None:
    write_shard(tmp_path / "a.tar", [sample(0, form)])
    assert index_folder(tmp_path).samples == 1
    assert open_dataset(tmp_path).read(0, 0) == sample(0, form)


def test_webdataset_reads_the_same(folder: Path) -> None:
    webdataset = pytest.importorskip("webdataset")
    extra = [("a/b.JPG", picture(1)), ("a/b.txt", b" text"), ("a/b.cls", b"3"), ("x.y/c.png", picture(2, "PNG"))]
    write_tar(folder / "z.tar", [*extra, ("x.y/c.txt", b"no json"), ("d.seg.png", b"?")])
    summary = index_folder(folder)
    assert summary.skipped == {"no image member": 1}  # d: its extension is "seg.png", as webdataset has it
    dataset = open_dataset(folder)
    ours = [dataset.read(s, i) for s, size in enumerate(dataset.sizes) for i in range(size)]
    theirs = webdataset.WebDataset([str(folder / n) for n in dataset.names], shardshuffle=False, empty_check=False)
    read = [
        Sample(s["__key__"], s.get("jpg") or s["png"], s["txt"].decode(), json.loads(s.get("json", b"{}")))
        for s in theirs
        if "txt" in s
    ]
    assert ours == read
    assert len(ours) == 11


def test_skipped_with_reason(tmp_path: Path) -> None:
    good = picture()
    bmp = picture(0, "BMP")
    huge, large = (bmp[:18] + side.to_bytes(4, "little") * 2 + bmp[26:] for side in (60_000, 8_000))
    cases: list[tuple[str, list[tuple[str, bytes]], str]] = [
        ("a", [("a.txt", b"t")], "no image member"),
        ("b", [("b.jpg", good)], "no text member"),
        ("c", [("c.jpg", good), ("c.txt", b" \n\t")], "empty text"),
        ("d", [("d.jpg", good), ("d.txt", b"\xff\xfe")], "text is not UTF-8"),
        ("e", [("e.jpg", good), ("e.txt", b"t"), ("e.json", b"[1]")], "json is not a JSON object"),
        ("f", [("f.jpg", good), ("f.txt", b"t"), ("f.json", b"{")], "json is not a JSON object"),
        ("g", [("g.jpg", good), ("g.txt", b"t"), ("g.json", b"[" * 200_000)], "json is not a JSON object"),
        ("h", [("h.jpg", b"GIF8"), ("h.txt", b"t")], "image header is not readable"),
        ("i", [("i.jpg", b""), ("i.txt", b"t")], "image header is not readable"),
        ("j", [("j.bmp", huge), ("j.txt", b"t")], "image has more than 50 MPixel"),
        ("k", [("k.bmp", large), ("k.txt", b"t")], "image has more than 50 MPixel"),
        ("l", [("l.jpg", good), ("l.png", good), ("l.txt", b"t")], "more than one image member"),
        ("/m.jpg", [("/m.jpg", good)], "name points out of the folder"),
        ("x/../n.jpg", [("x/../n.jpg", good)], "name points out of the folder"),
        ("README", [("README", b"hello")], "name is not <key>.<extension>"),
    ]
    members = [("ok1.jpg", good), ("ok1.txt", b"first")]
    for _, more, _ in cases:
        members += more
    members += [("ok2.jpeg", good), ("ok2.txt", b"second"), ("ok1.jpg", good), ("ok1.txt", b"again")]
    write_tar(tmp_path / "a.tar", members)
    summary = index_folder(tmp_path)
    assert summary.samples == 2
    expected = [(key, reason) for key, _, reason in cases]
    expected.append(("ok1", "key occurs again (a sample's members must lie side by side)"))
    entry = json.loads((tmp_path / "index.json").read_text())["shards"][0]
    assert sorted((skip["key"], skip["reason"]) for skip in entry["skipped"]) == sorted(expected)
    assert sum(summary.skipped.values()) == len(expected)
    assert [open_dataset(tmp_path).read(0, i).text for i in range(2)] == ["first", "second"]


def test_the_same_sample_twice_in_a_row(tmp_path: Path) -> None:
    members = [("a.jpg", picture()), ("a.txt", b"first"), ("a.jpg", picture()), ("a.txt", b"second")]
    write_tar(tmp_path / "a.tar", members)
    assert list(index_folder(tmp_path).skipped.values()) == [1]
    assert open_dataset(tmp_path).read(0, 0).text == "first"


def test_links_are_skipped(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, kind in (("a.jpg", tarfile.SYMTYPE), ("a.txt", tarfile.LNKTYPE), ("b.jpg", tarfile.FIFOTYPE)):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "/etc/hostname"
            tar.addfile(member)
        tar.addfile(tarfile.TarInfo("folder"))
    assert index_folder(tmp_path).skipped == {"a link or a special file": 3, "name is not <key>.<extension>": 1}
    with pytest.raises(UserError, match="no readable sample"):
        open_dataset(tmp_path)


def test_cut_at_any_byte_is_noticed(tmp_path: Path) -> None:
    whole = write_tar(tmp_path / "whole.tar", [("a.jpg", b"x" * 700), ("a.txt", b"t"), ("b.txt", b"y")]).read_bytes()
    content = 512 * 3 + 1024 + 512 + 512
    assert not any(whole[content:])
    path = tmp_path / "cut" / "a.tar"
    path.parent.mkdir()
    for size in sorted({0, 1, 300, 511, 512, 700, *range(0, content, 256), content - 1, content, content + 511}):
        path.write_bytes(whole[:size])
        with pytest.raises(UserError, match="not a whole, uncompressed tar") as caught:
            index_folder(path.parent)
        assert str(path) in caught.value.message
        assert caught.value.hint
    assert [p.name for p in path.parent.iterdir()] == ["a.tar"]  # nothing half-written is left behind
    path.write_bytes(whole)
    assert index_folder(path.parent).shards == 1


def test_not_a_tar(tmp_path: Path) -> None:
    whole = write_tar(tmp_path / "whole" / "a.tar", [("a.jpg", picture()), ("a.txt", b"t")]).read_bytes()
    garbled = bytearray(whole)
    garbled[512 + 1024 + 20] ^= 0xFF  # the second header
    noise = np.random.default_rng(0).integers(0, 256, 5000, dtype=np.uint8).tobytes()
    for data in (gzip.compress(whole), noise, b"a text file\n" * 100, bytes(garbled)):
        (tmp_path / "a.tar").write_bytes(data)
        with pytest.raises(UserError, match="not a whole, uncompressed tar"):
            index_folder(tmp_path)


def test_folder_errors(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such folder"):
        index_folder(tmp_path / "none")
    with pytest.raises(UserError, match=r"no \*\.tar"):
        index_folder(tmp_path)
    write_shard(tmp_path / "a.tar", [sample(0)])
    (tmp_path / "file").write_text("")
    with pytest.raises(SiteError) as caught:
        index_folder(tmp_path, tmp_path / "file" / "out")
    assert "--out" in (caught.value.hint or "")


def test_index_elsewhere(folder: Path, tmp_path: Path) -> None:
    before = sorted(folder.iterdir())
    index_folder(folder, tmp_path / "index", workers=2)
    assert sorted(folder.iterdir()) == before
    elsewhere = open_dataset(tmp_path / "index")
    assert elsewhere.read(1, 0) == sample(3)
    index_folder(folder)
    assert open_dataset(folder).hash == elsewhere.hash
    here, there = (json.loads((p / "index.json").read_text()) for p in (folder, tmp_path / "index"))
    assert here.pop("root") == "."
    assert there.pop("root") == str(folder)
    assert here == there


def test_glob(folder: Path) -> None:
    index_folder(folder)
    assert open_dataset(str(folder / "train-*.tar")).names == ("train-0000.tar", "train-0001.tar")
    assert open_dataset(folder / "val-0000.tar").read(0, 1) == sample(8)
    with pytest.raises(UserError, match=r"no shard matches 'test-\*\.tar'"):
        open_dataset(folder / "test-*.tar")


def test_hash_is_the_content(folder: Path, tmp_path: Path) -> None:
    index_folder(folder)
    hashes = {spec: open_dataset(folder / spec).hash for spec in ("*.tar", "train-*.tar", "val-*.tar")}
    assert len(set(hashes.values())) == 3
    shutil.copytree(folder, tmp_path / "moved")
    assert open_dataset(tmp_path / "moved").hash == hashes["*.tar"]
    write_shard(tmp_path / "moved" / "val-0000.tar", [sample(7), sample(9)])
    index_folder(tmp_path / "moved")
    assert open_dataset(tmp_path / "moved" / "train-*.tar").hash == hashes["train-*.tar"]
    assert open_dataset(tmp_path / "moved").hash != hashes["*.tar"]


def test_open_errors(folder: Path) -> None:
    with pytest.raises(UserError, match="no such folder"):
        open_dataset(folder / "none")
    with pytest.raises(UserError, match="not indexed") as caught:
        open_dataset(folder)
    assert caught.value.hint == f"longclip data index {folder}"
    index_folder(folder)
    index = folder / "index.json"
    whole = json.loads(index.read_text())
    for change in ({"version": 2}, {"shards": [{**whole["shards"][0], "name": "../x.tar"}]}, {"more": 1}):
        index.write_text(json.dumps({**whole, **change}))
        with pytest.raises(UserError, match="not an index that this version reads"):
            open_dataset(folder)
    index.write_text("{")
    with pytest.raises(UserError, match="not an index that this version reads"):
        open_dataset(folder)


def test_index_that_does_not_match(folder: Path) -> None:
    index_folder(folder)
    shard = folder / "train-0001.tar"
    whole = shard.read_bytes()
    shard.write_bytes(whole + bytes(512))
    with pytest.raises(UserError, match=f"is {len(whole) + 512:,} bytes, the index says {len(whole):,}") as caught:
        open_dataset(folder)
    assert "longclip data index" in (caught.value.hint or "")
    assert len(open_dataset(folder / "val-*.tar")) == 2
    shard.unlink()
    with pytest.raises(UserError, match="is not there"):
        open_dataset(folder)


def test_reading_what_changed_is_an_error(folder: Path) -> None:
    index_folder(folder)
    dataset = open_dataset(folder)
    shard = folder / "train-0000.tar"
    whole = shard.read_bytes()
    dataset.read(0, 0)
    os.truncate(shard, 1024)  # the same inode: the handle sees it
    with pytest.raises(OSError, match="ends within sample s00002"):
        dataset.read(0, 2)
    shard.write_bytes(whole.replace("β".encode(), b"\xff\xfe"))
    with pytest.raises(OSError, match="not as it was indexed"):
        dataset.fields_and_text(0, 0)
    write_shard(shard, [sample(n) for n in range(10, 13)])
    stale = open_dataset(folder)
    index_folder(folder)
    with pytest.raises(OSError, match="another index"):
        stale.read(0, 0)


def _open_files() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


def _keys(dataset: shards.Dataset) -> list[str]:
    return [dataset.read(s, i).key for s, size in enumerate(dataset.sizes) for i in range(size)]


def test_pickled_forked_and_threaded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "OPEN_SHARDS", 1)  # every change of shard closes one
    index_folder(folder)
    dataset = open_dataset(folder)
    keys = _keys(dataset)
    copy = pickle.loads(pickle.dumps(dataset))
    assert copy == dataset
    assert _keys(copy) == keys
    reader, writer = os.pipe()
    if (child := os.fork()) == 0:
        os.write(writer, json.dumps(_keys(dataset)).encode())
        os._exit(0)
    os.waitpid(child, 0)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        assert json.loads(pipe.read()) == keys
    with ThreadPoolExecutor(8) as pool:
        assert all(read == keys for read in pool.map(_keys, [dataset] * 64))
    opened = _open_files()
    for _ in range(20):
        _keys(dataset)
    assert _open_files() <= opened


def test_many_shards_stay_open_at_most(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "OPEN_SHARDS", 2)
    for n in range(5):
        write_shard(tmp_path / f"{n}.tar", [sample(n)])
    index_folder(tmp_path)
    dataset = open_dataset(tmp_path)
    before = _open_files()
    assert _keys(dataset) == [sample(n).key for n in range(5)]
    assert _open_files() == before + 2
