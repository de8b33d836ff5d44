"""The loader: the same global batches on any ranks x workers, bad samples masked by key, evaluation in step."""

from __future__ import annotations

import io
import json
import multiprocessing
import subprocess
from collections.abc import Iterable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image
from tokenizers import Tokenizer as RawTokenizer
from tokenizers import models, pre_tokenizers, processors

from longclip.data.decode import square
from longclip.data.index import index_folder
from longclip.data.loader import Batch, Reader, _Steps, deal, evaluation_batches, training_batches
from longclip.data.order import Mixture, Order
from longclip.data.shards import Dataset, Sample, open_dataset, write_shard
from longclip.data.sources import Sources
from longclip.data.text import Text
from longclip.data.tokens import Tokenizer, vocabulary_of, waste
from longclip.model.towers import Pixels
from tests.data.forms import form

WORDS = [f"w{i}" for i in range(60)]


def make_tokenizer(folder: Path, single: str = "[CLS] $A [SEP]") -> None:
    """A word-level tokenizer as a transformers folder."""
    vocab = {word: i for i, word in enumerate(["[PAD]", "[CLS]", "[SEP]", "[UNK]", *WORDS])}
    raw = RawTokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    raw.post_processor = processors.TemplateProcessing(single=single, special_tokens=[("[CLS]", 1), ("[SEP]", 2)])
    folder.mkdir(parents=True)
    raw.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        '{"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "[PAD]", "cls_token": "[CLS]", '
        '"sep_token": "[SEP]", "unk_token": "[UNK]"}'
    )


def picture(seed: int, size: tuple[int, int] = (20, 12)) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


def make_shards(folder: Path, sizes: list[int], spoil: tuple[str, ...] = ()) -> Dataset:
    """Shards whose sample ``k`` has the text ``w<k mod 60>`` repeated k mod 7 + 1 times; ``spoil`` breaks images."""
    folder.mkdir(parents=True)
    for shard, size in enumerate(sizes):
        samples = []
        for i in range(size):
            key = f"{shard:02d}-{i:03d}"
            image = picture(100 * shard + i)
            if key in spoil:  # the header is whole, so the index takes it; the pixels are not there
                image = image[:60]
            k = 7 * shard + i
            samples.append(Sample(key, image, " ".join([WORDS[k % 60]] * (k % 7 + 1)), {"long": f"w1 w2 {key}"}))
        write_shard(folder / f"s-{shard:02d}.tar", samples)
    index_folder(folder)
    return open_dataset(folder)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("loader")
    make_tokenizer(root / "tok")
    make_shards(root / "set", [5, 9, 4, 6])
    make_shards(root / "spoiled", [6, 6], spoil=("00-002", "01-004"))
    return root


def reader(root: Path, name: str = "set", window: int = 6, field: str = "txt") -> Reader:
    pixels = Pixels(8, (0.5,) * 3, (0.5,) * 3)
    return Reader(open_dataset(root / name), Tokenizer(str(root / "tok"), window), pixels, Text(field))


def texts_of(batch: Batch) -> list[tuple[int, ...]]:
    """Token ids by place in the batch."""
    pieces = torch.split(batch.text.ids_T, list(batch.text.lengths))
    return [tuple(p.tolist()) for _, p in sorted(zip(batch.text.order, pieces, strict=True), key=lambda x: x[0])]


def pairs_of(parts: Iterable[Batch]) -> list[tuple[bytes, tuple[int, ...]]]:
    """Pixels and tokens of all pairs of a global batch, whichever rank has them."""
    return sorted(
        (pixels.numpy().tobytes(), text)
        for part in parts
        for pixels, text in zip(part.pixels, texts_of(part), strict=True)
    )


def global_batches(root: Path, ranks: int, workers: int, steps: range) -> list[list[tuple[bytes, tuple[int, ...]]]]:
    source = reader(root)
    order = Order(source.dataset.sizes, seed=5, block=2)
    streams = [training_batches(source, order, (0.5, 1.0), 12, steps, r, ranks, workers) for r in range(ranks)]
    return [pairs_of(parts) for parts in zip(*streams, strict=True)]


def test_global_batches_are_the_same_on_any_ranks_and_workers(shards: Path) -> None:
    """Over two epochs (24 pairs, batches of 12), pixels with their random crops included, bit for bit."""
    expected = global_batches(shards, 1, 0, range(4))
    assert len({text for pairs in expected for _, text in pairs}) > 5
    for ranks in (1, 2, 3, 4):
        for workers in (0, 1, 2, 3):
            assert global_batches(shards, ranks, workers, range(4)) == expected


def test_a_signal_to_all_processes_is_for_the_one_that_trains(shards: Path) -> None:
    """TERM at a preemption, from Slurm or torchrun: the run goes on to its next save, and needs its batches."""
    source = reader(shards)
    order = Order(source.dataset.sizes, seed=5, block=2)
    stream = training_batches(source, order, (0.5, 1.0), 12, range(40), 0, 1, 1)
    seen = [next(stream)]
    workers = [str(child.pid) for child in multiprocessing.active_children() if child.daemon]
    subprocess.run(["kill", "-TERM", *workers], check=True)  # torch tells a signal of the parent's from another's
    assert len([*seen, *stream]) == 40 and workers


@given(st.lists(st.integers(0, 10**6), min_size=1, max_size=60), st.integers(1, 8))
def test_ranks_are_dealt_the_same_length_of_text(lengths: list[int], ranks: int) -> None:
    """Each place to one rank, equally many to each, whose lengths add up to the same but for one text's at most."""
    lengths = lengths * ranks
    dealt = deal(np.array(lengths), ranks)
    assert dealt.shape == (ranks, len(lengths) // ranks) and sorted(dealt.ravel().tolist()) == list(range(len(lengths)))
    assert (np.diff(dealt, axis=1) > 0).all()
    sums = [sum(lengths[place] for place in places) for places in dealt.tolist()]
    assert max(sums) - min(sums) <= max(lengths) - min(lengths)


def test_the_text_that_is_read_is_what_counts(shards: Path) -> None:
    """A caption by its text member, a field by the json member."""
    source = reader(shards)
    places = np.array([(shard, index) for shard, size in enumerate(source.dataset.sizes) for index in range(size)])
    samples = [source.dataset.read(shard, index) for shard, index in places.tolist()]
    assert source.text_bytes(places).tolist() == [len(sample.text) for sample in samples]
    by_field = replace(source, text=Text("{txt} {long}"))
    assert by_field.text_bytes(places).tolist() == [len(json.dumps(sample.fields)) for sample in samples]


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 25), min_size=1, max_size=12).filter(lambda s: sum(s) > 0),
    share=st.integers(1, 5),
    seed=st.integers(0, 1000),
    block=st.integers(1, 5),
)
def test_ranks_share_one_sequence_of_any_size(sizes: list[int], share: int, seed: int, block: int) -> None:
    """Two epochs of any index: 1, 2, 3, 4 ranks lay the same batches together, and an epoch is the index once."""

    class Places:
        def batch(self, places: list[tuple[int, int]], *_: object) -> list[tuple[int, int]]:
            return places

        def text_bytes(self, places: NDArray[np.int64]) -> NDArray[np.int64]:
            return (places[:, 0] * 31 + places[:, 1] * 17) % 13

    batch = 12 * share
    steps = -(-2 * sum(sizes) // batch)
    sequences = []
    for ranks in (1, 2, 3, 4):
        order = Order(sizes, seed, block)
        parts = [_Steps(cast(Any, Places()), order, (1.0, 1.0), batch, r, ranks) for r in range(ranks)]
        sequences.append([cast(Any, place) for s in range(steps) for part in parts for place in cast(Any, part[s])])
    for sequence in sequences:
        for start in range(0, len(sequence), batch):
            assert sorted(sequence[start : start + batch]) == sorted(sequences[0][start : start + batch])
    everything = sorted((shard, i) for shard, size in enumerate(sizes) for i in range(size))
    for epoch in range(2):
        assert sorted(sequences[0][epoch * sum(sizes) : (epoch + 1) * sum(sizes)]) == everything


def mixed_batches(
    root: Path, ranks: int, workers: int, steps: range
) -> list[tuple[list[tuple[bytes, tuple[int, ...]]], list[str]]]:
    """Two sources, one with bad images, texts from a mix with shuffled sentences."""
    parts = tuple(open_dataset(root / name) for name in ("set", "spoiled"))
    text = Text("{txt} w9. {long}. W1 w2. W3 w4", "txt", 0.5, shuffle=True)
    source = replace(reader(root, window=40), dataset=Sources(parts), text=text)
    order = Mixture([part.sizes for part in parts], 5, [3, 1], block=2)
    streams = [training_batches(source, order, (0.5, 1.0), 12, steps, r, ranks, workers) for r in range(ranks)]
    return [
        (pairs_of(parts), sorted(name for part in parts for name in part.bad)) for parts in zip(*streams, strict=True)
    ]


def test_mixed_sources_are_the_same_on_any_ranks_and_workers(shards: Path) -> None:
    """Weights, text mix, sentence order, crops and bad samples, through several epochs of the smaller source."""
    expected = mixed_batches(shards, 1, 0, range(12))
    bad = [name for _, names in expected for name in names]
    # 144 positions, a quarter of them over the 12 samples of the second source: three epochs, each bad sample thrice.
    assert sorted(name.split(":")[0] for name in bad) == ["00-002"] * 3 + ["01-004"] * 3
    lengths = {len(text) for pairs, _ in expected for _, text in pairs}
    assert len(lengths) > 10, "short and long texts are not both there"
    for ranks, workers in ((1, 2), (2, 0), (3, 1), (4, 2)):
        assert mixed_batches(shards, ranks, workers, range(12)) == expected


@settings(max_examples=15, deadline=None)
@given(
    kills=st.lists(st.integers(1, 4), min_size=1, max_size=4),
    ranks=st.lists(st.sampled_from([1, 2, 3, 4, 6]), min_size=5),
)
def test_mixed_sources_killed_and_continued_on_other_ranks(shards: Path, kills: list[int], ranks: list[int]) -> None:
    """Attempts of a few steps each, each on other ranks: laid end to end they are the run that was never stopped."""
    ends = [0, *np.cumsum(kills).tolist()]
    found = [
        batch
        for (first, last), size in zip(pairwise(ends), ranks, strict=False)
        for batch in mixed_batches(shards, size, 0, range(first, last))
    ]
    assert found == mixed_batches(shards, 1, 0, range(ends[-1]))


@settings(max_examples=10, deadline=None)
@given(start=st.integers(0, 30), ranks=st.sampled_from([1, 2, 3, 4, 6]))
def test_resuming_anywhere_gives_the_same_batches(shards: Path, start: int, ranks: int) -> None:
    (found,) = global_batches(shards, ranks, 0, range(start, start + 1))
    assert found == global_batches(shards, 1, 0, range(start + 1))[start]


def test_a_bad_sample_keeps_its_place_and_is_named(shards: Path) -> None:
    source = reader(shards, "spoiled")
    places = [(0, i) for i in range(6)] + [(1, i) for i in range(6)]
    batch = source.batch(places, [None] * 12)
    assert (~batch.valid).nonzero()[:, 0].tolist() == [2, 10]
    assert [b.split(":")[0] for b in batch.bad] == ["00-002", "01-004"]
    assert texts_of(batch)[2] == (1, 2)  # [CLS] [SEP]: the tower still runs
    assert len(batch.text) == 12


def test_missing_field_is_a_bad_sample(shards: Path) -> None:
    batch = reader(shards, field="nothing").batch([(0, 0)], [None])
    assert batch.bad == ("00-000: no text in nothing",)
    assert reader(shards, field="long").batch([(0, 0)], [None]).bad == ()


def test_a_disk_that_fails_is_not_masked(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def fail(self: Dataset, shard: int, index: int) -> Sample:
        calls.append(1)
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("time.sleep", lambda s: None)
    monkeypatch.setattr(Dataset, "read", fail)
    with pytest.raises(OSError, match="Input/output error"):
        reader(shards).batch([(0, 0)], [None])
    assert len(calls) == 4


@pytest.mark.parametrize(("ranks", "batch"), [(1, 5), (2, 5), (3, 4), (4, 7), (4, 100)])
def test_evaluation_sees_every_sample_once_and_ranks_keep_step(shards: Path, ranks: int, batch: int) -> None:
    source = reader(shards)
    streams = [list(evaluation_batches(source, batch, r, ranks)) for r in range(ranks)]
    assert len({len(s) for s in streams}) == 1, "ranks make different numbers of forwards: ZeRO-3 would hang"
    seen = [t for parts in zip(*streams, strict=True) for b, n in parts for t in texts_of(b)[:n]]
    places = [(s, i) for s, size in enumerate(source.dataset.sizes) for i in range(size)]
    assert seen == texts_of(source.batch(places, [None] * len(places)))


def test_window_and_waste(shards: Path) -> None:
    full = Tokenizer(str(shards / "tok"), 100)
    tokenizer = Tokenizer(str(shards / "tok"), 4)
    texts = ["w1 w2 w3 w4 w5", "w1", ""]
    ids, lengths = tokenizer(texts)
    assert lengths == [7, 3, 2]
    assert [len(i) for i in ids] == [4, 3, 2]
    assert ids[0] == [1, 5, 6, 2]
    full._tokenizer.model_max_length = 4
    assert ids == full._tokenizer(texts, truncation=True)["input_ids"]  # tokenizers' own truncation
    assert waste(lengths, 4) == 3 / 12
    assert vocabulary_of(shards / "tok") == tokenizer.vocabulary == 64


@pytest.mark.parametrize("single", ["[CLS] $A [SEP]", "[CLS] $A", "$A", "$A [SEP] [CLS]"])
def test_cut_as_tokenizers_truncate(single: str, tmp_path: Path) -> None:
    """Whatever special tokens a text ends in, none among them: then its first words are kept, and no last one."""
    make_tokenizer(tmp_path / "tok", single)
    for window in range(2, 9):
        ours, theirs = Tokenizer(str(tmp_path / "tok"), window), Tokenizer(str(tmp_path / "tok"), window)
        theirs._tokenizer.model_max_length = window
        texts = ["w1 w2 w3 w4 w5", "w1", "w7 w8 unheard w9 w10 w11 w12"]
        assert ours(texts)[0] == theirs._tokenizer(texts, truncation=True)["input_ids"]


def test_square_without_crop_is_the_middle() -> None:
    wide = np.zeros((10, 30, 3), dtype=np.uint8)
    wide[:, 4:26] = 200  # bicubic looks a little beyond the square
    stream = io.BytesIO()
    Image.fromarray(wide).save(stream, "PNG")
    assert (square(stream.getvalue(), form(5), None) == 200).all()
    with pytest.raises(ValueError, match="not a readable image"):
        square(b"GIF89a nonsense", form(5), None)
