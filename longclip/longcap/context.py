"""A long description of a figure, taken from its article sentence by sentence, within a token budget.

Extractive: no model, nothing drawn at random, and every sentence says where it stands. What BIOMEDICA-LongCAP
(arXiv 2510.03978) did to enrich captions is not published; this is the package's own rule:

1. the caption, whole; only where it alone exceeds the budget, as many of its first sentences as fit;
2. what the article's abbreviations in the caption stand for;
3. sentences that name this very figure, the most relevant to the caption first;
4. their direct neighbours where one leans on the other ("This shows ..."), then other sentences of the paragraphs that
   3 came from, if they share terms with the caption; never one that names another figure;
5. what the abbreviations in 3 and in the direct neighbours stand for, before the other sentences;
6. one sentence of the abstract that is akin to the caption, or up to three where nothing mentions the figure.

Relevance is the overlap of terms, weighted by how rare they are in the article. What is chosen stands in this order:
caption, text as in the article, abbreviations, abstract; so that a shorter window cuts the least specific first.

Cost per article: its words once (terms, abbreviations) and the sentences of the paragraphs that mention figures; per
figure the tokens of the caption, of new candidates and of the description, which is half of the time.
"""

from __future__ import annotations

import math
import re
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import repeat
from operator import itemgetter

from longclip.data.sentences import abbreviations, sentences
from longclip.longcap.article import Article, Figure

SAME = 0.7
"""Jaccard similarity of two sentences' terms above which the second is left out"""
TOLD = 0.9
"""share of a sentence's terms that the caption has, above which it is left out"""
NEAR, RELATED = 0.05, 0.15
"""cosine to the caption from which on a sentence beside a mention, or of the abstract, is akin to it"""
SHORTEST = 3
"""terms that a sentence must have to say anything: "See Figure 2." has none"""

TEXT, GLOSSARY, ABSTRACT = 1, 2, 3
"""parts of a description, in this order behind the caption"""

_TERM = re.compile(r"[^\W_]{3,}")
_TOKEN = re.compile(r"[^\W_]+(?:[-·][^\W_]+)*")
_EMPTY = frozenset(("figure", "fig", "table", "panel", "see", "shown", "show", "data", "supplementary"))
_LEANS = re.compile(r"(?:This|These|That|Those|It|Its|They|Their|Such|Both|Here|Hence|Thus|Therefore|Consequently)\b")


@dataclass(frozen=True)
class Sentence:
    text: str
    source: str
    """where it stands, counted from 1: "caption", or "caption, cut"; "mention p12 s3", the third sentence of
    ``Article.paragraphs[11]``, which names the figure; "mention p12 s4 (beside)", which stands in the same paragraph;
    "abbreviation p3" or "abbreviation abstract 1", where it is defined; "abstract 1 s2" """


@dataclass(frozen=True)
class Description:
    text: str
    sentences: tuple[Sentence, ...]
    """joined by spaces they are the text"""
    tokens: int
    """of the text, special tokens included"""


@dataclass(frozen=True)
class _Candidate:
    place: tuple[int, int, int]
    """TEXT, GLOSSARY or ABSTRACT, and its place within"""
    sentence: Sentence
    terms: frozenset[str]


class Context:
    """What the descriptions of an article's figures share: its sentences, terms and abbreviations.

    ``count``: tokens of a text, special tokens included.
    """

    def __init__(self, article: Article, count: Callable[[str], int]) -> None:
        self.article = article
        self._count = count
        self._specials = count("")
        self._lengths: dict[str, int] = {}
        self._spans: dict[int, list[tuple[int, int]]] = {}
        self._terms: dict[str, frozenset[str]] = {}
        self._norms: dict[frozenset[str], float] = {}
        self._mentioned: dict[tuple[int, int], set[str]] = {}
        """(paragraph, sentence) -> ids of the figures that it mentions"""
        for figure in article.figures:
            for mention in figure.mentions:
                spans = self._sentences(mention.paragraph)
                i = bisect_right(spans, mention.start, key=itemgetter(0)) - 1
                self._mentioned.setdefault((mention.paragraph, max(0, i)), set()).add(figure.id)

    def describe(self, figure: Figure, budget: int) -> Description:
        """A description of one figure; see the module. ``budget``: tokens that it may have, special tokens included.

        Raises ValueError: not even the special tokens fit the budget.
        """
        if budget < self._specials:
            raise ValueError(f"a budget of {budget} tokens does not hold the {self._specials} special ones")
        caption, whole = self._caption(figure.caption, budget)
        told = self._terms_of(figure.caption)
        chosen: list[_Candidate] = []
        # Lengths of parts add up to the whole's, but for tokens at the joins: those are looked at in the end.
        room = budget - (self._count(caption) if caption else self._specials)
        if whole:
            room = self._take(self._explain(caption, chosen), chosen, room)
            room = self._take(self._mentions(figure, told), chosen, room)
            room = self._take(self._beside(chosen, told, leaning=True), chosen, room)
            said = " ".join([caption, *(c.sentence.text for c in chosen)])
            room = self._take(self._explain(said, chosen), chosen, room)
            room = self._take(self._beside(chosen, told, leaning=False), chosen, room)
            self._take(self._background(told, chosen), chosen, room)
        first = [Sentence(caption, "caption" if whole else "caption, cut")] if caption else []
        while True:
            parts = (*first, *(c.sentence for c in sorted(chosen, key=lambda c: c.place)))
            text = " ".join(sentence.text for sentence in parts)
            tokens = self._count(text)
            if tokens <= budget or not chosen:
                return Description(text, parts, tokens)
            chosen.pop()  # the least wanted

    def _caption(self, caption: str, budget: int) -> tuple[str, bool]:
        """As much of the caption as fits, in sentences, or else in words; and whether that is all of it."""
        if self._count(caption) <= budget:
            return caption, True
        for ends in ([end for _, end in sentences(caption)], [word.end() for word in re.finditer(r"\S+", caption)]):
            fits = bisect_right(ends, budget, key=lambda end: self._count(caption[:end]))
            if fits:
                return caption[: ends[fits - 1]], False
        return "", False

    def _take(self, candidates: Iterable[_Candidate], chosen: list[_Candidate], room: int) -> int:
        """Takes what fits and says something new, best first; returns the room that is left, in tokens."""
        for candidate in candidates:
            if candidate.sentence.text.count(" ") >= room:  # a word is a token at least: not worth counting
                continue
            if candidate.terms and any(_alike(candidate.terms, other.terms) > SAME for other in chosen):
                continue
            length = self._length(candidate.sentence.text)
            if length <= room:
                chosen.append(candidate)
                room -= length
        return room

    def _mentions(self, figure: Figure, told: frozenset[str]) -> list[_Candidate]:
        places = [place for place, ids in self._mentioned.items() if figure.id in ids]
        return self._ranked((self._candidate(place) for place in sorted(places)), told)

    def _beside(self, chosen: list[_Candidate], told: frozenset[str], leaning: bool) -> list[_Candidate]:
        """Sentences of the paragraphs of chosen mentions that name no figure: direct neighbours where one leans on the
        other, or those akin to the caption."""
        taken = {candidate.place[1:] for candidate in chosen if candidate.place[0] == TEXT}
        beside: set[tuple[int, int]] = set()
        for paragraph in {paragraph for paragraph, _ in taken}:
            spans, text = self._sentences(paragraph), self.article.paragraphs[paragraph].text
            leans = [_LEANS.match(text, start) is not None for start, _ in spans]
            for i in range(len(spans)):
                after = i > 0 and (paragraph, i - 1) in taken and leans[i]
                before = i + 1 < len(spans) and (paragraph, i + 1) in taken and leans[i + 1]
                if after or before or not leaning:
                    beside.add((paragraph, i))
        places = sorted(place for place in beside - taken if place not in self._mentioned)
        ranked = self._ranked((self._candidate(place, " (beside)") for place in places), told)
        return [c for c in ranked if leaning or self._relevance(c.terms, told) >= NEAR]

    def _background(self, told: frozenset[str], chosen: list[_Candidate]) -> list[_Candidate]:
        found = []
        for p, paragraph in enumerate(self.article.abstract):
            for s, (start, end) in enumerate(sentences(paragraph)):
                sentence = Sentence(paragraph[start:end], f"abstract {p + 1} s{s + 1}")
                found.append(_Candidate((ABSTRACT, p, s), sentence, self._terms_of(sentence.text)))
        related = [c for c in self._ranked(found, told) if self._relevance(c.terms, told) >= RELATED]
        return related[: 1 if any(c.place[0] == TEXT for c in chosen) else 3]

    def _explain(self, text: str, chosen: list[_Candidate]) -> Iterator[_Candidate]:
        """Abbreviations that the text uses and does not define, as "OCT: optical coherence tomography."."""
        known = {candidate.place for candidate in chosen}
        used = set(_TOKEN.findall(text))
        lower = text.lower()
        for i, (short, (long, source)) in enumerate(self._abbreviations.items()):
            if (GLOSSARY, i, 0) in known or long.lower() in lower or not (short in used or f"{short}s" in used):
                continue
            yield _Candidate((GLOSSARY, i, 0), Sentence(f"{short}: {long}.", f"abbreviation {source}"), frozenset())

    @cached_property
    def _abbreviations(self) -> dict[str, tuple[str, str]]:
        """Short form -> long form and where it is defined; the first definition counts."""
        found: dict[str, tuple[str, str]] = {}
        texts = [(f"abstract {i + 1}", text) for i, text in enumerate(self.article.abstract)]
        texts += [(f"p{i + 1}", paragraph.text) for i, paragraph in enumerate(self.article.paragraphs)]
        for source, text in texts:
            if "(" in text:
                for short, long, _ in abbreviations(text):
                    found.setdefault(short, (long, source))
        return found

    @cached_property
    def _weights(self) -> dict[str, float]:
        """Term -> squared inverse document frequency; the article's paragraphs are the documents."""
        seen: Counter[str] = Counter()
        for paragraph in self.article.paragraphs:
            seen.update(_terms(paragraph.text))
        return {term: self._weight(df) for term, df in seen.items()}

    def _weight(self, paragraphs: int) -> float:
        return math.log(1 + max(1, len(self.article.paragraphs)) / paragraphs) ** 2

    def _relevance(self, terms: frozenset[str], told: frozenset[str]) -> float:
        """Cosine of two sets of terms, weighted by inverse document frequency: 0 to 1."""
        norm = math.sqrt(self._norm(terms) * self._norm(told))
        return self._norm(terms & told) / norm if norm else 0.0

    def _norm(self, terms: frozenset[str]) -> float:
        if terms not in self._norms:
            # fsum is exact in any order; a set's order differs from process to process
            self._norms[terms] = math.fsum(map(self._weights.get, terms, repeat(self._weight(1))))
        return self._norms[terms]

    def _ranked(self, candidates: Iterable[_Candidate], told: frozenset[str]) -> list[_Candidate]:
        """Those that say something beyond the caption, the most relevant first, in the text's order where equal."""
        new = [c for c in candidates if len(c.terms) >= SHORTEST and len(c.terms & told) <= TOLD * len(c.terms)]
        return sorted(new, key=lambda c: (-round(self._relevance(c.terms, told), 9), c.place))

    def _candidate(self, place: tuple[int, int], how: str = "") -> _Candidate:
        paragraph, i = place
        start, end = self._sentences(paragraph)[i]
        text = self.article.paragraphs[paragraph].text[start:end]
        return _Candidate(
            (TEXT, *place), Sentence(text, f"mention p{paragraph + 1} s{i + 1}{how}"), self._terms_of(text)
        )

    def _sentences(self, paragraph: int) -> list[tuple[int, int]]:
        if paragraph not in self._spans:
            self._spans[paragraph] = sentences(self.article.paragraphs[paragraph].text)
        return self._spans[paragraph]

    def _terms_of(self, text: str) -> frozenset[str]:
        if text not in self._terms:
            self._terms[text] = _terms(text)
        return self._terms[text]

    def _length(self, text: str) -> int:
        """Tokens that a sentence adds to a text before it."""
        if text not in self._lengths:
            self._lengths[text] = self._count(f" {text}") - self._specials
        return self._lengths[text]


def _terms(text: str) -> frozenset[str]:
    """Words of three characters or more, lowered, without a plural's s."""
    words = set(_TERM.findall(text.lower()))
    return frozenset([word[:-1] if word[-1] == "s" else word for word in words]) - _EMPTY


def _alike(a: frozenset[str], b: frozenset[str]) -> float:
    """Jaccard similarity of two sets of terms: 0 to 1."""
    both = len(a & b)
    return both / (len(a) + len(b) - both) if both else 0.0
