"""What the guard lets through and what it stops, fact by fact."""

from __future__ import annotations

import os
import random
import re
import tarfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from longclip.longcap.guard import invented

DATA = Path(os.environ.get("LONGCLIP_TEST_DATA", Path(__file__).parents[3] / "shared" / "data"))
SOURCE = (
    "Figure 2. IL-6 levels in CD8+ T cells (n = 12 mice, p < 0.05) after 5 mg/kg of LPS for 24h at 37°C; scale bar, "
    "50 µm. The mice, 10–20 weeks old, were given 1,000 IU. Brown fat was weighed. It fell by −2.5 °C, two-fold (A)."
)


@pytest.mark.parametrize(
    "text",
    [
        SOURCE,
        "",
        "IL-6 levels in CD8+ T cells of 12 mice after LPS.",
        "These mice were 10-20 weeks old. Cells of mice fell by two fold.",
        "Scale bar, 50 μm; 37 °C, 24 h; 1000 IU",  # another sign for micro, other spacing, no comma
        "With LPS: 5 mg/kg (p<0.05). Levels fell by -2.5°C.",
        "T-cell levels and LPS cells",
        "The fat was brown, and the cells fell.",
    ],
)
def test_what_the_source_says_may_be_said_in_other_words(text: str) -> None:
    assert invented(text, SOURCE) == ()


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("13 mice", "13"),
        ("n = 120 mice", "120"),
        ("p > 0.05", "> 0.05"),
        ("p = 0.05", "0.05"),
        ("fell by 2.5 °C", "2.5 °C"),
        ("scale bar, 50 mm", "50 mm"),
        ("scale bar, 50 nm", "50 nm"),
        ("for 24 days", "24 days"),
        ("10-20 days old", "10-20 days"),
        ("5 mg of LPS", "mg"),
        ("measured in ml", "ml"),
        ("60% of mice", "60 %"),
        ("three mice", "three"),
        ("a dozen mice", "dozen"),
        ("half of the mice", "half"),
        ("IL-2 levels", "IL-2"),
        ("CD8 T cells", "CD8"),
        ("CD4+ T cells", "CD4+"),
        ("the mice had Alzheimer disease", "Alzheimer"),
        ("Alzheimer mice fell.", "Alzheimer"),
        ("in the Mice", "Mice"),
        ("WEEKS of LPS", "WEEKS"),
        ("panel (B)", "B"),
        ("Figure 3", "3"),
        ("IFNγ levels", "IFNγ"),
        ("５００ mice", "500"),  # full-width digits
        ("１2 rats, Ωmega", "Ωmega"),
    ],
)
def test_what_it_does_not_say_is_named(text: str, what: str) -> None:
    assert what in invented(text, SOURCE)


POWERS = "We counted 10⁶ cells, 106 mice, 5 × 10⁻³ g, p < 10^−5, 2.5·10^4 and 7^8; an area of 4 mm² (n = 38)."


@pytest.mark.parametrize(
    "text", ["10^6 cells and 106 mice", "10⁶ cells", "p < 10⁻⁵, 5 × 10^-3 g", "4 mm2, 4 mm²", "2.5·10⁴, 7⁸"]
)
def test_a_power_may_be_written_either_way(text: str) -> None:
    assert invented(text, POWERS) == ()


@pytest.mark.parametrize(
    ("text", "source", "what"),
    [
        ("106 cells", "10⁶ cells", "106"),
        ("10⁶ cells", "106 cells", "10^6"),
        ("10^6 cells", "10 mice, 6 rats", "10^6"),
        ("10 cells", "10⁶ cells", "10"),
        ("10⁻⁶ g", "10⁶ g", "10^-6 g"),
        ("10⁶ g", "10⁻⁶ g", "10^6 g"),
        ("10^7 cells", "10⁶ cells", "10^7"),
        ("10⁶ mg", "10⁶ g", "10^6 mg"),
        ("10^6mg", "10⁶ g", "10^6 mg"),
        ("10⁵–10⁷ cells", "10⁵–10⁶ cells", "10^5-10^7"),
    ],
)
def test_a_power_is_no_other_number(text: str, source: str, what: str) -> None:
    assert what in invented(text, source)


@given(st.text(), st.text())
def test_any_text_is_judged_and_none_invents_against_itself(text: str, other: str) -> None:
    assert invented(text, text) == ()
    invented(text, other)


@given(st.integers(0, 10**9).map(str), st.sampled_from(["mg", "mm", "%", "h", ""]))
def test_no_number_passes_that_is_not_there(number: str, unit: str) -> None:
    assert invented(f"about {number} {unit} here", "nothing is counted here, about it") != ()


@pytest.mark.skipif(not (DATA / "openstax").is_dir(), reason="no real long texts here")
def test_on_real_texts_sentences_may_move_and_numbers_may_not() -> None:
    with tarfile.open(DATA / "openstax" / "val-00000.tar") as tar:
        read = [file.read().decode() for m in tar if m.name.endswith(".txt") and (file := tar.extractfile(m))]
    chance, changed = random.Random(0), 0
    for text in read:
        sentences = re.split(r"(?<=[.!?])\s+", text)
        chance.shuffle(sentences)
        assert invented(" ".join(sentences), text) == ()
        assert invented(" ".join(sentences[::2]), text) == ()
        if numbers := list(re.finditer(r"\d+", text)):
            at = chance.choice(numbers)
            other = str(int(at[0]) + chance.randint(1000, 9000))
            assert invented(text[: at.start()] + other + text[at.end() :], text) != ()
            changed += 1
    assert (len(read), changed) == (301, 95)
