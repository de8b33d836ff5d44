"""An article as the builder sees it: plain text and figures, whatever the XML looked like."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Paragraph:
    """One paragraph of the body, the back matter or a sub-article, its text with white space collapsed.

    Acknowledgements, footnotes and abstracts are among them only where they cite a figure.
    """

    text: str
    section: str
    """titles of the sections around it, outermost first, joined by " / "; empty at the top"""


@dataclass(frozen=True)
class Mention:
    """One place in the text that names a figure."""

    paragraph: int
    """index into ``Article.paragraphs``"""
    start: int
    """where in that paragraph's text the mention begins, in characters; a cross-reference may have no words"""
    end: int
    how: Literal["xref", "range", "text"]
    """a cross-reference to it, one that names it within a range ("Figs. 2-4"), or words without a cross-reference"""


@dataclass(frozen=True)
class Figure:
    """One figure that has a caption or a graphic. A figure of several graphics stays one figure."""

    id: str
    """the XML id, or one made from its place where there is none; unique within the article"""
    label: str
    """"Figure 2", or empty"""
    title: str
    """the caption's title, or empty"""
    caption: str
    """the group's caption if there is one, title and paragraphs, joined by a space; empty where there is none"""
    graphics: tuple[str, ...]
    """hrefs as written, in document order, each once; of ``alternatives``, files of one picture, the best"""
    group: str = ""
    """label or id of the fig-group around it"""
    sub_article: str = ""
    """id of the sub-article that it stands in; empty for the article's own figures"""
    mentions: tuple[Mention, ...] = ()
    """in document order; not those inside captions"""
    license: License | None = None
    """what the figure, or the group around it, states for itself; "unknown" where somebody else's permission or all
    rights reserved are stated and no licence; None: nothing beyond the article's"""


@dataclass(frozen=True)
class License:
    name: str
    """"CC BY 4.0", "CC0 1.0", "CC BY-NC 4.0", ..., without a version ("CC BY") where none is given, "other" where terms
    are stated that are none of these, "unknown" where none are stated"""
    url: str = ""
    source: Literal["link", "attribute", "prose", "none"] = "none"
    """where it was read"""
    text: str = ""
    """the licence paragraph as written"""


@dataclass(frozen=True)
class Article:
    """What BIOMEDICA's sample JSON keeps of an article (arXiv 2501.07171), and where its figures are spoken of."""

    pmcid: str
    """"PMC" and digits; empty where the XML names none"""
    pmid: str
    doi: str
    title: str
    journal: str
    date: str
    """ISO 8601, as exact as given: "2019-05-07", "2019-05" or "2019"; the earliest full publication date"""
    abstract: tuple[str, ...]
    """paragraphs of the main abstract (no graphical abstract, no digest)"""
    keywords: tuple[str, ...]
    mesh_terms: tuple[str, ...]
    subjects: tuple[str, ...]
    citation: str
    """authors, year, title, journal, volume and pages, DOI: as a reference list would print it"""
    references: tuple[str, ...]
    """identifiers of cited works: "pmid:123", "doi:10...", in the order of the reference list"""
    license: License
    paragraphs: tuple[Paragraph, ...]
    figures: tuple[Figure, ...]
