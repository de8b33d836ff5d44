"""Readers: the images and labels that were written, and mistakes told in one line; broken and hostile files too."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from numpy.typing import NDArray
from PIL import Image

from longclip.errors import LongclipError, UserError
from longclip.evaluate.classes import Classification
from longclip.evaluate.readers import Labelled, open_labelled
from tests.evaluate.forms import FORMS, NAMES, SEVERAL, order, pixels, png, task, write

IMAGES = pixels(17)
LABELS = np.random.default_rng(3).permutation(np.arange(17) % 3)
SETS = np.random.default_rng(4).integers(0, 2, (17, 3))


def seen(found: Labelled, i: int) -> NDArray[np.uint8]:
    data = found.image(i)
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB")) if isinstance(data, bytes) else data


@pytest.mark.parametrize("reader", FORMS)
def test_the_images_and_labels_that_were_written(reader: str, tmp_path: Path) -> None:
    found = open_labelled(*write(reader, tmp_path, IMAGES, LABELS))
    places = order(reader, LABELS)
    assert found.labels.tolist() == LABELS[places].tolist()
    assert found.candidates is None and len(set(found.keys)) == 17
    for i in [*range(17), 0, 16, 9, 9, 8, 3]:  # in order, and not
        assert np.array_equal(seen(found, i), IMAGES[places[i]])


@pytest.mark.parametrize("reader", SEVERAL)
def test_several_labels(reader: str, tmp_path: Path) -> None:
    found = open_labelled(*write(reader, tmp_path, IMAGES, SETS))
    assert found.labels.tolist() == SETS.tolist()


@pytest.mark.parametrize("reader", FORMS)
def test_the_hash_tells_states_of_the_data_apart(reader: str, tmp_path: Path) -> None:
    def read(name: str, labels: NDArray[np.int64], **more: Any) -> str:
        root = tmp_path / name
        root.mkdir()
        return open_labelled(*write(reader, root, IMAGES, labels, **more)).hash

    assert read("a", LABELS) == read("b", LABELS), "wherever it lies"
    assert read("c", LABELS[::-1].copy()) != read("d", LABELS)
    turned = {name: [name] for name in reversed(NAMES)}
    assert read("e", LABELS, classes=turned) != read("f", LABELS), "the order of classes says what numbers mean"


def test_other_pixels_in_an_npz_of_the_same_size(tmp_path: Path) -> None:
    hashes = set()
    for images in (IMAGES, IMAGES[:, ::-1], IMAGES):
        np.savez(tmp_path / "m.npz", test_images=np.ascontiguousarray(images), test_labels=LABELS[:, None])
        hashes.add(open_labelled(task("medmnist"), tmp_path / "m.npz").hash)
    assert len(hashes) == 2


@pytest.mark.parametrize("shape", [(28, 28), (64, 64, 3), (28, 28, 1)])
def test_grey_and_colour_arrays(shape: tuple[int, ...], tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (5, *shape), dtype=np.uint8)
    np.savez(tmp_path / "u.npz", val_images=images, val_labels=np.arange(5)[:, None] % 3)
    found = open_labelled(task("medmnist", split="val"), tmp_path / "u.npz")
    assert [np.array_equal(np.asarray(found.image(i)), images[i]) for i in (0, 4, 2)] == [True] * 3
    with h5py.File(tmp_path / "u.h5", "w") as file:
        file["g/pixels"], file["g/class"] = images, np.arange(5) % 3
    found = open_labelled(task("hdf5", image="g/pixels", label="g/class"), tmp_path / "u.h5")
    assert found.labels.tolist() == [0, 1, 2, 0, 1] and np.array_equal(np.asarray(found.image(3)), images[3])


def test_labels_in_columns_of_their_own(tmp_path: Path) -> None:
    """As CheXpert has them, with image paths that start elsewhere than the CSV lies."""
    (tmp_path / "deep/er").mkdir(parents=True)
    (tmp_path / "deep/er/a.png").write_bytes(png(IMAGES[0]))
    (tmp_path / "valid.csv").write_text("Path,Age,A,B,C\ndeep/er/a.png,60,1.0,0.0,1.0\n")
    asked = task("csv", image="Path", label=["A", "B", "C"], multi_label=True, labels="valid.csv")
    assert open_labelled(asked, tmp_path, tmp_path / "valid.csv").labels.tolist() == [[1, 0, 1]]


def questions() -> list[dict[str, Any] | None]:
    return [
        {"options": ["a b", "c", "d"], "answer": "c"},
        {"options": ["yes", "no"], "answer": "yes"},
        None,
        {"options": ["p", "q", "r", "s"], "answer": "s"},
    ]


def test_every_image_with_its_own_candidates(tmp_path: Path) -> None:
    """Of different number; a row without a question is left out, and named."""
    rows = {"image": [png(x) for x in IMAGES[:4]], "questions": [{"stain": q} for q in questions()]}
    pq.write_table(pa.table(rows), tmp_path / "q.parquet")
    own = task("parquet", label="questions.stain.answer", candidates="questions.stain.options")
    found = open_labelled(own, tmp_path / "q.parquet")
    assert found.candidates == [("a b", "c", "d"), ("yes", "no"), ("p", "q", "r", "s")]
    assert found.labels.tolist() == [1, 0, 3] and found.left_out == ("q.parquet:2: no question",)
    assert [np.array_equal(seen(found, i), IMAGES[k]) for i, k in enumerate((0, 1, 3))] == [True] * 3
    (tmp_path / "i.png").write_bytes(png(IMAGES[0]))
    (tmp_path / "q.csv").write_text(
        'image,label,options\ni.png,1,"[""x"", ""y""]"\ni.png,y,"[""x"", ""y""]"\ni.png,,\n'
    )
    found = open_labelled(task("csv", candidates="options"), tmp_path / "q.csv")
    assert found.labels.tolist() == [1, 1] and len(found.left_out) == 1


def test_classes_called_by_numbers(tmp_path: Path) -> None:
    """Grades 1 to 3 are meant by their names, and not by their places from 0 on."""
    (tmp_path / "i.png").write_bytes(png(IMAGES[0]))
    (tmp_path / "g.csv").write_text("image,label\ni.png,1\ni.png,3.0\n")
    grades = {"1": "w1", "2": "w2", "3": "w3"}
    assert open_labelled(task("csv", classes=grades), tmp_path / "g.csv").labels.tolist() == [0, 2]
    (tmp_path / "g.csv").write_text("image,label\ni.png,0\n")
    with pytest.raises(UserError, match=r"line 2, column label is '0'; valid: 1, 2, 3$"):
        open_labelled(task("csv", classes=grades), tmp_path / "g.csv")


# ---- mistakes ------------------------------------------------------------------------------------------------------


def npz(**arrays: Any) -> Callable[[Path], tuple[Classification, Path]]:
    def make(root: Path) -> tuple[Classification, Path]:
        np.savez(root / "m.npz", **arrays)
        return task("medmnist"), root / "m.npz"

    return make


def table(text: str, **more: Any) -> Callable[[Path], tuple[Classification, Path]]:
    def make(root: Path) -> tuple[Classification, Path]:
        (root / "i.png").write_bytes(png(IMAGES[0]))
        (root / "t.csv").write_bytes(text.encode("latin-1"))
        return task("csv", **more), root / "t.csv"

    return make


def parquet(**more: Any) -> Callable[..., Callable[[Path], tuple[Classification, Path]]]:
    def rows(**columns: Any) -> Callable[[Path], tuple[Classification, Path]]:
        def make(root: Path) -> tuple[Classification, Path]:
            pq.write_table(pa.table(columns), root / "p.parquet")
            return task("parquet", **more), root / "p.parquet"

        return make

    return rows


def hdf5(**arrays: Any) -> Callable[[Path], tuple[Classification, Path]]:
    def make(root: Path) -> tuple[Classification, Path]:
        with h5py.File(root / "h.h5", "w") as file:
            for name, array in arrays.items():
                file[name] = array
        return task("hdf5"), root / "h.h5"

    return make


def folders(*files: str, **more: Any) -> Callable[[Path], tuple[Classification, Path]]:
    def make(root: Path) -> tuple[Classification, Path]:
        for name in files:
            (root / "f" / name).parent.mkdir(parents=True, exist_ok=True)
            (root / "f" / name).write_bytes(b"")
        (root / "f").mkdir(exist_ok=True)
        return task("images", **more), root / "f"

    return make


def facts(fields: dict[str, Any], **more: Any) -> Callable[[Path], tuple[Classification, Path]]:
    def make(root: Path) -> tuple[Classification, Path]:
        from longclip.data.index import index_folder
        from longclip.data.shards import Sample, write_shard

        write_shard(root / "s" / "0.tar", [Sample("k0", png(IMAGES[0]), "t", fields)])
        index_folder(root / "s")
        return task("shards", **more), root / "s"

    return make


def raw(reader: str, name: str, data: bytes) -> Callable[[Path], tuple[Classification, Path]]:
    def make(root: Path) -> tuple[Classification, Path]:
        (root / name).write_bytes(data)
        return task(reader), root / name

    return make


ONE = IMAGES[:1]
MISTAKES: dict[str, tuple[Callable[[Path], tuple[Classification, Path]], str]] = {
    "npz: nothing there": (lambda root: (task("medmnist"), root / "no.npz"), "no such file: .*no.npz; valid is a Med"),
    "npz: a folder": (lambda root: (task("medmnist"), root), "a folder, not .*; valid is a MedMNIST .npz"),
    "npz: not one": (raw("medmnist", "m.npz", b"PK\3\4 no zip"), "m.npz is not a readable .npz"),
    "npz: no such array": (npz(train_images=ONE), "m.npz has no array 'test_images'; it has train_images"),
    "npz: no labels": (npz(test_images=ONE), "m.npz has no array 'test_labels'; it has test_images"),
    "npz: floats": (
        npz(test_images=ONE / 255.0, test_labels=[[0]]),
        "test_images is float64 .*; valid is uint8, .*width",
    ),
    "npz: volumes": (
        npz(test_images=np.zeros((2, 28, 28, 28), dtype=np.uint8), test_labels=[[0], [0]]),
        r"test_images is uint8 \[2, 28, 28, 28\]; valid is uint8",
    ),
    "npz: column-major": (
        npz(test_images=np.asfortranarray(IMAGES), test_labels=[[0]]),
        "test_images is of column-major",
    ),
    "npz: pickles": (npz(test_images=np.array([{}, None]), test_labels=[[0]]), "test_images is of Python objects"),
    "npz: fewer labels": (
        npz(test_images=IMAGES[:2], test_labels=[[0]]),
        "test_labels is int64 .*; valid .* of the 2 im",
    ),
    "npz: label out of range": (
        npz(test_images=IMAGES[:2], test_labels=[[0], [3]]),
        r"test_labels\[1\] is np.int64\(3\); valid: w1, w2, w3, or their numbers 0 to 2",
    ),
    "npz: label below": (npz(test_images=ONE, test_labels=[[-1]]), r"test_labels\[0\] is np.int64\(-1\); valid: w1"),
    "npz: labels of floats": (
        npz(test_images=ONE, test_labels=[[0.5]]),
        "test_labels is float64 .*valid are whole numb",
    ),
    "npz: several labels": (
        npz(test_images=ONE, test_labels=[[0, 1]]),
        "holds 2 labels an image; valid is one, or `mul",
    ),
    "npz: no images": (
        npz(test_images=IMAGES[:0], test_labels=np.zeros((0, 1), int)),
        "no images to classify in .*m.npz",
    ),
    "csv: missing column": (table("image,lable\n"), "t.csv has no column 'label'; it has image, lable"),
    "csv: column twice": (table("image,label,label\n"), "t.csv has no single column 'label'"),
    "csv: empty": (table(""), "t.csv has no column 'image'; it has none"),
    "csv: no rows": (table("image,label\n"), "no images to classify in .*t.csv"),
    "csv: unknown class": (
        table("image,label\ni.png,w1\ni.png,w9\n"),
        "line 3, column label is 'w9'; valid: w1, w2, w3",
    ),
    "csv: no label": (table("image,label\ni.png,\n"), "line 2, column label is ''; valid"),
    "csv: short row": (table("image,label\ni.png\n"), r"line 2 has not as many cells as there are columns \(2\)"),
    "csv: long row": (table("image,label\ni.png,w1,w2\n"), "line 2 has not as many cells"),
    "csv: no file": (table("image,label\nj.png,w1\n"), "line 2, column image: 'j.png' is no file; paths start at /"),
    "csv: a path out": (table("image,label\n../../etc/passwd,w1\n"), "'../../etc/passwd' leads out of the folder"),
    "csv: an absolute path": (table("image,label\n/etc/passwd,w1\n"), "'/etc/passwd' leads out of the folder"),
    "csv: not UTF-8": (table("image,label\ni.png,caf\xe9\n"), "t.csv is not text in UTF-8"),
    "csv: a field too long": (table(f"image,label\ni.png,{'x' * 200_000}\n"), "line . is not a line of a CSV"),
    "csv: labels not 0 or 1": (
        table("image,a,b,c\ni.png,1,0,-1.0\n", label=["a", "b", "c"], multi_label=True),
        r"line 2, column a, b, c is \['1', '0', '-1.0'\]; valid: 0 or 1 for each of the 3 classes",
    ),
    "csv: candidates missing": (
        table("image,label,own\ni.png,1,\n", candidates="own"),
        "candidates are None; valid is a list of two texts or more",
    ),
    "csv: candidates no list": (
        table("image,label,own\ni.png,1,a|b\n", candidates="own"),
        "candidates is not a JSON list; valid is a list of texts",
    ),
    "csv: one candidate": (table('image,label,own\ni.png,0,"[""a""]"\n', candidates="own"), "valid is a list of two"),
    "csv: candidates twice": (
        table('image,label,own\ni.png,0,"[""a"", ""a""]"\n', candidates="own"),
        "one of them twice; no text tells them apart",
    ),
    "csv: answer not among them": (
        table('image,label,own\ni.png,c,"[""a"", ""b""]"\n', candidates="own"),
        "is 'c'; valid: one of a, b, or its place from 0",
    ),
    "csv: column of candidates": (table("image,label\n", candidates="own"), "no column 'own'; it has image, label"),
    "parquet: not one": (raw("parquet", "p.parquet", b"PAR1 no PAR1"), "p.parquet cannot be read as parquet"),
    "parquet: none": (
        lambda root: (task("parquet"), root),
        r"no such file: .*\*.parquet; valid is a .parquet file, a fo",
    ),
    "parquet: no column": (parquet()(image=[b"x"], lable=[1]), "p.parquet has no column 'label'; it has image, lable"),
    "parquet: no image": (parquet()(img=[b"x"], label=[1]), "p.parquet has no column 'image'; it has img, label"),
    "parquet: image is text": (
        parquet()(image=["a.png"], label=[1]),
        "column image is string; valid is binary, or a str",
    ),
    "parquet: no bytes in it": (
        parquet()(image=[{"path": "a"}], label=[1]),
        "column image is struct<path: string>; valid",
    ),
    "parquet: no field": (
        parquet(label="q.stain")(image=[b"x"], q=[{"domain": "a"}]),
        "p.parquet has no field 'q.stain'; it has q.domain",
    ),
    "parquet: no label": (
        parquet()(image=[b"x"], label=pa.array([None], pa.int64())),
        "row 0, column label is None; valid",
    ),
    "parquet: half a number": (parquet()(image=[b"x"], label=[0.5]), "row 0, column label is 0.5; valid: w1"),
    "hdf5: not one": (raw("hdf5", "h.h5", b"\x89HDF\r\n"), "h.h5 cannot be read as HDF5"),
    "hdf5: gzipped": (
        lambda root: (task("hdf5"), root / "x.h5"),
        "no such file: .*x.h5; valid is an HDF5 file .gunzip it",
    ),
    "hdf5: no array": (hdf5(a=ONE), "h.h5 has no array 'x'; it has a"),
    "hdf5: no labels": (hdf5(x=ONE), "h.h5 has no array 'y'; it has x"),
    "hdf5: floats": (hdf5(x=ONE.astype(float), y=[0]), "h.h5: x is float64"),
    "hdf5: fewer labels": (hdf5(x=IMAGES, y=[0, 1]), r"h.h5: y is int64 \[2\]; valid are whole numbers"),
    "hdf5: out of range": (hdf5(x=ONE, y=[7]), r"h.h5: y\[0\] is .*7.*; valid: w1, w2, w3"),
    "folder: none": (lambda root: (task("images"), root / "no"), "no such folder: .*no; valid is a folder that holds"),
    "folder: empty": (folders(), "no images of w1, w2, w3 in .*f; every class has a folder of its name"),
    "folder: a class without images": (
        folders("w1/a.png", "w3/c.jpeg", "w2/notes.txt"),
        "no images of w2 in .*f; every",
    ),
    "folder: a folder too many": (
        folders("w1/a.png", "w9/a.png"),
        "w9/a.png lies in no class's folder; valid: w1, w2, w3",
    ),
    "folder: loose": (folders("a.png"), "f/a.png lies in no class's folder"),
    "folder: two splits": (
        folders("train/w1/a.png", "test/w1/b.png"),
        "two folders of w1: test/w1 and train/w1; give the",
    ),
    "shards: not indexed": (lambda root: (task("shards"), root), "not indexed"),
    "shards: no field": (facts({"stain": 1}), "sample k0 has no field 'facts.1'; it has stain"),
    "shards: list too short": (facts({"facts": ["w1"]}), "sample k0 has no field 'facts.1'; it has facts"),
    "shards: unknown class": (facts({"facts": ["w1", "w7"]}), "sample k0, field facts.1 is 'w7'; valid: w1"),
    "shards: a mapping": (facts({"facts": ["w1", {}]}), "field facts.1 is {}; valid: w1"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_is_one_line_that_names_file_and_place(case: str, tmp_path: Path) -> None:
    make, expected = MISTAKES[case]
    asked, data = make(tmp_path)
    with pytest.raises(UserError, match=expected) as caught:
        open_labelled(asked, data)
    assert "\n" not in caught.value.message


def test_a_broken_image_is_the_image_s_fault(tmp_path: Path) -> None:
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    column = pa.array([{"bytes": None, "path": "/etc/passwd"}], kind)
    pq.write_table(pa.table({"image": column, "label": [0]}), tmp_path / "p.parquet")
    found = open_labelled(task("parquet"), tmp_path / "p.parquet")
    with pytest.raises(ValueError, match="no bytes"):
        found.image(0)


def test_arrays_of_other_files_are_refused(tmp_path: Path) -> None:
    """HDF5 can point out of itself in four ways."""
    (tmp_path / "secret.bin").write_bytes(bytes(16 * 16 * 3))
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file["x"] = ONE
    layout = h5py.VirtualLayout(ONE.shape, np.uint8)
    layout[:] = h5py.VirtualSource(str(tmp_path / "other.h5"), "x", ONE.shape)
    with h5py.File(tmp_path / "h.h5", "w") as file:
        file["y"] = [0]
        file["linked"] = h5py.ExternalLink(str(tmp_path / "other.h5"), "/x")
        file["group"] = h5py.ExternalLink(str(tmp_path / "other.h5"), "/")
        file.create_dataset("raw", ONE.shape, np.uint8, external=[(str(tmp_path / "secret.bin"), 0, 16 * 16 * 3)])
        file.create_virtual_dataset("virtual", layout)
    for name in ("linked", "group/x", "raw", "virtual"):
        with pytest.raises(UserError, match=r"has no array|lies in other files"):
            open_labelled(task("hdf5", image=name), tmp_path / "h.h5")


def test_a_damaged_file_fails_and_is_never_masked(tmp_path: Path) -> None:
    """Unlike a broken image: what follows in it cannot be trusted either."""
    np.savez(tmp_path / "m.npz", test_images=IMAGES, test_labels=LABELS[:, None])
    data = bytearray((tmp_path / "m.npz").read_bytes())
    at = data.index(IMAGES[5].tobytes()[:64])
    data[at : at + 8] = bytes(8)
    (tmp_path / "m.npz").write_bytes(data)
    found = open_labelled(task("medmnist"), tmp_path / "m.npz")
    with pytest.raises(LongclipError, match=r"m.npz is not a readable .npz .*CRC"):
        found.image(16)


def test_a_header_that_promises_too_much(tmp_path: Path) -> None:
    """A terabyte of labels, and images of a trillion pixels."""

    def header(shape: tuple[int, ...], kind: str) -> bytes:
        stream = io.BytesIO()
        np.lib.format.write_array_header_1_0(stream, {"descr": kind, "fortran_order": False, "shape": shape})
        return stream.getvalue()

    for images, labels, expected in (
        ((10**11, 2, 2), (10**11, 1), "more than is read"),
        ((1, 10**6, 10**6), (1, 1), "images have 1 to 50 MPixel"),
    ):
        with zipfile.ZipFile(tmp_path / "m.npz", "w") as archive:
            archive.writestr("test_images.npy", header(images, "|u1"))
            archive.writestr("test_labels.npy", header(labels, "<i8"))
        with pytest.raises(UserError, match=expected):
            open_labelled(task("medmnist"), tmp_path / "m.npz")


@pytest.mark.parametrize(("package", "reader"), [("h5py", "hdf5"), ("pyarrow", "parquet")])
def test_a_reader_says_which_package_it_needs(
    package: str, reader: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, data, labels = write(reader, tmp_path, IMAGES, LABELS)
    for name in (package, f"{package}.parquet"):
        monkeypatch.setitem(__import__("sys").modules, name, None)
    with pytest.raises(LongclipError, match=rf"needs {package}\n  next: pip install .longclip\[evaluate\]") as caught:
        open_labelled(asked, data, labels)
    assert caught.value.exit_code == 3


def test_a_large_file_is_not_held(tmp_path: Path) -> None:
    """26 MB of images, read whole for their pixels, in a small part of that."""
    import tracemalloc

    images = np.zeros((400, 148, 148, 3), dtype=np.uint8)
    np.savez_compressed(tmp_path / "m.npz", test_images=images, test_labels=np.zeros((400, 1), dtype=np.uint8))
    with h5py.File(tmp_path / "h.h5", "w") as file:
        file.create_dataset("x", data=images, chunks=(10, 148, 148, 3), compression="gzip")
        file["y"] = np.zeros(400, dtype=np.uint8)
    rows = {"image": [x.tobytes() for x in images], "label": [0] * 400}
    pq.write_table(pa.table(rows), tmp_path / "p.parquet", row_group_size=100)
    del images, rows
    for reader, name in (("medmnist", "m.npz"), ("hdf5", "h.h5"), ("parquet", "p.parquet")):
        found = open_labelled(task(reader), tmp_path / name)
        tracemalloc.start()
        for i in range(400):
            found.image(i)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < 10e6, (reader, peak)


def test_labels_that_are_json_are_read_so(tmp_path: Path) -> None:
    (tmp_path / "i.png").write_bytes(png(IMAGES[0]))
    (tmp_path / "t.csv").write_text(
        f'image,label\ni.png,"{json.dumps(["w3", "w1"])}"\n'.replace('["w3", "w1"]', '[""w3"", ""w1""]')
    )
    assert open_labelled(task("csv", multi_label=True), tmp_path / "t.csv").labels.tolist() == [[1, 0, 1]]
