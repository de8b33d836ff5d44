"""Features by all ranks: those of the model itself, the same on any number of ranks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from longclip.data.loader import normalised
from longclip.data.tokens import Tokenizer
from longclip.evaluate.embed import Embedder
from longclip.model.clip import DualEncoder, build
from longclip.model.packing import pack
from longclip.train.ranks import Ranks
from tests.data.test_loader import WORDS, make_tokenizer
from tests.forked import fork_ranks
from tests.train import small_clip

ALONE = Ranks(0, 1, 0, torch.device("cpu"))
TEXTS = [" ".join(WORDS[(3 * i + j) % 60] for j in range(i * 7 % 30)) for i in range(23)]


def picture(i: int) -> NDArray[np.uint8]:
    if i == 7:
        raise ValueError("not an image")
    return np.random.default_rng(i).integers(0, 255, (16, 16, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def model() -> DualEncoder:
    return build(small_clip.experiment({"stage": 0}).model, 0)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("embed") / "tok"
    make_tokenizer(folder)
    return Tokenizer(str(folder), 12)


def embedder(model: DualEncoder, tokenizer: Tokenizer, ranks: Ranks = ALONE, batch: int = 4) -> Embedder:
    return Embedder(model, model, tokenizer, small_clip.FORM, ranks, batch)


def test_they_are_the_model_s_own(model: DualEncoder, tokenizer: Tokenizer) -> None:
    model.train()
    made = embedder(model, tokenizer)
    images, usable = made.images(23, picture)
    assert model.training, "and the model is as it was"
    assert usable.tolist() == [i != 7 for i in range(23)]
    model.eval()
    rows = torch.from_numpy(np.stack([picture(i) for i in range(23) if i != 7]))
    with torch.no_grad():
        expected, texts, _ = model(
            normalised(rows, small_clip.FORM, ALONE.device), pack(tokenizer([TEXTS[i] for i in range(23) if i != 7])[0])
        )
    torch.testing.assert_close(images[usable], expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(made.texts(TEXTS)[usable], texts, atol=1e-6, rtol=0)


def test_a_window_is_where_texts_are_cut(model: DualEncoder, tokenizer: Tokenizer) -> None:
    made = embedder(model, tokenizer)
    assert made.context_length == 12 and made.reach == 64
    short = [" ".join(text.split()[:4]) for text in TEXTS]
    torch.testing.assert_close(made.texts(TEXTS, 6), made.texts(short), atol=1e-6, rtol=0)
    assert made.texts(TEXTS, 64).ne(made.texts(TEXTS)).any(dim=1).tolist() == [len(t.split()) > 10 for t in TEXTS]
    with pytest.raises(ValueError, match="64 positions"):
        made.texts(TEXTS, 65)


@pytest.mark.parametrize(("count", "ranks"), [(23, 2), (23, 3), (1, 2), (0, 2)])
def test_any_number_of_ranks_gives_the_same_bits(
    model: DualEncoder, tokenizer: Tokenizer, count: int, ranks: int, tmp_path: Path
) -> None:
    def both(me: Ranks) -> list[Tensor]:
        made = embedder(model, tokenizer, me)
        return [*made.images(count, picture), made.texts(TEXTS[:count])]

    def on_each(me: Ranks) -> None:
        torch.save(both(me), tmp_path / f"{me.rank}.pt")

    torch.set_num_threads(1)
    expected = both(ALONE)
    assert fork_ranks(tmp_path / "meeting", ["a"] * ranks, on_each) == [0] * ranks
    for rank in range(ranks):
        for found, wanted in zip(torch.load(tmp_path / f"{rank}.pt"), expected, strict=True):
            assert torch.equal(found, wanted)
