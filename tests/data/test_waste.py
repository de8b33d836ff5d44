"""Token counts against other implementations, waste against its definition, and the command that shows it."""

from __future__ import annotations

import csv
import gzip
import json
import os
import pickle
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longclip.data.counter import TokenCounter
from longclip.data.index import index_folder
from longclip.data.shards import Sample, open_dataset, write_shard
from longclip.data.tokens import Tokenizer, cut
from longclip.data.waste import Lengths, measure
from longclip.errors import UserError
from tests.data.test_loader import make_tokenizer, picture
from tests.vocabularies import clip_bpe, wordpiece

OPENSTAX = Path(os.environ.get("LONGCLIP_TEST_DATA", Path(__file__).parents[3] / "shared" / "data")) / "openstax"
ODD = [
    "",
    "a photo of a cat",
    "  T1-weighted\tMRI: 3.5 mm, p<0.05; it's β-actin (n=12)\n",
    "naïve Ångström µm — “quoted” 37°C",
    "1,234.5 10⁻³ CD8+ IL-6 α/β …",
    "日本語 and Ελληνικά, e\u0301 combined",
    "THEY'LL don't we've <b>&amp;</b>",
]


def test_clip_counts_as_clip_does() -> None:
    """Ids that CLIP's own code gives, and transformers' tokenizer over the same vocabulary for odd texts."""
    from transformers import CLIPTokenizer

    counter = TokenCounter(clip_bpe())
    assert counter._tokenizer.encode("a photo of a cat").ids == [49406, 320, 1125, 539, 320, 2368, 49407]
    lines = gzip.decompress(clip_bpe().read_bytes()).decode().split("\n")[1:48895]
    theirs = CLIPTokenizer(vocab=counter._tokenizer.get_vocab(), merges=[tuple(line.split()) for line in lines])
    for text in ODD:
        assert counter._tokenizer.encode(text).ids == theirs(text)["input_ids"], text
    assert counter.specials == 2 and counter.many(ODD) == [counter(text) for text in ODD]


def test_wordpiece_counts_the_same_from_either_file() -> None:
    """tokenizer.json cuts at 128 and pads to 128 as it is; the window is ours to cut, and padding is no token."""
    folder = wordpiece()
    assert json.loads((folder / "tokenizer.json").read_text())["truncation"]["max_length"] == 128
    whole, plain, alone = TokenCounter(folder), TokenCounter(folder / "vocab.txt"), TokenCounter(folder)
    texts = [*ODD, "word " * 300]
    assert whole.many(texts) == plain.many(texts) == Tokenizer(str(folder), 10**6)(texts)[1]
    assert whole("word " * 300) == 302 and whole.specials == 2
    assert pickle.loads(pickle.dumps(alone))("word") == 3


lengths = st.lists(st.integers(2, 600), min_size=1, max_size=40)


@settings(deadline=None)
@given(lengths, st.integers(3, 600))
def test_waste_is_what_truncation_loses(sizes: list[int], window: int) -> None:
    """Token by token: the texts as ids, cut as the loader cuts them, padded as a batch pads them."""
    texts = [[0, *range(10, 8 + size), 1] for size in sizes]
    kept = [cut(ids, window, 1) for ids in texts]
    own = [sum(i > 1 for ids in some for i in ids) for some in (texts, kept)]
    found = Lengths(Counter(sizes), specials=2)
    assert found.cut(window) == own[0] - own[1]
    assert found.waste(window) == pytest.approx((own[0] - own[1]) / own[0] if own[0] else 0)
    assert found.padding(window) == pytest.approx(sum(window - len(ids) for ids in kept) / (window * len(kept)))
    assert found.texts_cut(window) == sum(a != b for a, b in zip(texts, kept, strict=True)) / len(texts)
    assert found.quantile(0.5) == sorted(sizes)[(len(sizes) - 1) // 2]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two shards of 30; sample k has k mod 7 + 1 words, and ``long``, which every tenth lacks, 100 words."""
    folder = tmp_path_factory.mktemp("waste")
    for shard in range(2):
        samples = []
        for k in range(30):
            fields = {} if k % 10 == 9 else {"long": " ".join(["w1"] * 100)}
            samples.append(Sample(f"{shard}-{k}", picture(k), " ".join(["w1"] * (k % 7 + 1)), fields))
        write_shard(folder / f"s{shard}.tar", samples)
    index_folder(folder)
    make_tokenizer(folder / "tok")
    return folder


def tokens(cwd: Path, *words: str, code: int = 0) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "longclip.cli", "data", "tokens", *words]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True)
    assert done.returncode == code and "Traceback" not in done.stderr, done
    return done


def test_measured_is_exact_whatever_the_workers(shards: Path) -> None:
    expected = Counter(k % 7 + 1 + 2 for k in range(30) for _ in range(2))
    tokenizer = str(shards / "tok")
    seen: list[tuple[int, int]] = []
    for workers in (1, 2, 3):
        found = measure([str(shards)], tokenizer, workers=workers, progress=lambda *step: seen.append(step))
        assert (found.counts, found.specials, found.without) == (expected, 2, Counter())
    assert seen == 3 * [(30, 60), (60, 60)]
    twice = measure([str(shards), str(shards / "s0.tar"), f"{shards}/s*.tar"], tokenizer)
    assert twice.counts == expected, "a shard named twice counts once"
    assert measure([str(shards / "s1.tar")], tokenizer).texts == 30
    long = measure([str(shards)], tokenizer, "long")
    assert long.counts == {102: 54} and long.without == {"s0.tar": 3, "s1.tar": 3}


def test_the_command_shows_writes_and_warns(shards: Path) -> None:
    done = tokens(shards, ".", "--tokenizer", "tok", "--windows", "52", "102", "--text", "long", "--out", "res")
    assert [line.split() for line in done.stdout.splitlines()[1:3]] == [
        ["52", "50.0", "%", "2,700", "100.0", "%", "0.0", "%"],
        ["102", "0.0", "%", "0", "0.0", "%", "0.0", "%"],
    ]
    assert "! no text 'long' in 3 samples of s1.tar" in done.stderr
    with open(shards / "res" / "waste.csv") as file:
        rows = list(csv.DictReader(file))
    assert [(row["window"], row["waste"], row["tokens_cut"]) for row in rows] == [
        ("52", "0.5", "2700"),
        ("102", "0.0", "0"),
    ]
    assert (shards / "res" / "lengths.csv").read_text() == "tokens,texts\n102,54\n"
    assert (shards / "res" / "tokens.png").read_bytes().startswith(b"\x89PNG")
    said = json.loads(tokens(shards, "--windows", "4", "--json", "--workers", "2", "--tokenizer", "tok", ".").stdout)
    assert (said["texts"], said["longest"], [row["window"] for row in said["windows"]]) == (60, 9, [4])


@pytest.mark.parametrize(
    ("folder", "tokenizer", "text", "expected"),
    [
        (".", "./nowhere", "txt", "tokenizer .*/nowhere: no such file or folder"),
        (".", "empty", "txt", "holds neither tokenizer.json nor vocab.txt"),
        (".", "index.json", "txt", "index.json: not one that can be read"),
        (".", "s0.tar", "txt", "s0.tar: not one that can be read"),
        (".", "torn.txt.gz", "txt", "not CLIP's vocabulary file"),
        (".", "words.txt", "txt", "not a WordPiece vocabulary"),
        (".", "tok", "nofield", "has a text 'nofield'"),
        (".", "tok", "{a", "--text {a: expected '}' before end of string"),
        (".", "tok", "{txt!r}", "--text {txt!r}: between braces stands the name of a field and nothing else"),
        ("empty", "tok", "txt", "not indexed: .*empty"),
    ],
)
def test_mistakes(shards: Path, folder: str, tokenizer: str, text: str, expected: str) -> None:
    (shards / "empty").mkdir(exist_ok=True)
    (shards / "torn.txt.gz").write_bytes(gzip.compress(b"a b\n" * 1000)[:-20])
    (shards / "words.txt").write_text("cat\ndog\n")
    with pytest.raises(UserError, match=expected):
        measure([str(shards / folder)], str(shards / tokenizer), text)


def test_a_mistake_costs_one_line(shards: Path) -> None:
    said = tokens(shards, ".", "--tokenizer", "nowhere", code=2).stderr
    assert said.startswith(
        "error: tokenizer nowhere: no such file or folder, and not on the hub\n  next: give a folder"
    )


def test_a_shard_that_changed_since_it_was_indexed(shards: Path, tmp_path: Path) -> None:
    write_shard(tmp_path / "a.tar", [Sample("k", picture(0), "w1", {"long": "w1"})])
    index_folder(tmp_path)
    file = tmp_path / "a.tar"
    file.write_bytes(file.read_bytes().replace(b'{"long"', b'["long"'))
    done = tokens(tmp_path, ".", "--tokenizer", str(shards / "tok"), code=3)
    assert "sample k is not as it was indexed" in done.stderr and "longclip data index" in done.stderr


def test_it_counts_without_torch(shards: Path) -> None:
    script = f"""
import sys
from longclip.data.waste import measure
assert measure([{str(shards)!r}], {str(shards / "tok")!r}).texts == 60
assert not {{"torch", "transformers", "matplotlib"}} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", script], check=True)


@pytest.mark.skipif(not OPENSTAX.is_dir(), reason=f"no real shards at {OPENSTAX} (LONGCLIP_TEST_DATA names others)")
def test_openstax_as_published(tmp_path: Path) -> None:
    """Shares from the data's own description, within half a point."""
    index_folder(OPENSTAX, tmp_path, workers=2)
    found = measure([str(tmp_path)], str(clip_bpe()), workers=2)
    assert found.texts == 2547
    for window, expected in ((77, 0.518), (154, 0.251), (256, 0.105), (512, 0.023)):
        assert found.waste(window) == pytest.approx(expected, abs=0.005), window
    assert found.quantile(0.5) - found.specials == 107
    assert measure([str(tmp_path)], str(clip_bpe()), "short_text").waste(77) == pytest.approx(0.124, abs=0.005)
    dataset = open_dataset(tmp_path / "val-*.tar")
    texts = [dataset.fields_and_text(0, i)[1] for i in range(dataset.sizes[0])]
    one_by_one = Counter(map(TokenCounter(clip_bpe()), texts))
    assert measure([f"{tmp_path}/val-*.tar"], str(clip_bpe())).counts == one_by_one
