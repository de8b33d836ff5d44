"""What an article says of itself: identifiers, title, journal, date, abstract, keywords, citation, references."""

from __future__ import annotations

import re
from typing import Any, TypedDict

from longclip.longcap.text import text_of

_XLINK = "{http://www.w3.org/1999/xlink}href"
_DOI = re.compile(r"10\.\d{4,9}/\S+")
_MONTHS = ("jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec")
_NOT_PUBLICATION = frozenset(("received", "accepted", "rev-recd", "retracted", "corrected", "preprint", "pmc-release"))
_MAIN_ABSTRACTS = frozenset(
    ("", "abstract", "structured", "structured-abstract", "section", "sections", "full", "main")
)
_MOST_AUTHORS = 6
"""in a citation, then "et al", as Vancouver style has it"""


class Front(TypedDict):
    """The fields of an ``Article`` that its front matter gives."""

    pmcid: str
    pmid: str
    doi: str
    title: str
    journal: str
    date: str
    abstract: tuple[str, ...]
    keywords: tuple[str, ...]
    mesh_terms: tuple[str, ...]
    subjects: tuple[str, ...]
    citation: str


def read_front(front: Any, meta: Any) -> Front:
    """``front`` and the article-meta in it; either may be None, and fields that are not given are empty."""
    if meta is None:
        return Front(
            pmcid="", pmid="", doi="", title="", journal="", date="",
            abstract=(), keywords=(), mesh_terms=(), subjects=(), citation="",
        )  # fmt: skip
    ids = {e.get("pub-id-type", ""): text_of(e) for e in reversed(meta.findall("article-id"))}
    pmc = (ids.get("pmcid") or ids.get("pmc") or "").upper().removeprefix("PMC").partition(".")[0]
    doi = _DOI.search(ids.get("doi", ""))
    title = _title(meta.find("title-group/article-title"))
    journal = text_of(next(front.iter("journal-title"), None))
    date = _date(meta)
    keywords, mesh = _keywords(meta)
    return Front(
        pmcid=f"PMC{pmc}" if pmc.isdigit() else "",
        pmid=ids.get("pmid", ""),
        doi=doi.group() if doi else "",
        title=title,
        journal=journal,
        date=date,
        abstract=_abstract(meta),
        keywords=keywords,
        mesh_terms=mesh,
        subjects=_each(text_of(e) for e in meta.iterfind("article-categories//subject")),
        citation=_citation(meta, title, journal, date, doi.group() if doi else ""),
    )


def read_references(back: Any) -> tuple[str, ...]:
    """One identifier for each cited work that has one, in the order of the list: PubMed's, or a DOI, or PMC's."""
    found = []
    for ref in back.iter("ref") if back is not None else ():
        ids: dict[str, str] = {}
        for e in ref.iter("pub-id", "ext-link"):
            if e.tag == "pub-id":
                ids.setdefault(e.get("pub-id-type", ""), (e.text or "").strip())
            elif "doi.org/" in (href := e.get(_XLINK) or ""):
                ids.setdefault("doi", href)
        if ids:
            doi = _DOI.search(ids.get("doi", ""))
            known = {"pmid": ids.get("pmid"), "doi": doi and doi.group(), "pmc": ids.get("pmcid") or ids.get("pmc")}
            found += [f"{kind}:{value}" for kind, value in known.items() if value][:1]
    return tuple(found)


def _each(values: Any) -> tuple[str, ...]:
    return tuple(dict.fromkeys(value for value in values if value))


def _title(element: Any) -> str:
    if element is None:
        return ""
    for note in list(element.iter("fn", "xref")):  # a star, a dagger
        note.clear(keep_tail=True)
    return text_of(element)


def _abstract(meta: Any) -> tuple[str, ...]:
    for abstract in meta.findall("abstract"):
        if abstract.get("abstract-type", "").lower() in _MAIN_ABSTRACTS:
            found = tuple(text for p in abstract.iter("p") if (text := text_of(p)))
            if found := found or _each([text_of(abstract)]):
                return found
    return ()


def _keywords(meta: Any) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(keywords, MeSH terms); a list of abbreviations that calls itself keywords is neither."""
    words: list[str] = []
    mesh: list[str] = []
    for group in meta.iter("kwd-group"):
        kind = f"{group.get('kwd-group-type', '')} {group.get('vocab', '')}".lower()
        if "abbrev" not in kind:
            into = mesh if "mesh" in kind else words
            into += [text_of(e) for e in group.iter("kwd", "compound-kwd")]
    return _each(words), _each(mesh)


def _date(meta: Any) -> str:
    """The earliest of the fullest dates: a day beats a month beats a year."""
    dates = []
    for e in meta.findall("pub-date"):
        if {e.get("pub-type", ""), e.get("date-type", "")} & _NOT_PUBLICATION:
            continue
        iso = re.match(r"\d{4}(-\d{2}){0,2}(?!\d)", e.get("iso-8601-date") or "")
        dates.append(iso.group() if iso else _iso(*(text_of(e.find(part)) for part in ("year", "month", "day"))))
    return min((date for date in dates if date), key=lambda date: (-len(date), date), default="")


def _iso(year: str, month: str, day: str) -> str:
    if not re.fullmatch(r"[12]\d{3}", year):
        return ""
    name = month[:3].lower()
    number = int(month) if month.isdecimal() else _MONTHS.index(name) + 1 if name in _MONTHS else 0
    if not 1 <= number <= 12:
        return year
    if not (day.isdecimal() and 1 <= int(day) <= 31):
        return f"{year}-{number:02d}"
    return f"{year}-{number:02d}-{int(day):02d}"


def _citation(meta: Any, title: str, journal: str, date: str, doi: str) -> str:
    """'Doe J, Roe A. Title. Journal. 2019;14(3):e0123. doi:10.1371/...', as far as it is known."""
    people = [
        text_of(c.find("collab")) or _person(c)
        for c in meta.iterfind("contrib-group/contrib")
        if c.get("contrib-type", "author") == "author"
    ]
    people = [person for person in people if person]
    authors = ", ".join(people[:_MOST_AUTHORS]) + (", et al" if len(people) > _MOST_AUTHORS else "")
    volume, issue, first, last, article = (
        text_of(meta.find(tag)) for tag in ("volume", "issue", "fpage", "lpage", "elocation-id")
    )
    pages = article or (f"{first}-{last}" if first and last and first != last else first)
    number = f"{volume}({issue})" if issue else volume
    when = date[:4] + (f";{number}" if number else "") + (f":{pages}" if pages else "")
    parts = [part.rstrip(".") + "." for part in (authors, title, journal, when) if part]
    return " ".join([*parts, f"doi:{doi}"] if doi else parts)


def _person(contrib: Any) -> str:
    name = next(contrib.iter("name", "string-name"), None)
    if name is None:
        return ""
    surname, given = text_of(name.find("surname")), text_of(name.find("given-names"))
    initials = "".join(part[0] for part in re.split(r"[\s.-]+", given) if part)
    return f"{surname} {initials}".strip() if surname else text_of(name)
