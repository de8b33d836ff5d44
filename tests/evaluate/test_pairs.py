"""Retrieval tasks against plain loops over the model's own features; windows, strata, probes by their definitions."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from longclip.data.loader import Reader
from longclip.data.sentences import sentences
from longclip.data.text import Text
from longclip.data.tokens import Tokenizer
from longclip.errors import UserError
from longclip.evaluate import pairs as pairs_module
from longclip.evaluate import probe, ranking
from longclip.evaluate.embed import Embedder
from longclip.evaluate.gallery import Folder, open_gallery
from longclip.evaluate.pairs import retrieve
from longclip.evaluate.retrieval import evaluate
from longclip.evaluate.suite import KEPT, Retrieval
from longclip.model.clip import DualEncoder, build
from longclip.train.ranks import Ranks
from tests.data.test_loader import WORDS, make_shards, make_tokenizer, picture
from tests.forked import fork_ranks
from tests.train import small_clip

ALONE = Ranks(0, 1, 0, torch.device("cpu"))
WINDOW = 24


def caption(i: int) -> str:
    """Of 1 to 4 sentences, some longer than the window."""
    random = np.random.default_rng(i)
    counts = random.integers(2, 14, 1 + i % 4)
    return " ".join(" ".join(random.choice(WORDS, n)).capitalize() + "." for n in counts)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("pairs")
    make_tokenizer(root / "tok")
    make_shards(root / "shards", [17, 14], spoil=("01-004",))
    (root / "folder" / "deep").mkdir(parents=True)
    rows = []
    for i in range(20):
        name = f"deep/{i}.png" if i % 2 else f"{i}.png"
        (root / "folder" / name).write_bytes(b"nothing" if i == 3 else picture(i))
        rows += [(name, caption(100 * i + k)) for k in range(1 + i % 3)]
    rows.append((rows[0][0], "  "))
    with (root / "folder" / "captions.csv").open("w", newline="") as f:
        csv.writer(f).writerows([("image", "caption", "more"), *((*row, "x") for row in rows)])
    return root


@pytest.fixture(scope="module")
def model() -> DualEncoder:
    return build(small_clip.experiment({"stage": 0}).model, 0).eval()


def embedder(root: Path, model: DualEncoder, ranks: Ranks = ALONE, window: int = WINDOW) -> Embedder:
    return Embedder(model, model, Tokenizer(str(root / "tok"), window), small_clip.FORM, ranks, 7)


def task(**more: Any) -> Retrieval:
    return Retrieval.model_validate({"kind": "retrieval", "data": "here", **more})


def brute(images: torch.Tensor, texts: torch.Tensor, owner: list[int]) -> tuple[list[int], list[int]]:
    scores = (images @ texts.T).tolist()
    i2t, t2i = [], []
    for i, row in enumerate(scores):
        best = max(s for s, o in zip(row, owner, strict=True) if o == i)
        i2t.append(sum(s >= best for s, o in zip(row, owner, strict=True) if o != i))
    for t, o in enumerate(owner):
        t2i.append(sum(scores[i][t] >= scores[o][t] for i in range(len(scores)) if i != o))
    return i2t, t2i


def test_a_folder_with_several_captions_an_image(root: Path, model: DualEncoder) -> None:
    made = embedder(root, model)
    gallery = open_gallery(str(root / "folder"), "txt")
    found = retrieve(made, task(windows=["own", 9, 24, 65]), gallery)
    pairs = pairs_module.read_pairs(made, gallery)
    owner = pairs.owner_T.tolist()
    use = [i for i in range(20) if i != 3]
    assert owner == [place for place, i in enumerate(use) for _ in range(1 + i % 3)]
    assert pairs.texts == [caption(100 * i + k) for i in use for k in range(1 + i % 3)]
    for name, window in (("", WINDOW), ("w9/", 9), ("w24/", 24)):
        i2t, t2i = brute(pairs.image_ID, made.texts(pairs.texts, window), owner)
        assert found.arrays[f"{name}i2t"].tolist() == i2t and found.arrays[f"{name}t2i"].tolist() == t2i
        expected = ranking.retrieval(np.array(i2t), np.array(t2i))
        assert {k: found.facts["metrics"][f"{name}{k}"] for k in expected} == expected
    lengths = [len(text.replace(".", " .").split()) + 2 for text in pairs.texts]
    assert found.arrays["tokens"].tolist() == lengths
    assert found.arrays["tokens"].dtype == found.arrays["i2t"].dtype == np.int32
    wasted = sum(max(0, n - 9) for n in lengths) / sum(lengths)
    assert found.facts["metrics"]["w9/waste"] == pytest.approx(wasted)
    assert found.facts["skipped"] == {"w65": "the text tower has 64 positions"}
    counts = {key: found.facts[key] for key in ("images", "captions", "pairs", "unreadable", "convention", "data")}
    assert counts == {
        "images": 19,
        "captions": len(owner),
        "pairs": len(owner),
        "unreadable": 1,
        "convention": "strict",
        "data": gallery.hash,
    }


def test_conventions(root: Path, model: DualEncoder) -> None:
    made = embedder(root, model)
    gallery = open_gallery(str(root / "folder"), "txt")
    pairs = pairs_module.read_pairs(made, gallery)
    texts = made.texts(pairs.texts)
    for convention in ("open_clip", "clip_benchmark"):
        found = retrieve(made, task(convention=convention), gallery)
        expected = ranking.both_ways(pairs.image_ID, texts, ALONE, pairs.owner_T, convention)
        assert found.arrays["i2t"].tolist() == expected[0].tolist()
        assert found.arrays["t2i"].tolist() == expected[1].tolist()
        assert len(found.arrays["tokens"]) == len(found.arrays["t2i"])
        assert found.facts["convention"] == convention


def test_strata_are_queries_among_the_whole_gallery(root: Path, model: DualEncoder) -> None:
    found = retrieve(embedder(root, model), task(strata=[12, 30, 90]), open_gallery(str(root / "folder"), "txt"))
    metrics, tokens = found.facts["metrics"], found.arrays["tokens"]
    seen = 0
    for name, low, high in (("len0-12", 0, 12), ("len12-30", 12, 30), ("len30-90", 30, 90), ("len90-", 90, 10**9)):
        inside = (tokens > low) & (tokens <= high)
        assert metrics[f"{name}/pairs"] == inside.sum()
        seen += int(inside.sum())
        if inside.any():
            share = (found.arrays["t2i"][inside] < 5).mean()
            assert metrics[f"{name}/t2i_recall_at_5"] == pytest.approx(share)
    assert seen == len(tokens) and metrics["len90-/pairs"] == 0 and "len90-/mean_recall_at_1" not in metrics


def test_probes(root: Path, model: DualEncoder) -> None:
    made = embedder(root, model)
    gallery = open_gallery(str(root / "folder"), "txt")
    metrics = retrieve(made, task(probes=["kept", "shuffled", "first"]), gallery).facts["metrics"]
    assert {key.partition("/")[0] for key in metrics if key.startswith("kept")} == {"kept16", "kept24"}
    pairs = pairs_module.read_pairs(made, gallery)
    owner = pairs.owner_T.tolist()

    def recall(texts: torch.Tensor) -> float:
        i2t, t2i = brute(pairs.image_ID, texts, owner)
        return (i2t.count(0) / len(i2t) + t2i.count(0) / len(t2i)) / 2

    assert metrics["kept16/mean_recall_at_1"] == recall(made.texts(pairs.texts, 16))
    assert metrics["kept24/mean_recall_at_1"] == metrics["mean_recall_at_1"]
    firsts = [text.partition(".")[0] + "." for text in pairs.texts]
    assert metrics["first/mean_recall_at_1"] == recall(made.texts(firsts))
    mixed = [probe.shuffled(text, i) for i, text in enumerate(pairs.texts)]
    assert metrics["shuffled/mean_recall_at_1"] == recall(made.texts(mixed))
    assert mixed != pairs.texts and mixed == [probe.shuffled(text, i) for i, text in enumerate(pairs.texts)]
    for text, other in zip(pairs.texts, mixed, strict=True):
        assert sorted(text[a:b] for a, b in sentences(text)) == sorted(other[a:b] for a, b in sentences(other))


def test_kept_goes_as_far_as_the_window() -> None:
    assert probe.kept(77) == [16, 32, 64, 77]
    assert probe.kept(512) == list(KEPT)
    assert probe.kept(248) == [16, 32, 64, 77, 128, 154, 192, 248]


def test_a_collapsed_model_shows_in_its_spread() -> None:
    random = torch.Generator().manual_seed(0)
    centre = torch.nn.functional.normalize(torch.randn(64, generator=random), dim=0)
    same = centre.repeat(100, 1)
    free = torch.nn.functional.normalize(torch.randn(5000, 64, generator=random), dim=1)
    found = probe.shape(same, free)
    assert found["image_spread"] == pytest.approx(0, abs=1e-6)
    assert found["text_spread"] == pytest.approx(1, abs=0.01)
    assert found["modality_gap"] == pytest.approx(1, abs=0.03)
    assert probe.shape(same, -same)["modality_gap"] == pytest.approx(2)


def test_shards_give_what_validation_gives(root: Path, model: DualEncoder) -> None:
    """The same figures as the loop's own evaluation of the same shards, a spoiled image left out by both."""
    made = embedder(root, model, window=6)
    gallery = open_gallery(str(root / "shards"), "txt")
    found = retrieve(made, task(), gallery)
    reader = Reader(gallery.dataset, made.tokenizer, made.pixels, Text("txt"))  # type: ignore[attr-defined]
    expected = evaluate(model, model, reader, 7, ALONE).facts
    assert expected.pop("pairs") == found.facts["pairs"] == 30 and found.facts["unreadable"] == 1
    assert found.facts["text"] == "txt", "the shards' hash does not say it"
    del expected["waste"]  # the loop's counts the two special tokens of a spoiled image's caption
    assert {key: found.facts["metrics"][key] for key in expected} == pytest.approx(expected)


def test_captions_of_the_same_tokens_tie(root: Path, model: DualEncoder) -> None:
    """As in a suite, also where a caption's place in a batch changes its last bits: all are cut to the two specials."""
    made, gallery = embedder(root, model, window=2), open_gallery(str(root / "shards"), "txt")
    reader = Reader(gallery.dataset, made.tokenizer, made.pixels, Text("txt"))  # type: ignore[attr-defined]

    def shaky(*inputs: Any) -> tuple[torch.Tensor, ...]:
        images, texts, *rest = model(*inputs)
        return images, texts * (1 + 1e-6 * torch.arange(len(texts))[:, None]), *rest

    found = evaluate(shaky, model, reader, 7, ALONE).facts
    assert found["pairs"] == found["i2t_median_rank"] == found["i2t_mean_rank"] == 30
    assert retrieve(made, task(), gallery).facts["metrics"]["i2t_mean_rank"] == 30


def test_ranking_shows_signs_of_life(root: Path, model: DualEncoder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Validation as a suite: of a large gallery the ranking may take longer than the watch waits."""
    made, gallery = embedder(root, model), open_gallery(str(root / "shards"), "txt")
    reader = Reader(gallery.dataset, made.tokenizer, made.pixels, Text("txt"))  # type: ignore[attr-defined]
    beats: list[int] = []
    monkeypatch.setattr(ranking, "CELLS", 6 * 30)
    evaluate(model, model, reader, 7, ALONE, lambda: beats.append(1))
    assert len(beats) == 5 + 2 * 5, "31 samples in batches, 30 queries in blocks each way"


@pytest.mark.parametrize("ranks", [2, 3])
def test_any_number_of_ranks_gives_the_same_record(
    root: Path, model: DualEncoder, ranks: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ranking, "CELLS", 5 * 40)  # several blocks of queries, dealt to the ranks
    asked = task(windows=["own", 9], strata=[12], probes=["kept", "shuffled", "first"])

    def save(me: Ranks) -> None:
        found = retrieve(embedder(root, model, me), asked, open_gallery(str(root / "folder"), "txt"))
        (tmp_path / f"{me.rank}.json").write_text(json.dumps(found.facts, sort_keys=True))

    torch.set_num_threads(1)
    expected = retrieve(embedder(root, model), asked, open_gallery(str(root / "folder"), "txt")).facts
    assert fork_ranks(tmp_path / "meeting", ["a"] * ranks, save) == [0] * ranks
    for rank in range(ranks):
        assert json.loads((tmp_path / f"{rank}.json").read_text()) == expected


def test_lines_are_as_good_as_a_table(root: Path, tmp_path: Path) -> None:
    table = open_gallery(str(root / "folder"), "txt")
    assert isinstance(table, Folder)
    for name in table.images:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes((root / "folder" / name).read_bytes())
    rows = [{"image": i, "caption": c} for i, cs in zip(table.images, table.captions, strict=True) for c in cs]
    (tmp_path / "captions.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    assert open_gallery(str(tmp_path), "txt").hash == table.hash
    (tmp_path / table.images[2]).write_bytes(b"longer than it was" * 100)
    assert open_gallery(str(tmp_path), "txt").hash != table.hash


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("captions.csv", "image,text\na.png,b\n", "captions.csv:1: no column 'caption'; there are image, text"),
        ("captions.csv", "image,caption\nb.png,b\n", "names an image that is not there"),
        ("captions.csv", "image,caption\n../a.png,b\n", "captions.csv:2: a row has an image, a path in this folder"),
        ("captions.csv", "image,caption\n", "no rows"),
        ("captions.jsonl", '{"image": "a.png"}\n', "captions.jsonl:1: a row has an image"),
        ("captions.jsonl", "[1]\n", "captions.jsonl:1: a row has"),
        ("captions.txt", "", "neither shards' index.json nor captions.csv nor captions.jsonl"),
    ],
)
def test_what_is_no_gallery(name: str, content: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(picture(0))
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError) as caught:
        open_gallery(str(tmp_path), "txt")
    assert said in str(caught.value)


def test_nothing_to_be_used(root: Path, model: DualEncoder, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"no image")
    (tmp_path / "captions.csv").write_text("image,caption\na.png,b\n")
    with pytest.raises(UserError, match="none of 1 images can be used"):
        retrieve(embedder(root, model), task(), open_gallery(str(tmp_path), "txt"))
