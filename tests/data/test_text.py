"""What a sample's text is: names, templates, mixes, shuffled sentences; and who draws what."""

from __future__ import annotations

from collections import Counter

import pytest

from longclip.data.order import Draw
from longclip.data.sentences import sentences
from longclip.data.text import Text, render
from longclip.experiment.schema import Data
from longclip.experiment.template import template

FIELDS = {
    "txt": "Figure 1:  a\nlesion.",
    "long_caption": "A long one.",
    "image_context": {"F1": ["Fig. 1 shows it.", "Both differ."], "F2": ["Both differ.", "So does F2."]},
    "keywords": ["liver", "CT"],
    "nothing": None,
    "number": 3,
}


@pytest.mark.parametrize(
    ("asked", "text"),
    [
        ("txt", "Figure 1:  a\nlesion."),  # a name alone leaves the text as it is
        ("{txt}", "Figure 1: a lesion."),
        ("image_context", "Fig. 1 shows it. Both differ. So does F2."),
        ("{txt} {image_context}", "Figure 1: a lesion. Fig. 1 shows it. Both differ. So does F2."),
        ("{keywords}: {long_caption}", "liver CT: A long one."),
        ("{{{txt}}}", "{Figure 1: a lesion.}"),
        ("{txt}{nothing}{absent}", "Figure 1: a lesion."),
        ("nothing", ""),
        ("number", ""),
    ],
)
def test_rendered(asked: str, text: str) -> None:
    assert render(asked, FIELDS) == text


@pytest.mark.parametrize("wrong", ["{txt", "txt}", "{}", "{txt!r}", "{txt:>9}", "a {{b}}", ""])
def test_templates_that_are_none(wrong: str) -> None:
    with pytest.raises(ValueError, match=r".+"):
        template(wrong)


def test_a_template_reaches_into_nothing() -> None:
    """Names are looked up as they stand: no attributes, no items."""
    assert render("{txt.__class__}{image_context[F1]}", FIELDS) == ""


def draws(count: int, epoch: int = 0, seed: int = 0) -> list[Draw]:
    return [Draw(seed, epoch, i % 3, i // 3) for i in range(count)]


def test_a_mix_is_drawn_by_sample_and_epoch() -> None:
    data = Data.model_validate(
        {"train": "a", "val": "b", "text": {"short": "txt", "long": "{long_caption}", "p_long": 0.3}}
    )
    text = Text.of(data)
    assert text.names == ("long_caption", "txt")
    picked = [text("short", FIELDS, draw) == "A long one." for draw in draws(2000)]
    assert 540 < sum(picked) < 660  # three deviations of 20 around 600
    assert [text("short", FIELDS, draw) == "A long one." for draw in draws(2000)] == picked
    again = [text("short", FIELDS, draw) == "A long one." for draw in draws(2000, epoch=1)]
    # Independent of the first epoch: as often long in both as 0.3 squared says.
    assert 140 < sum(a and b for a, b in zip(picked, again, strict=True)) < 220
    assert text("short", FIELDS) == "A long one."  # validation draws nothing


def test_the_other_text_does_not_stand_in() -> None:
    text = Text("long_caption", "txt", 0.5)
    said = Counter()
    for draw in draws(200):
        try:
            said[text("short", {}, draw)] += 1
        except ValueError as error:
            said[str(error)] += 1
    assert set(said) == {"short", "no text in long_caption"}


PARAGRAPH = (
    "Lesions (Fig. 2 and Figs. 3-4) were seen, e.g. Those of Smith et al. Reported before. A 3.5 mm nodule grew! "
    'Did E. coli matter? "It did." (See the text.) [CT] was vs. MRI.'
)


def cut(text: str) -> list[str]:
    return [text[start:end] for start, end in sentences(text)]


def test_shuffled_sentences() -> None:
    """All of them, in another order each epoch, the same each time it is asked; in evaluation as written."""
    text = Text("txt", shuffle=True)
    orders = [text(PARAGRAPH, {}, draw) for epoch in range(30) for draw in draws(1, epoch)]
    assert {tuple(sorted(cut(order))) for order in orders} == {tuple(sorted(cut(PARAGRAPH)))}
    assert len(set(orders)) > 25
    assert orders == [text(PARAGRAPH, {}, draw) for epoch in range(30) for draw in draws(1, epoch)]
    assert text(PARAGRAPH, {}) == PARAGRAPH
