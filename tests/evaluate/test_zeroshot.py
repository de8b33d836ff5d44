"""Zero-shot classification against a script of ten lines a form, on a real model; ranks, ties, broken images."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from longclip.data.loader import normalised
from longclip.data.shards import open_dataset
from longclip.data.tokens import Tokenizer
from longclip.errors import UserError
from longclip.evaluate import zeroshot
from longclip.evaluate.embed import Embedder
from longclip.evaluate.readers import open_labelled
from longclip.evaluate.zeroshot import SCALE, _log_odds, classify, cosines
from longclip.model.clip import DualEncoder, build
from longclip.model.packing import pack
from longclip.run.evaluations import Scored, headline
from longclip.train.ranks import Ranks
from tests.data.test_loader import make_tokenizer
from tests.evaluate.forms import CLASSES, FORMS, NAMES, SEVERAL, TEMPLATES, order, pixels, png, task, write
from tests.forked import fork_ranks
from tests.train import small_clip

ALONE = Ranks(0, 1, 0, torch.device("cpu"))
IMAGES = pixels(17, size=20)
LABELS = np.random.default_rng(3).permutation(np.arange(17) % 3)
SETS = np.random.default_rng(4).integers(0, 2, (17, 3))
NEGATIVE = ["w40 w41 {}"]


@pytest.fixture(scope="module")
def model() -> DualEncoder:
    return build(small_clip.experiment({"stage": 0}).model, 1).eval()


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("zeroshot") / "tok"
    make_tokenizer(folder)
    return Tokenizer(str(folder), 12)


@pytest.fixture
def embedder(model: DualEncoder, tokenizer: Tokenizer) -> Embedder:
    return Embedder(model, model, tokenizer, small_clip.FORM, ALONE, 4)


# ---- the ten lines: what a form holds, and what a model says of it -------------------------------------------------


def from_shards(root: Path) -> tuple[list[Any], list[Any]]:
    import tarfile

    names, members = [], {}
    for tar in sorted(root.glob("*.tar")):
        with tarfile.open(tar) as file:
            members.update({m.name: file.extractfile(m).read() for m in file})  # type: ignore[union-attr]
    names = sorted({name.partition(".")[0] for name in members})
    fields = [__import__("json").loads(members[f"{name}.json"])["facts"][1] for name in names]
    return [members[f"{name}.png"] for name in names], fields


def from_images(root: Path) -> tuple[list[Any], list[Any]]:
    files = sorted(root.glob("set/*/*.png"))
    return [f.read_bytes() for f in files], [f.parent.name for f in files]


def from_medmnist(root: Path) -> tuple[list[Any], list[Any]]:
    arrays = np.load(root / "x.npz")
    return list(arrays["test_images"]), arrays["test_labels"].squeeze().tolist()


def from_hdf5(root: Path) -> tuple[list[Any], list[Any]]:
    with h5py.File(root / "x.h5") as x, h5py.File(root / "y.h5") as y:
        return list(x["x"][:]), y["y"][:].squeeze().tolist()


def from_parquet(root: Path) -> tuple[list[Any], list[Any]]:
    rows = pa.concat_tables([pq.read_table(f) for f in sorted(root.glob("test-*.parquet"))]).to_pylist()
    return [row["image"]["bytes"] for row in rows], [row["label"] for row in rows]


def from_csv(root: Path) -> tuple[list[Any], list[Any]]:
    import pandas as pd

    table = pd.read_csv(root / "set.csv")
    read = [v if v in NAMES else __import__("json").loads(v) for v in table["label"]]
    return [(root / name).read_bytes() for name in table["image"]], read


SCRIPTS: dict[str, Callable[[Path], tuple[list[Any], list[Any]]]] = {
    "shards": from_shards, "images": from_images, "medmnist": from_medmnist, "hdf5": from_hdf5,
    "parquet": from_parquet, "csv": from_csv,
}  # fmt: skip


def image_features(model: DualEncoder, images: list[Any]) -> Tensor:
    rows = []
    for image in images:
        opened = Image.open(__import__("io").BytesIO(image)) if isinstance(image, bytes) else Image.fromarray(image)
        rows.append(np.asarray(opened.convert("RGB").resize((16, 16), Image.Resampling.BICUBIC)))
    return model(normalised(torch.from_numpy(np.stack(rows)), small_clip.FORM, ALONE.device), None)[0]


def text_features(model: DualEncoder, tokenizer: Tokenizer, texts: list[str]) -> Tensor:
    return model(None, pack(tokenizer(texts)[0]))[0]


def class_scores(
    model: DualEncoder, tokenizer: Tokenizer, images: list[Any], templates: list[str]
) -> NDArray[np.float64]:
    columns = []
    with torch.no_grad():
        seen = image_features(model, images)
        for wordings in CLASSES.values():
            each = text_features(model, tokenizer, [t.format(w) for w in wordings for t in templates])
            mean = each.mean(dim=0)
            columns.append(seen @ (mean / mean.norm()))
    return torch.stack(columns, dim=1).double().numpy()


def pair_auc(positive: list[bool], score: list[float]) -> float:
    pairs = [
        (p, n) for p, y in zip(score, positive, strict=True) if y for n, z in zip(score, positive, strict=True) if not z
    ]
    return sum((p > n) + (p == n) / 2 for p, n in pairs) / len(pairs)


@pytest.mark.parametrize("reader", FORMS)
def test_equals_the_script(reader: str, tmp_path: Path, model: DualEncoder, embedder: Embedder) -> None:
    found = classify(embedder, *_opened(write(reader, tmp_path, IMAGES, LABELS)))
    images, labels = SCRIPTS[reader](tmp_path)
    scores = class_scores(model, embedder.tokenizer, images, TEMPLATES)
    truth = [NAMES.index(x) if isinstance(x, str) else x for x in labels]
    guess = scores.argmax(axis=1).tolist()
    assert truth == LABELS[order(reader, LABELS)].tolist() and len(set(guess)) > 1, "a case that can tell"
    right = [g == t for g, t in zip(guess, truth, strict=True)]
    recalls = [np.mean([r for r, t in zip(right, truth, strict=True) if t == c]) for c in range(3)]
    f1s = [
        2 * sum(g == t == c for g, t in zip(guess, truth, strict=True)) / (guess.count(c) + truth.count(c))
        for c in range(3)
    ]
    shares = np.exp(100 * scores) / np.exp(100 * scores).sum(axis=1, keepdims=True)
    aucs = [pair_auc([t == c for t in truth], shares[:, c].tolist()) for c in range(3)]
    expected = {
        "accuracy": np.mean(right),
        "balanced_accuracy": np.mean(recalls),
        "macro_f1": np.mean(f1s),
        "auc": np.mean(aucs),
    }
    assert found.facts["metrics"] == pytest.approx(expected, abs=1e-12)
    assert found.arrays["predicted"].tolist() == guess and found.arrays["label"].tolist() == truth
    assert found.arrays["correct"].tolist() == [int(r) for r in right]
    assert (found.facts["images"], found.facts["left_out"]) == (17, 0)


@pytest.mark.parametrize("negative", [None, NEGATIVE])
@pytest.mark.parametrize("reader", SEVERAL)
def test_several_labels_equal_the_script(
    reader: str, negative: list[str] | None, tmp_path: Path, model: DualEncoder, embedder: Embedder
) -> None:
    more = {"negative": negative} if negative else {}
    found = classify(embedder, *_opened(write(reader, tmp_path, IMAGES, SETS, **more)))
    images, labels = SCRIPTS[reader](tmp_path)
    there = [
        [n in row for n in NAMES] if isinstance(row[0] if row else "", str) else [bool(v) for v in row]
        for row in labels
    ]
    assert there == (SETS == 1).tolist()
    scores = class_scores(model, embedder.tokenizer, images, TEMPLATES)
    if negative:
        scores = scores - class_scores(model, embedder.tokenizer, images, negative)
    np.testing.assert_allclose(found.arrays["scores"], scores, atol=1e-6)
    aucs = {f"auc/{n}": pair_auc(SETS[:, i].astype(bool).tolist(), scores[:, i].tolist()) for i, n in enumerate(NAMES)}
    got = dict(found.facts["metrics"])
    precisions = []
    for i in range(3):
        ranked = SETS[np.argsort(-scores[:, i]), i]
        precisions.append(np.mean([ranked[: k + 1].mean() for k in np.flatnonzero(ranked)]))
    assert got.pop("mean_average_precision") == pytest.approx(np.mean(precisions), abs=1e-12)
    assert got.pop("auc") == pytest.approx(np.mean(list(aucs.values())), abs=1e-12)
    assert got == pytest.approx(aucs, abs=1e-12)


def test_own_candidates_equal_the_script(tmp_path: Path, model: DualEncoder, embedder: Embedder) -> None:
    random = np.random.default_rng(5)
    own = [[f"w{w} w{9 + w}" for w in random.permutation(9)[: random.integers(2, 6)]] for _ in range(17)]
    truth = [int(random.integers(len(texts))) for texts in own]
    rows = {"image": [png(x) for x in IMAGES], "options": own, "label": [t[k] for t, k in zip(own, truth, strict=True)]}
    pq.write_table(pa.table(rows), tmp_path / "q.parquet")
    asked = task("parquet", candidates="options", templates=["w50 {}", "{}"])
    found = classify(embedder, asked, open_labelled(asked, tmp_path / "q.parquet"))
    guess = []
    with torch.no_grad():
        for image, texts in zip(image_features(model, list(IMAGES)), own, strict=True):
            each = text_features(model, embedder.tokenizer, [t for text in texts for t in (f"w50 {text}", text)])
            means = each.reshape(len(texts), 2, -1).mean(dim=1)
            guess.append(int((means / means.norm(dim=1, keepdim=True) @ image).argmax()))
    assert found.arrays["predicted"].tolist() == guess
    right = [g == t for g, t in zip(guess, truth, strict=True)]
    assert found.facts["metrics"] == {"accuracy": pytest.approx(np.mean(right))} and 0 < sum(right) < 17


def test_what_cannot_be_told_apart_is_a_miss(tmp_path: Path, embedder: Embedder) -> None:
    """Two words that the tokenizer does not know are one to the model."""
    rows = {"image": [png(x) for x in IMAGES], "options": [["foo", "bar"]] * 17, "label": ["foo", "bar"] * 8 + ["foo"]}
    pq.write_table(pa.table(rows), tmp_path / "q.parquet")
    asked = task("parquet", candidates="options")
    found = classify(embedder, asked, open_labelled(asked, tmp_path / "q.parquet"))
    assert found.facts["metrics"] == {"accuracy": 0.0} and found.facts["convention"] == "ties = misses"
    alike = {"w1": "foo", "w2": "bar", "w3": "baz"}
    found = classify(embedder, *_opened(write("medmnist", tmp_path, IMAGES, LABELS, classes=alike)))
    assert found.facts["metrics"]["accuracy"] == 0.0 and found.facts["metrics"]["auc"] == 0.5


def test_texts_of_the_same_tokens_have_the_same_features(embedder: Embedder) -> None:
    """To the last bit, wherever they stand; those of other tokens have their own."""
    words = ["foo", "w1", "bar w2", "w2", "baz", "w1", "qux w2", "w3 w1 w2", "nix"]
    found = embedder.texts(words)
    alone = torch.cat([embedder.texts([word]) for word in words])
    assert torch.allclose(found, alone, atol=1e-6)
    for same in ([0, 4, 8], [1, 5], [2, 6]):
        assert (found[same] == found[same[0]]).all()
    assert len(found.unique(dim=0)) == 5


def test_equal_texts_tie_wherever_their_columns_stand() -> None:
    random = torch.Generator().manual_seed(0)
    images, text = torch.randn(301, 512, generator=random), torch.randn(1, 512, generator=random)
    scores = cosines(torch.nn.functional.normalize(images), torch.nn.functional.normalize(text).repeat(37, 1))
    assert (scores == scores[:, :1]).all()


@st.composite
def cosines_of(draw: st.DrawFn) -> np.ndarray:
    """[N, C] fp32: far apart, near each other, or of few values, so that many tie."""
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    shape = draw(st.integers(1, 20)), draw(st.integers(2, 60))
    scores = random.uniform(-1, 1, shape) * draw(st.sampled_from((1.0, 1e-2, 1e-6)))
    if draw(st.booleans()):
        scores = np.round(scores * 4) / 4
    scores[random.random(shape) < draw(st.sampled_from((0.0, 0.1)))] = draw(st.sampled_from((1.0, -1.0, np.nan)))
    return scores.astype(np.float32)


@settings(max_examples=200, deadline=None)
@given(cosines_of(), st.integers(1, 200))
def test_log_odds_are_those_of_the_sums_written_out(scores: np.ndarray, cells: int) -> None:
    """For each class the others' shares summed, one class after the other."""
    exact = scores.astype(np.float64)
    expected = np.empty_like(exact)
    for c in range(exact.shape[1]):
        others = np.delete(exact, c, axis=1) - exact[:, c : c + 1]
        with np.errstate(invalid="ignore"):
            expected[:, c] = -np.logaddexp.reduce(SCALE * others, axis=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(zeroshot, "CELLS", cells)
        odds = _log_odds(scores)
    np.testing.assert_allclose(odds, expected, rtol=1e-13, atol=1e-13)
    for row, found in zip(scores, odds, strict=True):
        for score in [] if np.isnan(row).any() else row:
            assert len(set(found[row == score].tolist())) == 1, "what ties has the same odds to the last bit"


def test_images_of_which_no_class_is_told_apart_tie() -> None:
    scores = np.repeat(np.random.default_rng(0).uniform(-1, 1, (50, 1)), 7, axis=1).astype(np.float32)
    assert len(np.unique(_log_odds(scores))) == 1
    assert np.isposinf(_log_odds(scores[:, :1])).all(), "a single class"


def test_log_odds_of_as_many_classes_as_imagenet_has() -> None:
    """In time in proportion to the scores: one after the other each of the classes took minutes."""
    scores = np.random.default_rng(0).uniform(-1, 1, (500, 20_000)).astype(np.float32)
    assert np.isfinite(_log_odds(scores)).all()


def test_broken_images_are_left_out_named_and_keep_their_place(tmp_path: Path, embedder: Embedder) -> None:
    asked, data, _ = write("images", tmp_path, IMAGES, LABELS)
    whole = classify(embedder, asked, open_labelled(asked, data))
    files = sorted(data.glob("set/*/*.png"))
    files[0].write_bytes(b"not an image")
    files[9].write_bytes(files[9].read_bytes()[:200])
    head = b"IHDR" + (10**5).to_bytes(4, "big") * 2 + bytes([8, 2, 0, 0, 0])
    files[11].write_bytes(png(IMAGES[0])[:12] + head + zlib.crc32(head).to_bytes(4, "big") + png(IMAGES[0])[33:])
    found = classify(embedder, asked, open_labelled(asked, data))
    assert found.facts["images"] == 14 and found.facts["left_out"] == 3
    assert [said.partition(":")[0] for said in found.facts["left_out_named"]] == [
        files[i].relative_to(data).as_posix() for i in (0, 9, 11)
    ]
    assert "10000000000 pixels" in found.facts["left_out_named"][2]
    for name in ("correct", "predicted"):
        expected = whole.arrays[name].tolist()
        for i in (0, 9, 11):
            expected[i] = -1
        assert found.arrays[name].tolist() == expected
    kept = [i for i in range(17) if i not in (0, 9, 11)]
    assert found.facts["metrics"]["accuracy"] == np.mean(whole.arrays["correct"][kept])


def test_all_broken_is_an_error(tmp_path: Path, embedder: Embedder) -> None:
    asked, data, _ = write("images", tmp_path, IMAGES, LABELS)
    for file in data.glob("set/*/*.png"):
        file.write_bytes(b"no")
    with pytest.raises(UserError, match=r"none of the 17 images can be read; set/w3/\d+.png: not a readable image"):
        classify(embedder, asked, open_labelled(asked, data))


def test_two_ranks_give_what_one_does(tmp_path: Path, model: DualEncoder, tokenizer: Tokenizer) -> None:
    """To the last bit, with broken images on either of them, and every rank the same."""
    cases = []
    for reader, labels, more in (
        ("images", LABELS, {}),
        ("parquet", SETS, {"negative": NEGATIVE}),
        ("shards", LABELS, {}),
    ):
        (tmp_path / reader).mkdir()
        cases.append(write(reader, tmp_path / reader, IMAGES, labels, **more))
    for file in sorted((tmp_path / "images").glob("set/*/*.png"))[:10:3]:
        file.write_bytes(b"no")
    own = [["w1", "w2 w3"], ["w4", "w5", "w6"]] * 9
    rows = {"image": [png(x) for x in IMAGES], "options": own[:17], "label": [1] * 17}
    pq.write_table(pa.table(rows), tmp_path / "q.parquet")
    cases.append((task("parquet", candidates="options"), tmp_path / "q.parquet", None))

    def all_of(me: Ranks) -> list[Scored]:
        embedder = Embedder(model, model, tokenizer, small_clip.FORM, me, 4)
        return [classify(embedder, *_opened(case)) for case in cases]

    def on_each(me: Ranks) -> None:
        torch.save([(one.facts, one.arrays) for one in all_of(me)], tmp_path / f"{me.rank}.pt")

    torch.set_num_threads(1)
    expected = all_of(ALONE)
    assert expected[0].facts["left_out"] == 4
    assert fork_ranks(tmp_path / "meeting", ["a", "a"], on_each) == [0, 0]
    for rank in range(2):
        for (facts, arrays), one in zip(torch.load(tmp_path / f"{rank}.pt", weights_only=False), expected, strict=True):
            assert facts == one.facts
            for name, array in one.arrays.items():
                np.testing.assert_array_equal(arrays[name], array)


def test_what_a_table_shows() -> None:
    tasks = {
        "a": {"kind": "classification", "metrics": {"accuracy": 0.5, "auc": 0.9}},
        "b": {"kind": "classification", "metrics": {"auc": 0.7, "mean_average_precision": 0.1}},
        "c": {"kind": "classification", "metrics": {"accuracy": 1.0}},
        "d": {"kind": "retrieval", "metrics": {"i2t_recall_at_1": 0.3}},
    }
    assert [headline(t) for t in tasks.values()] == [("accuracy", 0.5), ("auc", 0.7), ("accuracy", 1.0), None]


def _opened(case: tuple[Any, Path, Path | None]) -> tuple[Any, Any]:
    return case[0], open_labelled(*case)


def test_the_shards_are_those_of_training(tmp_path: Path) -> None:
    _, data, _ = write("shards", tmp_path, IMAGES, LABELS)
    assert len(open_dataset(data)) == 17
