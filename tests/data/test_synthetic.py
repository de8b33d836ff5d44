"""The drawn set: its waste is the paper's, its facts are in the image and in the caption, its ceilings are right."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tokenizers import Tokenizer

from longclip.data import synthetic
from longclip.data.shards import Sample, open_dataset
from longclip.data.synthetic import PLACES, STAINS, WINDOWS, WORDS, Pairs, ceilings, synthesize
from longclip.errors import SiteError, UserError

VALUE = {word: value for words in WORDS for value, word in enumerate(words)}


def read(folder: Path) -> list[Sample]:
    dataset = open_dataset(folder)
    return [dataset.read(s, i) for s, size in enumerate(dataset.sizes) for i in range(size)]


def pairs_of(samples: list[Sample], tokenizer: Tokenizer) -> Pairs:
    return Pairs(
        facts=np.array([[VALUE[word] for word in s.fields["facts"]] for s in samples]),
        fact_tokens=np.array([s.fields["fact_tokens"] for s in samples]),
        lengths=np.array([len(tokenizer.encode(s.text).ids) for s in samples]),
    )


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("drawn") / "set"
    synthesize(out, train=1500, val=100, test=1000, seed=3, shard_size=600)
    return out


@pytest.fixture(scope="module")
def tokenizer(drawn: Path) -> Tokenizer:
    return Tokenizer.from_file(str(drawn / "tokenizer" / "tokenizer.json"))


@pytest.fixture(scope="module")
def test(drawn: Path) -> list[Sample]:
    return read(drawn / "test")


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_same_arguments_same_bytes(tmp_path: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    synthesize(tmp_path / "a", 30, 10, 20, seed=1, shard_size=20, progress=lambda *step: seen.append(step))
    assert seen == [("test", 20, 20), ("val", 10, 10), ("train", 20, 30), ("train", 30, 30)]
    for name, train, seed in (("again", 30, 1), ("more", 40, 1), ("other", 30, 2)):
        synthesize(tmp_path / name, train, 10, 20, seed=seed, shard_size=20)
    a, again, more, other = (files(tmp_path / name) for name in ("a", "again", "more", "other"))
    assert a == again
    assert {name for name in a if a[name] != more[name]} <= {name for name in a if name.startswith("train/")}
    assert other["test/test-0000.tar"] != a["test/test-0000.tar"]
    synthesize(tmp_path / "a", 30, 10, 20, seed=1, shard_size=20)  # over itself
    assert files(tmp_path / "a") == again
    assert {name for name in a if name.startswith("train/")} == {
        "train/index.json",
        *(f"train/train-000{n}.tar{end}" for n in (0, 1) for end in ("", ".idx.npz")),
    }


def test_no_caption_twice(drawn: Path) -> None:
    captions = [sample.text for split in ("train", "val", "test") for sample in read(drawn / split)]
    assert len(captions) == 2600
    assert len(set(captions)) == 2600


def test_waste_is_that_of_the_paper(drawn: Path, tokenizer: Tokenizer) -> None:
    stored = json.loads((drawn / "test" / "ceilings.json").read_text())["windows"]
    for split, windows in (("test", stored), ("train", {})):
        lengths = np.array([len(tokenizer.encode(sample.text).ids) for sample in read(drawn / split)])
        waste = {c: np.maximum(lengths - c, 0).sum() / lengths.sum() for c in WINDOWS}
        assert waste[77] == pytest.approx(0.55, abs=0.015)
        assert 0.015 < waste[512] < 0.03
        for window, figures in windows.items():
            assert figures["waste"] == pytest.approx(waste[int(window)], abs=1e-6)


def test_every_fact_is_said_once_where_the_fields_say(test: list[Sample], tokenizer: Tokenizer) -> None:
    for sample in test:
        encoded = tokenizer.encode(sample.text)
        assert encoded.tokens[0] == "[CLS]"
        assert encoded.tokens[-1] == "[SEP]"
        assert "[UNK]" not in encoded.tokens
        assert [encoded.tokens[at] for at in sample.fields["fact_tokens"]] == sample.fields["facts"]
        assert sum(token in VALUE for token in encoded.tokens) == len(PLACES)


def test_facts_are_spread_evenly_and_independent(test: list[Sample], tokenizer: Tokenizer) -> None:
    pairs = pairs_of(test, tokenizer)
    share = np.sort(pairs.fact_tokens, axis=1) / pairs.lengths[:, None]  # where in its caption the k-th fact stands
    assert np.allclose(share.mean(0), (np.arange(8) + 0.5) / 8, atol=0.05)
    first = pairs.fact_tokens.argmin(1)
    assert np.bincount(first, minlength=8).min() > 80  # of 125 expected
    for fact in pairs.facts.T:
        assert np.bincount(fact, minlength=len(STAINS)).min() > 120  # of 167 expected
    correlation = np.corrcoef(np.c_[pairs.facts, pairs.fact_tokens, pairs.lengths].T)
    assert np.abs(correlation[:8] - np.eye(17)[:8]).max() < 5 / math.sqrt(len(test))


def test_filler_says_nothing() -> None:
    for sentence in synthetic._FILLER:
        words = set(sentence.lower().replace(",", "").rstrip(".").split())
        assert not words & (VALUE.keys() | {part for place in PLACES for part in place.split()})
    assert len(set(synthetic._FILLER)) == len(synthetic._FILLER) >= 60
    assert len(VALUE) == len(PLACES) * len(STAINS)  # no word stands for two stains, or at two places


def test_facts_can_be_read_off_the_small_image(test: list[Sample]) -> None:
    stains = np.array(STAINS, dtype=float)
    right = 0
    for sample in test:
        with Image.open(io.BytesIO(sample.image)) as image:
            assert image.size == (48, 48)
            pixels = np.asarray(image.resize((24, 24), Image.Resampling.BOX), dtype=float)
        for k, word in enumerate(sample.fields["facts"]):
            row, column = (8 * at + 2 * at + 1 for at in divmod(k + (k >= 4), 3))  # 2 px at the rim of the 8 px field
            colour = pixels[row : row + 2, column : column + 2].mean((0, 1))
            right += int(((stains - colour) ** 2).sum(1).argmin()) == VALUE[word]
    assert right >= 0.99 * len(test) * len(PLACES)


def test_tokenizer_loads_in_transformers(drawn: Path, test: list[Sample], tokenizer: Tokenizer) -> None:
    transformers = pytest.importorskip("transformers")
    loaded = transformers.AutoTokenizer.from_pretrained(str(drawn / "tokenizer"))
    tokens = (loaded.pad_token, loaded.unk_token, loaded.cls_token, loaded.sep_token, loaded.mask_token)
    assert tokens == ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
    assert loaded.pad_token_id == 0
    text = max((sample.text for sample in test), key=len)
    assert loaded(text)["input_ids"] == tokenizer.encode(text).ids
    cut = loaded(text, truncation=True, max_length=77)["input_ids"]
    assert cut == [*tokenizer.encode(text).ids[:76], loaded.sep_token_id]


def said(sample: Sample, tokenizer: Tokenizer, window: int) -> dict[str, str]:
    """Place -> word, read off the text that is left of a caption: knows nothing of ``fact_tokens`` or templates."""
    tokenizer.enable_truncation(window)
    text = tokenizer.decode(tokenizer.encode(sample.text).ids)
    tokenizer.no_truncation()
    found: dict[str, str] = {}
    for sentence in text.split("."):
        words = [word for word in sentence.split() if word in VALUE]
        places = [place for place in PLACES if place in sentence]
        if words:
            assert len(words) == len(places) == 1
            found[places[0]] = words[0]
    return found


@pytest.mark.parametrize("window", WINDOWS)
def test_ceilings_against_scoring_pair_by_pair(test: list[Sample], tokenizer: Tokenizer, window: int) -> None:
    count, repeats = 300, 200
    some = test[:count]
    shown = [said(sample, tokenizer, window) for sample in some]
    hidden = -math.log(len(STAINS))
    loglikelihood = np.zeros((count, count))  # [image, caption]
    for i, image in enumerate(some):
        truth = dict(zip(PLACES, image.fields["facts"], strict=True))
        for j, caption in enumerate(shown):
            fits = all(truth[place] == word for place, word in caption.items())
            loglikelihood[i, j] = (len(PLACES) - len(caption)) * hidden if fits else -math.inf
    figures = ceilings(pairs_of(some, tokenizer), [window])["windows"][str(window)]
    rng = np.random.default_rng(0)
    for direction, score in (("i2t", loglikelihood), ("t2i", loglikelihood.T)):
        tied = score == score.max(1, keepdims=True)
        chance = np.diagonal(tied) / tied.sum(1)
        assert figures[direction] == pytest.approx(chance.mean(), abs=1e-6)
        hits = [
            (np.where(tied, rng.random(tied.shape), -1).argmax(1) == np.arange(count)).mean() for _ in range(repeats)
        ]
        sigma = math.sqrt((chance * (1 - chance)).sum()) / count / math.sqrt(repeats)
        assert abs(np.mean(hits) - figures[direction]) <= 3 * sigma + 1e-6


def test_ceilings_by_hand() -> None:
    # window 10 keeps positions 0..8: the second fact is visible in captions 0 and 1 only
    pairs = Pairs(
        facts=np.array([[0, 0], [0, 1], [0, 1], [1, 0]]),
        fact_tokens=np.array([[1, 8], [8, 2], [3, 9], [4, 12]]),
        lengths=np.array([10, 10, 11, 20]),
    )
    figures = ceilings(pairs, [10])
    # texts: 0 fits image 0; 1 fits images 1, 2; 2 (fact 0 is 0) fits images 0, 1, 2; 3 fits image 3
    # images: 0 -> text 0 before text 2; 1 -> text 1 before text 2; 2 -> text 1, which is wrong; 3 -> text 3
    expected = {"t2i": (1 + 1 / 2 + 1 / 3 + 1) / 4, "i2t": 3 / 4, "waste": 11 / 51}
    assert figures["gallery"] == 4
    assert figures["windows"]["10"] == pytest.approx(expected, abs=1e-6)


def test_stored_ceilings(drawn: Path, test: list[Sample], tokenizer: Tokenizer) -> None:
    stored = json.loads((drawn / "test" / "ceilings.json").read_text())
    assert stored == ceilings(pairs_of(test, tokenizer))
    assert json.loads((drawn / "val" / "ceilings.json").read_text())["gallery"] == 100
    assert not (drawn / "train" / "ceilings.json").exists()
    t2i = [stored["windows"][str(window)]["t2i"] for window in WINDOWS]
    assert 0.6 < t2i[0] < 0.75
    assert t2i == sorted(t2i)
    assert t2i[-1] > 0.98


def test_what_is_in_the_way(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="at least 1"):
        synthesize(tmp_path, train=0)
    (tmp_path / "file").write_text("")
    with pytest.raises(SiteError, match="cannot write"):
        synthesize(tmp_path / "file" / "out", 2, 2, 2)
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "mine.tar").write_text("")
    with pytest.raises(UserError, match=r"mine\.tar"):
        synthesize(tmp_path, 2, 2, 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "train"]
