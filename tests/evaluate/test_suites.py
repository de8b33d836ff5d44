"""The suites that are shipped: they can be read, they meet the data in the form in which it is published, and the
demo's speaks the language of the demo's captions."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from longclip.data.shards import open_dataset
from longclip.data.synthetic import PLACES, STAINS, WORDS, _fact, synthesize, train_tokenizer
from longclip.errors import ExperimentError, UserError
from longclip.evaluate.classes import Classification
from longclip.evaluate.readers import open_labelled
from longclip.evaluate.suite import Suite, read_suite
from tests.evaluate.forms import pixels, png

SUITES = Path(__file__).parents[2] / "experiments" / "suites"
IMAGES = pixels(24)


def suite(name: str) -> Suite:
    return read_suite(SUITES / f"{name}.yaml")


def classification(name: str) -> dict[str, Classification]:
    return {key: task for key, task in suite(name).tasks.items() if isinstance(task, Classification)}


def test_the_demo_s_classes_are_what_its_images_were_drawn_with(tmp_path: Path) -> None:
    synthesize(tmp_path, train=1, val=1, test=40, seed=3)
    dataset = open_dataset(tmp_path / "test")
    tokenizer = train_tokenizer()
    tasks = classification("demo")
    assert list(tasks) == [place.replace(" ", "-") for place in PLACES]
    for place, task in enumerate(tasks.values()):
        assert tuple(task.classes) == WORDS[place]
        sentences = [t.replace("{}", word) for words in task.classes.values() for word in words for t in task.templates]
        assert set(sentences) == {_fact(form, place, value) for form in range(4) for value in range(len(STAINS))}
        assert not any("[UNK]" in tokenizer.encode(sentence).tokens for sentence in sentences)
        found = open_labelled(task, tmp_path / "test")
        said = [dataset.fields_and_text(0, i)[1].lower() for i in range(40)]
        for i, label in enumerate(found.labels.tolist()):
            true = [k for k in range(len(STAINS)) if any(_fact(f, place, k).lower() in said[i] for f in range(4))]
            assert true == [label], "what the caption says of the place"


def medmnist(root: Path, name: str, task: Classification) -> tuple[Path, Path | None]:
    count = len(task.classes)
    labels = np.eye(count, dtype=np.uint8) if task.multi_label else np.arange(count, dtype=np.uint8)[:, None]
    grey = IMAGES[:count, ..., 0] if name in ("chestmnist", "octmnist", "tissuemnist") else IMAGES[:count]
    np.savez_compressed(root / "m.npz", test_images=grey, test_labels=labels)
    return root / "m.npz", None


def pathology(root: Path, name: str, task: Classification) -> tuple[Path, Path | None]:
    if name == "pcam":
        with h5py.File(root / "x.h5", "w") as x, h5py.File(root / "y.h5", "w") as y:
            x["x"], y["y"] = IMAGES[:4], np.array([0, 1, 1, 0], dtype=np.uint8).reshape(4, 1, 1, 1)
        return root / "x.h5", root / "y.h5"
    for i, folder in enumerate(["lung_aca", "lung_scc", "lung_n"] if "lung" in name else ["colon_aca", "colon_n"]):
        (root / folder).mkdir()
        (root / folder / f"{folder.replace('_', '')}1.jpeg").write_bytes(png(IMAGES[i]))
    return root, None


def ubench(root: Path, name: str, task: Classification) -> tuple[Path, Path | None]:
    def question(options: list[str]) -> dict[str, object]:
        return {"id": "q", "question": "?", "options": [*options, "none of the above"], "answer": options[0]}

    rows = [
        {name: question(["light microscopy", "fluorescence"]), "other": None},
        {name: None, "other": question(["a"])},
        {name: question(["H&E"]), "other": None},
    ]
    images = [{"bytes": png(x), "path": "a.png"} for x in IMAGES[:3]]
    pq.write_table(pa.table({"image_id": ["a", "b", "c"], "image": images, "questions": rows}), root / "t.parquet")
    return root / "t.parquet", None


def chest_xray(root: Path, name: str, task: Classification) -> tuple[Path, Path | None]:
    small = root / "CheXpert-v1.0-small"
    (small / "valid/patient64541/study1").mkdir(parents=True)
    (small / "valid/patient64541/study1/view1_frontal.jpg").write_bytes(png(IMAGES[0]))
    with open(small / "valid.csv", "w", newline="") as file:
        writer = csv.writer(file)
        findings = ["No Finding", "Cardiomegaly", "Edema", "Consolidation", "Atelectasis", "Pleural Effusion"]
        writer.writerow(["Path", "Sex", "Age", "Frontal/Lateral", "AP/PA", *findings])
        path = "CheXpert-v1.0-small/valid/patient64541/study1/view1_frontal.jpg"
        writer.writerow([path, "Male", 73, "Frontal", "AP", 0.0, 1.0, 0.0, 0.0, 1.0, 0.0])
    (root / "a.png").write_bytes(png(IMAGES[0]))
    (root / "test.csv").write_text("image,label\na.png,1\na.png,0\n")
    return (root, small / "valid.csv") if name == "chexpert" else (root / "test.csv", None)


Maker = Callable[[Path, str, Classification], tuple[Path, Path | None]]
MADE: dict[str, Maker] = {"medmnist": medmnist, "pathology": pathology, "ubench": ubench, "chest-xray": chest_xray}
EXPECTED = {"pcam": [0, 1, 1, 0], "lc25000-lung": [0, 2, 1], "lc25000-colon": [0, 1], "rsna-pneumonia": [1, 0],
            "chexpert": [[1, 1, 0, 0, 0]]}  # fmt: skip
"""of folders the order is that of their names"""


@pytest.mark.parametrize("name", MADE)
def test_they_read_the_published_form(name: str, tmp_path: Path) -> None:
    for key, task in classification(name).items():
        (tmp_path / key).mkdir()
        found = open_labelled(task, *MADE[name](tmp_path / key, key, task))
        if name == "medmnist":
            count = len(task.classes)
            assert found.labels.tolist() == (np.eye(count).tolist() if task.multi_label else list(range(count)))
        elif name == "ubench":
            assert found.labels.tolist() == [0, 0] and found.left_out == ("t.parquet:1: no question",)
        else:
            assert found.labels.tolist() == EXPECTED[key]


def test_all_that_are_shipped_are_tested() -> None:
    assert {file.stem for file in SUITES.glob("*.yaml")} == {*MADE, "demo", "mimic-cxr"}
    assert [task.kind for task in suite("mimic-cxr").tasks.values()] == ["retrieval"]
    for name in ("medmnist", "pathology", "ubench", "chest-xray"):
        for task in suite(name).tasks.values():
            assert Path(task.data).is_relative_to(SUITES.parents[1] / "data"), "paths are relative to the suite's file"
    assert {t.labels for t in classification("medmnist").values()} == {None}


WRONG = {
    "classes: [a, b], templates: [x]": "tasks.t.templates: holds 'x'; valid is a sentence with {} once",
    "classes: [a, b], templates: ['{} {}']": "tasks.t.templates: holds '{} {}'",
    "classes: [a, b], templates: ['{x}']": "tasks.t.templates: holds '{x}'",
    "classes: [a, b], templates: []": "tasks.t.templates: is empty",
    "classes: [a]": "tasks.t.classes: names 1; at least two",
    "classes: [a, a]": "tasks.t.classes: names 'a' twice",
    "classes: [yes, no]": "tasks.t.classes: holds True, which is not text; put it in quotes",
    "classes: {a: [x, y], b: [y, x]}": "tasks.t.classes.b: is worded as a is",
    "classes: {a: [x], b: []}": "tasks.t.classes.b: has no wording",
    "templates: ['{}']": "tasks.t.classes: give either 'classes', or 'candidates'",
    "classes: [a, b], candidates: own": "tasks.t.classes: give either 'classes', or 'candidates'",
    "classes: [a, b], negative: ['no {}']": "tasks.t.negative: is of effect with multi_label: true only",
    "classes: [a, b], split: val": "tasks.t.split: is of no effect with reader: csv; of effect there: labels, image",
    "classes: [a, b], label: [p, q]": "tasks.t.label: names 2; one, or with multi_label one for each of the classes",
    "candidates: own, multi_label: true": "tasks.t.multi_label: takes classes",
    "classes: [a, b], templtes: ['{}']": "unknown key; did you mean templates?",
    "classes: [a, b], reader: shards": "tasks.t.label: missing: the field of the JSON member",
    "classes: [a, b], reader: images, multi_label: true": "tasks.t.multi_label: takes classes, and a reader other",
}


@pytest.mark.parametrize("said", WRONG)
def test_a_mistake_names_file_line_and_key(said: str, tmp_path: Path) -> None:
    own = said if "reader" in said else f"reader: csv, {said}"
    (tmp_path / "s.yaml").write_text(f"tasks:\n  t: {{kind: classification, data: ./d.csv, {own}}}\n")
    with pytest.raises(ExperimentError) as caught:
        read_suite(tmp_path / "s.yaml")
    assert WRONG[said] in str(caught.value) and "s.yaml:2" in str(caught.value)


def test_a_suite_on_data_that_is_not_there(tmp_path: Path) -> None:
    task = classification("medmnist")["pathmnist"]
    with pytest.raises(UserError, match=r"no such file: .*pathmnist_224\.npz; valid is a MedMNIST \.npz"):
        open_labelled(task, tmp_path / "pathmnist_224.npz")
