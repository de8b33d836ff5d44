"""JATS XML -> Article: JATS 1.0-1.3 and NLM 2.x/3.x, with or without a namespace.

One pass finds the few elements that matter and rewrites them so that libxml2's own text gathering says what the page
says (``text.py``); cross-references to figures are bracketed with a mark, whose places in a paragraph's text are then
their offsets. Node by node in Python it would take several times as long as the parse.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import islice, pairwise
from typing import Any, Literal, NamedTuple

from longclip.longcap.article import Article, Figure, License, Mention, Paragraph
from longclip.longcap.frontmatter import read_front, read_references
from longclip.longcap.labels import Labels, is_range
from longclip.longcap.license import find_license, find_own_license
from longclip.longcap.markup import REASONS, BadArticle, article_element
from longclip.longcap.text import REWRITTEN, collapse, make_readable, raw_text, text_of

__all__ = ["REASONS", "BadArticle", "parse"]

_MARK = "\ufdd0"
"""around a cross-reference: a noncharacter, which XML allows and no text has a use for"""
_SUBS = ("sub-article", "response")
_LEFT_OUT = ("fig", "fig-group", "table-wrap")
_KEPT = frozenset((*_SUBS, *_LEFT_OUT, "p", "xref", "supplementary-material"))
_SECTIONS = frozenset(("sec", "app", "abstract", "boxed-text"))

_KINDS = {
    **dict.fromkeys(("body", "back", "floats-group", "floats-wrap"), "text"),
    **dict.fromkeys(("abstract", "trans-abstract", "ack", "bio", "glossary", "fn-group", "author-notes"), "aside"),
    **dict.fromkeys(("caption", "supplementary-material", "ref-list", "front", "front-stub", *_LEFT_OUT), "meta"),
}
_NO_PICTURE = frozenset(("caption", "table-wrap", "disp-formula", "inline-formula", "supplementary-material"))
_VECTOR = (".svg", ".svgz", ".eps", ".ps", ".pdf", ".ai")
_SMALL = ("thumb", "small", "icon", "low")

# "Figs. 1-50" over and over is fifty mentions every twelve bytes: what is beyond any article's need is left out.
_MOST_SAID = 20_000
"""names of a figure in a paragraph, those that overlap included"""
_MOST_MENTIONS = 50_000
"""mentions in an article, after which no further paragraph is read for any"""

How = Literal["xref", "range", "text"]


class _Place(NamedTuple):
    """Where an element stands."""

    section: str = ""
    sub_article: str = ""
    kind: str = "meta"
    """"text"; "aside" (abstracts, notes, acknowledgements), read where it cites a figure; "meta", never read"""
    in_paragraph: bool = False


class _Line(NamedTuple):
    """A paragraph: its text, and the cross-references to figures in it as (start, end, figures)."""

    text: str
    place: _Place
    xrefs: list[tuple[int, int, tuple[int, ...]]]


class _Picture(NamedTuple):
    """A figure before its mentions are known."""

    id: str
    label: str
    title: str
    caption: str
    graphics: tuple[str, ...]
    group: str
    sub_article: str
    license: License | None


def parse(data: bytes) -> Article:
    """The article in ``data``. Raises BadArticle and nothing else, whatever the bytes are.

    A paragraph within a paragraph (in a list, a quotation, a footnote) is one of its own, after the outer one; text
    of figures, tables and supplementary files is no paragraph's. Figures without caption and graphic are left out.
    """
    root = article_element(data)
    reader = _Reader(root)
    front = root.find("front")
    meta = None if front is None else front.find("article-meta")
    fields = read_front(front, meta)
    pictures, labels, cited = reader.figures()
    lines = reader.lines(cited)
    if not (pictures or lines or fields["title"] or fields["abstract"]):
        raise BadArticle("empty", "an article without title, text and figures")
    mentions = _mentions(lines, labels, len(pictures))
    return Article(
        **fields,
        references=read_references(root.find("back")),
        license=find_license(meta),
        paragraphs=tuple(Paragraph(line.text, line.place.section) for line in lines),
        figures=tuple(Figure(**p._asdict(), mentions=tuple(m)) for p, m in zip(pictures, mentions, strict=True)),
    )


class _Reader:
    """One reading of one tree, which it changes: ``figures`` first, then ``lines``."""

    def __init__(self, root: Any) -> None:
        self._at: dict[str, list[Any]] = defaultdict(list)
        rewritten = frozenset(REWRITTEN)
        for e in root.iter(*_KEPT, *REWRITTEN):
            tag = e.tag
            if tag in _KEPT:
                self._at[tag].append(e)
            if tag in rewritten:
                make_readable(tag, e)
        subs = [e for tag in _SUBS for e in self._at[tag]]
        self._subs = {e: e.get("id") or f"{e.tag}-{n}" for n, e in enumerate(subs, 1)}
        self._places: dict[Any, _Place] = {None: _Place(), root: _Place()}

    def _place(self, element: Any) -> _Place:
        above = []
        while element not in self._places:
            above.append(element)
            element = element.getparent()
        place = self._places[element]
        for element in reversed(above):
            tag = element.tag
            if tag in _SUBS:
                place = _Place(sub_article=self._subs[element])
            else:
                if tag in _SECTIONS and (title := text_of(element.find("title")).replace(_MARK, "")):
                    place = place._replace(section=f"{place.section} / {title}" if place.section else title)
                if tag == "p":
                    place = place._replace(in_paragraph=True)
                elif tag in _KINDS:
                    place = place._replace(kind=_KINDS[tag])
            self._places[element] = place
        return place

    def figures(self) -> tuple[list[_Picture], Labels, dict[Any, tuple[int, ...]]]:
        """(figures, their labels, the cross-references to them and whom each means); takes them out of the text."""
        for e in self._at["supplementary-material"]:
            # The caption of a file that is attached to a figure does not say what the figure shows.
            if next(e.iterancestors("caption"), None) is not None and next(e.iter("fig"), None) is None:
                e.clear(keep_tail=True)
        pictures: list[_Picture] = []
        targets: dict[str, list[int]] = {}
        groups: dict[Any, list[int]] = defaultdict(list)
        taken: set[str] = set()
        for n, fig in enumerate(self._at["fig"], 1):
            parent = fig.getparent()
            group = parent if parent.tag == "fig-group" else None
            picture = _picture(fig, group, n, taken, self._place(parent).sub_article)
            if not (picture.caption or picture.graphics):
                continue
            i = len(pictures)
            pictures.append(picture)
            for identifier in (fig.get("id"), *(e.get("id") for e in fig.iter("graphic", "alternatives", "media"))):
                if identifier:
                    targets.setdefault(identifier, [i])
            if group is not None:
                groups[group].append(i)
        shared = []
        for group, members in groups.items():
            targets.setdefault(group.get("id") or "", members)
            shared.append((text_of(group.find("label")), pictures[members[0]].sub_article, members))
        targets.pop("", None)
        labels = Labels([(p.label, p.sub_article) for p in pictures], shared)
        for tag in _LEFT_OUT:
            for e in self._at[tag]:
                e.clear(keep_tail=True)
        cited = {}
        for xref in self._at["xref"] if targets else ():
            rids = xref.get("rid") or ""
            means = targets.get(rids)
            if means is None and (" " in rids or "," in rids):
                means = [i for rid in rids.replace(",", " ").split() for i in targets.get(rid, ())]
            if means:
                cited[xref] = tuple(dict.fromkeys(means))
        return pictures, labels, cited

    def lines(self, cited: dict[Any, tuple[int, ...]]) -> list[_Line]:
        """The paragraphs in document order."""
        for xref in cited:
            xref.text = _MARK + (xref.text or "")
            xref.tail = _MARK + (xref.tail or "")
        lines = []
        for p in reversed(self._at["p"]):  # the inner before the outer, which then does without its text
            place = self._place(p.getparent())
            if place.kind == "meta":
                continue
            raw = raw_text(p)
            if _MARK in raw:
                lines.append(_line(raw, place, [cited[x] for x in p.iter("xref") if x in cited]))
            elif place.kind == "text" and (text := collapse(raw)):
                lines.append(_Line(text, place, []))
            if place.in_paragraph:
                p.clear(keep_tail=True)
        return lines[::-1]


def _href(element: Any) -> str:
    """xlink:href, under whatever prefix or namespace it was written."""
    return next((value.strip() for name, value in element.items() if name.rpartition("}")[2] == "href"), "")


def _picture(fig: Any, group: Any, place: int, taken: set[str], sub_article: str) -> _Picture:
    caption = fig.find("caption")
    label = text_of(fig.find("label"))
    if not label and caption is not None:
        for path in ("label", "title/label", "p/label"):  # seen in renderings of older articles
            if (inner := caption.find(path)) is not None:
                label = text_of(inner)
                inner.clear(keep_tail=True)
                break
    parts = [text_of(caption)] if caption is not None else [text_of(p) for p in fig.findall("p")]
    if group is not None:
        parts.insert(0, text_of(group.find("caption")))
        label = label or text_of(group.find("label"))
    identifier = wanted = fig.get("id") or f"figure-{place}"
    n = 1
    while identifier in taken:
        n += 1
        identifier = f"{wanted}-{n}"
    taken.add(identifier)
    return _Picture(
        identifier,
        label,
        text_of(caption.find("title")) if caption is not None else "",
        " ".join(part for part in parts if part),
        tuple(_graphics(fig)),
        "" if group is None else text_of(group.find("label")) or group.get("id") or "",
        sub_article,
        find_own_license(fig, group),
    )


def _graphics(fig: Any) -> Iterator[str]:
    """The pictures of one figure: all its graphics, but of ``alternatives`` (one picture, several files) the best."""
    found: dict[Any, tuple[tuple[bool, bool], str]] = {}
    for graphic in fig.iter("graphic", "media"):
        href = _href(graphic)
        if not href or (graphic.tag == "media" and graphic.get("mimetype") != "image"):
            continue
        one = graphic
        for above in graphic.iterancestors():
            if above is fig:
                kind = f"{graphic.get('specific-use', '')} {graphic.get('content-type', '')}".lower()
                rank = (any(word in kind for word in _SMALL), href.lower().endswith(_VECTOR))
                if one not in found or rank < found[one][0]:
                    found[one] = (rank, href)
                break
            if above.tag == "fig" or above.tag in _NO_PICTURE:
                break
            if above.tag == "alternatives":
                one = above
    yield from dict.fromkeys(href for _, href in found.values())


def _line(raw: str, place: _Place, means: list[tuple[int, ...]]) -> _Line:
    text, cuts = "", []
    for piece in collapse(raw).split(_MARK):
        # White space on both sides of a mark is one space.
        text += piece[1:] if piece[:1] == " " and (not text or text[-1] == " ") else piece
        cuts.append(len(text))
    text = text.rstrip()
    if len(cuts) != 2 * len(means) + 1:  # the text itself has such characters: it is the mention as a whole
        return _Line(text, place, [(0, len(text), figures) for figures in means])
    xrefs = []
    for k, figures in enumerate(means):
        start, end = (min(cut, len(text)) for cut in cuts[2 * k : 2 * k + 2])
        inside = text[start:end]
        end = start + len(inside.rstrip())
        xrefs.append((min(end, start + len(inside) - len(inside.lstrip())), end, figures))
    return _Line(text, place, xrefs)


def _mentions(lines: Sequence[_Line], labels: Labels, figures: int) -> list[list[Mention]]:
    """For each figure where it is spoken of, in document order; one place is one mention of it."""
    found: list[list[Mention]] = [[] for _ in range(figures)]
    room = _MOST_MENTIONS
    for n, line in enumerate(lines):
        if room > 0 and (said := list(islice(_said(line, labels), _MOST_SAID))):
            room -= _add(found, n, said)
    return found


def _said(line: _Line, labels: Labels) -> Iterator[tuple[int, int, int, How]]:
    """(start, end, figure, how) of all that names a figure in a paragraph."""
    for start, end, means in line.xrefs:
        for i in means:
            yield start, end, i, "xref"
    for (start, until, first), (since, end, last) in pairwise(line.xrefs):
        if is_range(line.text, start, until, since):
            for i in labels.between(first[-1], last[0]):
                yield start, end, i, "range"
    linked = {start: end for start, end, _ in line.xrefs}
    for start, end, i, in_range in labels.named(line.text, line.place.sub_article, linked):
        yield start, end, i, "range" if in_range else "text"


def _add(found: list[list[Mention]], paragraph: int, said: list[tuple[int, int, int, How]]) -> int:
    """Adds what one paragraph says, but for words that only repeat a cross-reference which overlaps them.

    Returns the number of mentions that this adds.
    """
    spans: dict[int, list[tuple[int, int, How]]] = defaultdict(list)
    for start, end, figure, how in said:
        at = bisect_left(spans[figure], (end, end, "xref"))
        if how == "xref" or at == 0 or spans[figure][at - 1][1] <= start:
            spans[figure].insert(at, (start, end, how))
    for figure, places in spans.items():
        found[figure] += [Mention(paragraph, start, end, how) for start, end, how in places]
    return sum(map(len, spans.values()))
