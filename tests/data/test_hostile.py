"""Hostile and broken files, thousands of them, drawn from a seed: an error that we know or a named skip, nothing else.

Tars (spliced, flipped, cut), the images and JSON inside them, and indexes. Nothing may crash, hang, or write a file
beside the index.
"""

from __future__ import annotations

import contextlib
import io
import json
import resource
import tarfile
import time
from pathlib import Path
from random import Random

import numpy as np
import pytest

from longclip.data.decode import square
from longclip.data.index import index_folder
from longclip.data.shards import open_dataset
from longclip.data.text import render
from longclip.errors import LongclipError
from tests.data.forms import form
from tests.data.test_shards import picture, write_tar

SLOWEST = 5.0
"""seconds for one small file, on a machine busy with other things: a hang, not a measure of speed"""


@pytest.fixture
def inputs(request: pytest.FixtureRequest) -> int:
    return int(request.param)


counts = pytest.mark.parametrize(
    "inputs", [300, pytest.param(10_000, marks=pytest.mark.slow)], ids=["fast", "many"], indirect=True
)

_NAMES = [
    "a.jpg",
    "../../escaped.jpg",
    "/tmp/escaped.txt",
    "a.txt",
    "a.json",
    "b/../../../escaped.json",
    "\udcff.jpg",
    "x" * 300 + ".png",
]
_JSON = [
    b"{",
    b"[" * 5000,
    b'{"a": NaN}',
    b'{"a": 1e999}',
    b'{"a": "\\ud800"}',
    b"\xff",
    b"null",
    b'{"a": {"b": ["c", null, 3]}}',
]


def _tar(random: Random) -> bytes:
    """A tar of a few samples, each good or bad in one of its members, then perhaps flipped, cut or spliced."""
    stream = io.BytesIO()
    form = random.choice([tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
    kinds = [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE]
    with tarfile.open(fileobj=stream, mode="w", format=form, errors="surrogateescape") as tar:
        for key in random.choices("abcd", k=random.randint(0, 5)):
            members = {f"{key}.jpg": picture(1), f"{key}.txt": b"text", f"{key}.json": b"{}"}
            name = random.choice([*members, *_NAMES])
            members[name] = random.choice([_image(random), b"text", b"", b"\xff\xfe", *_JSON])
            if random.random() < 0.2:
                del members[random.choice(list(members))]
            for name, data in members.items():
                member = tarfile.TarInfo(name)
                if random.random() < 0.05:
                    member.type, member.linkname = random.choice(kinds), "/etc/passwd"
                member.size = len(data) if member.isreg() else 0
                with contextlib.suppress(ValueError):  # a name that this form of tar cannot hold
                    tar.addfile(member, io.BytesIO(data))
    data = stream.getvalue()
    return data if random.random() < 0.5 else _spoiled(data, random)


def _image(random: Random) -> bytes:
    return _spoiled(picture(random.randrange(9), random.choice(["JPEG", "PNG", "BMP", "GIF", "TIFF", "WEBP"])), random)


def _spoiled(data: bytes, random: Random) -> bytes:
    kind = random.randrange(5)
    spoiled = bytearray(data)
    if kind == 0:
        return data
    if kind == 1:
        return data[: random.randrange(len(data) + 1)]
    if kind == 2:
        at = random.randrange(len(data) + 1)
        return data[:at] + random.randbytes(random.randint(1, 40)) + data[at:]
    for _ in range(random.choice([1, 3, 30])):
        # The head of a file, where the sizes stand, is hit more often.
        at = random.randrange(min(len(spoiled), random.choice([32, 512, len(spoiled)])))
        spoiled[at] = random.choice([0, 255, 127, spoiled[at] ^ (1 << random.randrange(8))])
    return bytes(spoiled)


def _quick(begun: float, what: object) -> None:
    assert time.monotonic() - begun < SLOWEST, f"hangs at {what}"


@counts
def test_tars(inputs: int, tmp_path: Path) -> None:
    """Each is refused with one error, or indexed: then whatever is in the order can be read."""
    folder = tmp_path / "deep" / "shards"
    folder.mkdir(parents=True)
    good = 0
    for number in range(inputs):
        random = Random(number)
        (folder / "a.tar").write_bytes(_tar(random))
        begun = time.monotonic()
        try:
            index_folder(folder)
            dataset = open_dataset(folder)
        except LongclipError as error:
            assert error.message
            continue
        finally:
            _quick(begun, number)
        for i in range(len(dataset)):
            read = dataset.read(0, i)
            assert read.text.strip()
            assert ".." not in read.key.split("/") and not read.key.startswith("/")
            good += 1
        assert sorted(p.name for p in folder.iterdir()) == ["a.tar", "a.tar.idx.npz", "index.json"]
    assert good > inputs // 4, "the tars are so bad that reading was hardly tried"
    assert [p.name for p in tmp_path.iterdir()] == ["deep"] and not Path("/tmp/escaped.txt").exists()


@counts
def test_images(inputs: int) -> None:
    """Pixels or ValueError, whichever crop and size; and no memory in the measure of what a header promises."""
    large = picture(3, "JPEG", (400, 300))
    pixels = 0
    for number in range(inputs):
        random = Random(number)
        data = _spoiled(large, random) if number % 4 == 0 else _image(random)
        crop = random.choice([None, (1.0, 1.0, 0, 0, 0, 0), (0.01, 1.0, *(random.random() for _ in range(4)))])
        begun = time.monotonic()
        try:
            found = square(data, form(random.choice([1, 24])), crop)
        except ValueError:
            continue
        finally:
            _quick(begun, number)
        assert found.dtype == np.uint8 and found.shape[0] == found.shape[1] and found.shape[2] == 3
        pixels += 1
    assert inputs // 10 < pixels < inputs
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < 4 * 2**20  # KiB


@counts
def test_indexes(inputs: int, tmp_path: Path) -> None:
    """An index.json or an .idx.npz that was tampered with: refused, or OSError, or what the tar holds."""
    write_tar(tmp_path / "a.tar", [(f"{k}.{e}", d) for k in "ab" for e, d in (("jpg", picture()), ("txt", k.encode()))])
    index_folder(tmp_path)
    whole = {name: (tmp_path / name).read_bytes() for name in ("index.json", "a.tar.idx.npz")}
    right = wrong = 0
    for number in range(inputs):
        random = Random(number)
        for name, data in whole.items():
            (tmp_path / name).write_bytes(data)
        name = random.choice(list(whole))
        (tmp_path / name).write_bytes(_spoiled(whole[name], random))
        begun = time.monotonic()
        try:
            dataset = open_dataset(tmp_path)
            for i in range(len(dataset)):
                assert dataset.read(0, i).text in ("a", "b")
                right += 1
        except (LongclipError, OSError):
            wrong += 1
        finally:
            _quick(begun, number)
    assert right and wrong


@counts
def test_json(inputs: int) -> None:
    """Whatever a field holds, a template makes text of it or nothing."""
    for number in range(inputs):
        random = Random(number)
        data = _spoiled(random.choice(_JSON), random)
        try:
            fields = json.loads(data)
        except (ValueError, RecursionError):
            continue
        assert isinstance(render("{a} {b} and {c}", fields if isinstance(fields, dict) else {"a": fields}), str)


def _indexed(folder: Path, members: list[tuple[str, bytes]]) -> Path:
    index_folder(write_tar(folder / "a.tar", members).parent)
    return folder / "a.tar"


def test_a_shard_of_the_same_size_with_other_samples_is_noticed(tmp_path: Path) -> None:
    """Sizes are all that open_dataset looks at: what lies at a sample's place is told by the header before it."""
    image = picture()
    shard = _indexed(tmp_path, [("a.jpg", image), ("a.txt", b"one"), ("b.jpg", image), ("b.txt", b"two")])
    dataset = open_dataset(tmp_path)
    assert dataset.read(0, 1).text == "two"
    size = shard.stat().st_size
    for members in (
        [("c.jpg", image), ("c.txt", b"one"), ("d.jpg", image), ("d.txt", b"two")],  # other keys
        [("a.txt", b"one"), ("a.jpg", image), ("b.txt", b"two"), ("b.jpg", image)],  # another order
        [("a.jpg", image[:-1]), ("a.txt", b"ones"), ("b.jpg", image), ("b.txt", b"too")],  # other sizes
    ):
        write_tar(shard, members)
        assert shard.stat().st_size == size
        with pytest.raises(OSError, match="is not where it was indexed"):
            open_dataset(tmp_path).read(0, 0)


def test_long_and_foreign_names_are_read(tmp_path: Path) -> None:
    """Their headers hold a part of the name or none of it."""
    keys = ["Käfer", "d/" * 60 + "deep", "x" * 180]
    _indexed(tmp_path, [(f"{k}.{e}", d) for k in keys for e, d in (("jpg", picture()), ("txt", b"t"))])
    dataset = open_dataset(tmp_path)
    assert [dataset.read(0, i).key for i in range(3)] == keys


@pytest.mark.parametrize("spoil", [b"", b"PK\x03\x04nonsense", None])
def test_an_index_that_cannot_be_read_says_so(tmp_path: Path, spoil: bytes | None) -> None:
    _indexed(tmp_path, [("a.jpg", picture()), ("a.txt", b"t")])
    index = tmp_path / "a.tar.idx.npz"
    index.write_bytes(index.read_bytes()[:-30] if spoil is None else spoil)
    with pytest.raises(OSError, match=r"cannot be read .*index the folder again"):
        open_dataset(tmp_path).read(0, 0)


def test_a_header_that_promises_gigapixels_costs_nothing() -> None:
    """The index skips such images; one that took the place of an indexed one is refused before it is decoded."""
    bmp = picture(0, "BMP")
    for side, said in ((60_000, "not a readable image"), (8_000, "more than 50 MPixel")):
        with pytest.raises(ValueError, match=said):
            square(bmp[:18] + side.to_bytes(4, "little") * 2 + bmp[26:], form(8), None)
