"""Descriptions: what they are made of, where each sentence comes from, and that they stay within their budget."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longclip.data.counter import TokenCounter
from longclip.data.waste import Lengths
from longclip.longcap.article import Article, Figure, License, Mention, Paragraph
from longclip.longcap.context import Context, Description
from tests.vocabularies import clip_bpe, wordpiece

PLOS = Path(os.environ.get("LONGCLIP_TEST_DATA", Path(__file__).parents[3] / "shared" / "data")) / "jats" / "plos"
CAPTION = "Optic nerve head in glaucoma. (A) OCT of the rim. (B) Loss of ganglion cells after six weeks."
BODY = (
    "Glaucoma is common. Retinal imaging used optical coherence tomography (OCT).",
    "The rim thinned in all eyes with glaucoma (Fig. 1A). This loss of ganglion cells began in week two. "
    "Weather was fine. Animals were fed daily (Fig. 2). These ganglion cells were counted by hand.",
    "See Figure 1. Loss of ganglion cells after six weeks in the optic nerve head is seen in Fig. 1B. "
    "The rim thinned with glaucoma in all the eyes (Fig. 1). RGC density fell by half (Figs. 1 and 2).",
    "Retinal ganglion cells (RGC) are neurons. Nothing else is told of them.",
)
ABSTRACT = ("Glaucoma kills ganglion cells of the optic nerve. We fed mice. Mice are fine.",)


def words(text: str) -> int:
    """A tokenizer of words and two special tokens."""
    return len(text.split()) + 2


def lengths_of(texts: list[str], counter: TokenCounter) -> Lengths:
    return Lengths(Counter(counter.many(texts)), counter.specials)


def describe(article: Article, figure: Figure, budget: int, count: Callable[[str], int]) -> Description:
    return Context(article, count).describe(figure, budget)


def figure(id: str, caption: str, *names: str) -> Figure:
    """A figure that is mentioned wherever the body says one of ``names``."""
    mentions = []
    for p, text in enumerate(BODY):
        for name in names:
            start = text.find(name)
            while start >= 0:
                mentions.append(Mention(p, start, start + len(name), "xref"))
                start = text.find(name, start + 1)
    return Figure(id, "", "", caption, (), mentions=tuple(sorted(mentions, key=lambda m: (m.paragraph, m.start))))


def article(*figures: Figure, body: tuple[str, ...] = BODY, abstract: tuple[str, ...] = ABSTRACT) -> Article:
    paragraphs = tuple(Paragraph(text, "") for text in body)
    none = License("unknown")
    return Article("", "", "", "", "", "", abstract, (), (), (), "", (), none, paragraphs, figures)


FIRST = figure("f1", CAPTION, "Fig. 1", "Figure 1", "Figs. 1")
SECOND = figure("f2", "Feeding.", "Fig. 2", "Figs. 1 and 2")


def test_what_is_said_and_from_where() -> None:
    """The caption; its mentions without repetition; what leans on them; abbreviations; one sentence of background."""
    found = describe(article(FIRST, SECOND), FIRST, 512, words)
    assert [(s.source, s.text) for s in found.sentences] == [
        ("caption", CAPTION),
        ("mention p2 s1", "The rim thinned in all eyes with glaucoma (Fig. 1A)."),
        ("mention p2 s2 (beside)", "This loss of ganglion cells began in week two."),
        ("mention p2 s5 (beside)", "These ganglion cells were counted by hand."),
        ("mention p3 s4", "RGC density fell by half (Figs. 1 and 2)."),
        ("abbreviation p1", "OCT: optical coherence tomography."),
        ("abbreviation p4", "RGC: Retinal ganglion cells."),
        ("abstract 1 s1", "Glaucoma kills ganglion cells of the optic nerve."),
    ]
    assert found.text == " ".join(s.text for s in found.sentences)
    assert found.tokens == words(found.text)


def test_what_is_left_out() -> None:
    """p3 s1 says nothing, p3 s2 what the caption says, p3 s3 what p2 s1 says; p2 s4 is of another figure."""
    text = describe(article(FIRST, SECOND), FIRST, 512, words).text
    for left_out in (
        "See Figure 1",
        "is seen in Fig. 1B",
        "all the eyes",
        "fed daily",
        "Weather",
        "fed mice",
    ):
        assert left_out not in text


def test_the_caption_comes_first_whatever_the_budget() -> None:
    """A small budget holds the caption's first sentences, then the caption, then its abbreviation, then mentions."""
    given = {budget: describe(article(FIRST, SECOND), FIRST, budget, words) for budget in range(2, 60)}
    assert all(found.tokens <= budget for budget, found in given.items())
    assert (
        given[2].text == "" and given[5].text == "Optic nerve head" and given[7].text == "Optic nerve head in glaucoma."
    )
    assert given[12].sentences[0].source == "caption, cut" and given[12].text.endswith("OCT of the rim.")
    whole = words(CAPTION)
    assert [s.source for s in given[whole].sentences] == ["caption"]
    assert [s.source for s in given[whole + 4].sentences] == ["caption", "abbreviation p1"]
    assert "mention p2 s1" in [s.source for s in given[whole + 4 + 11].sentences]
    with pytest.raises(ValueError, match="special"):
        describe(article(FIRST), FIRST, 1, words)


def test_a_figure_that_nothing_mentions_has_background_only() -> None:
    alone = Figure("f9", "", "", "The optic nerve head and its rim in glaucoma", ())
    sources = [s.source for s in describe(article(alone), alone, 512, words).sentences]
    assert sources == ["caption", "abstract 1 s1"]


def test_without_a_caption_its_mentions_still_speak() -> None:
    bare = figure("f1", "", "Fig. 1A")
    found = describe(article(bare), bare, 512, words)
    assert found.sentences[0].source == "mention p2 s1" and found.text.startswith("The rim thinned")
    empty = Figure("f3", "", "", "", ())
    assert describe(article(empty, body=(), abstract=()), empty, 512, words).sentences == ()


def across_spaces(text: str) -> int:
    """A tokenizer that sees pairs of characters, white space included: lengths of parts do not add up."""
    return (len(text) + 1) // 2 + 3


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.lists(st.sampled_from(BODY), min_size=1, max_size=3).map(" ".join), max_size=5),
    st.text(alphabet="Aab. (1)", max_size=80),
    st.integers(3, 200),
    st.sampled_from([words, across_spaces]),
)
def test_never_beyond_the_budget(body: list[str], caption: str, budget: int, count: Callable[[str], int]) -> None:
    mentions = tuple(Mention(p, min(7 * p, len(text) - 1), len(text), "text") for p, text in enumerate(body))
    drawn = Figure("f", "", "", " ".join(caption.split()), (), mentions=mentions)
    found = describe(article(drawn, body=tuple(body)), drawn, budget, count)
    assert found.tokens == count(found.text) <= budget
    assert found.text == " ".join(s.text for s in found.sentences)


def test_the_same_in_every_process() -> None:
    """Sets are ordered by a hash that differs from process to process; descriptions are not."""
    script = (
        "import sys, tests.longcap.test_context as t\n"
        "a = t.article(t.FIRST, t.SECOND)\n"
        "print([t.describe(a, f, b, t.words) for f in a.figures for b in (40, 70)])"
    )
    said = set()
    for seed in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": str(Path(__file__).parents[2])}
        done = subprocess.run(
            [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True
        )
        said.add(done.stdout)
    assert len(said) == 1


@pytest.fixture(scope="module")
def plos() -> list[Article]:
    from longclip.longcap.jats import parse

    if not PLOS.is_dir():
        pytest.skip(f"no articles at {PLOS} (LONGCLIP_TEST_DATA names others)")
    return [parse(file.read_bytes()) for file in sorted(PLOS.glob("*.nxml"))]


def test_plos_captions_as_published(plos: list[Article]) -> None:
    """Shares from the data's own description, within half a point."""
    captions = [figure.caption for read in plos for figure in read.figures if figure.caption]
    for vocabulary, expected in (
        (clip_bpe(), (0.613, 0.357, 0.170, 0.036)),
        (wordpiece(), (0.608, 0.353, 0.166, 0.036)),
    ):
        found = lengths_of(captions, TokenCounter(vocabulary))
        assert [found.waste(window) for window in (77, 154, 256, 512)] == pytest.approx(expected, abs=0.005)


def test_plos_at_512(plos: list[Article]) -> None:
    """Long, within the budget, and from where the figure is mentioned: on 121 real articles.

    What is added is looked up in the article by its text, not by what the description says of its source.
    """
    count = TokenCounter(clip_bpe())
    captions, texts, where = [], [], Counter[str]()
    for read in plos:
        context = Context(read, count)
        told = "\n".join([*read.abstract, *(paragraph.text for paragraph in read.paragraphs)])
        for one in read.figures:
            if not one.caption:
                continue
            found = context.describe(one, 512)
            captions.append(one.caption)
            texts.append(found.text)
            here = [read.paragraphs[p].text for p in {mention.paragraph for mention in one.mentions}]
            for sentence in found.sentences[1:]:
                source = sentence.source.split()[0]
                where[source] += 1
                if source == "mention":
                    assert any(sentence.text in paragraph for paragraph in here)
                elif source == "abbreviation":
                    short, long = sentence.text[:-1].split(": ", 1)
                    assert short in found.text.replace(sentence.text, "") and long in told
                else:
                    assert any(sentence.text in paragraph for paragraph in read.abstract)
    lengths = lengths_of(texts, count)
    assert lengths.cut(512) == 0
    assert lengths.waste(77) >= 0.75
    assert lengths.tokens >= 2.0 * lengths_of(captions, count).tokens
    assert where["mention"] + where["abbreviation"] >= 0.9 * where.total()
