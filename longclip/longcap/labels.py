"""Figure labels, and where running text names them: "Figure 3A", "Figs. 2-4 and 6", "Supplementary Fig. 1"."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from typing import NamedTuple

MOST_IN_A_RANGE = 50
"""a wider "Figs. 1-200" is a slip of the pen, or an attack"""
MOST_IN_A_LIST = 100
"""numbers after one head: each further head in a list is read anew, so that lists must not be endless"""
MOST_HEADS = 100
"""words other than "figure" before a number ("Scheme 1") that are looked for in a text"""

_NUMBER = r"(?P<prefix>[A-Z]{0,2})[.-]?(?P<number>\d{1,4}(?:\.\d{1,3}){0,3})(?!\d)"
# eLife numbers supplements below a figure: "Figure 7—figure supplement 1".
_SUPPLEMENT = r"(?:\s?[—–-]{1,2}\s?figure supplements?\s?(?P<supplement>\d{1,2}))?"
_LABEL = re.compile(rf"\s*(?P<words>[^\d]{{0,60}}?)[\s.]*{_NUMBER}{_SUPPLEMENT}(?P<panel>[A-Za-z](?![A-Za-z]))?")

_LETTER = r"(?:\([A-Za-z]\)|[A-Za-z](?![^\W_]))"
_PANEL = r"(?:[A-Za-z](?![^\W\d_])|\([A-Za-z](?:\s?[,–-]\s?[A-Za-z]){0,20}\))"
_PANELS = rf"(?P<panel>{_PANEL}(?:\s?(?:,|and|&|to|[–—−-])\s?{_LETTER}){{0,20}})?"
# "Figure 1—source data 1" and "fig1data.txt" are other files.
_ITEM = re.compile(
    rf"\s*{_NUMBER}{_SUPPLEMENT}{_PANELS}(?![A-Za-z0-9]|\s?[—–-]{{1,2}}\s?(?:source|video|figure|table|animation))"
)
# In capitals, too, as in headings: "FIGURES 2 AND 3".
_BETWEEN = re.compile(
    r"\s*(?P<by>,\s*(?:and|or|&)|[,;&/]|and|or|to|through|[–—−-])\s*(?P<head>fig(?:ure)?s?\.?)?", re.IGNORECASE
)
_SINGLE = re.compile(r"[^\d,;&–—−-]*\d+[A-Za-z]?")
_RANGE = frozenset(("–", "—", "−", "-", "to", "through"))
_GAP = re.compile(r"\s*(?:–|—|−|-|to|through)\s*", re.IGNORECASE)

_QUALIFIER = re.compile(
    r"\b(suppl[a-z]*|supporting|extended data|author response|reviewer|appendix|additional|online|web)"
    r"\.?(?: information| material)?\s*$",
    re.IGNORECASE,
)
# A figure of another work: "Figure 2 of ref. 12", "Fig. 1 in Smith et al.", "[17, Fig. 3]", "Smith 2010, Fig. 2",
# "Smith et al. (Fig. 2)", "[8], p. 345-357, pl. 97, Figs. 1-12".
_ELSEWHERE = re.compile(
    r"\s*(?:in|of|from)\s+"
    r"(?:refs?\b|references?\b|\[\d|(?:the|that|their)\s+original|[A-Z][\w'’-]+,?\s+(?:et al|and [A-Z]|&|[(\[]\d))"
)
# A year is one of four digits that nothing is said to equal: not "p < 0.0001, Fig. 3", nor "n = 2000, Fig. 4".
_YEAR = r"(?<![\d.])(?<![=<>≤≥~] )\b(?:1[89]|20)\d\d[a-z]?"
_ELSEWHERE_BEFORE = re.compile(
    rf"(?:(?:{_YEAR}|\[\d+|\brefs?\.? \d+|\[\d+: ?[\d–-]+|\bpp?\. ?[\d–-]+|\bpls?\. ?[\d–-]+)\]?[,:]"
    r"|\bet al\.?,? ?\()\s*(?:see )?$"
)
_LAST_HEAD = re.compile(r"fig(?:ure)?s?\.?\s*$", re.IGNORECASE)
_BEFORE = 40
"""characters looked at before a mention"""


class Key(NamedTuple):
    """What a label says, however it is written: "FIG. 2", "Figure 2." and "Fig 2" have one key."""

    head: str
    qualifier: str
    prefix: str
    number: str
    supplement: str = ""
    panel: str = ""


class Named(NamedTuple):
    start: int
    end: int
    figure: int
    in_range: bool


def key_of(label: str) -> Key | None:
    """None for a label without a number."""
    found = _LABEL.match(label)
    if found is None:
        return None
    words = found["words"].replace(".", " ").split()
    return _key(_head(words[-1] if words else "figure"), " ".join(words[:-1]), found)


def _head(word: str) -> str:
    folded = word.casefold()
    return "figure" if folded in ("fig", "figs", "figure", "figures") else folded


def _key(head: str, qualifier: str, found: re.Match[str]) -> Key:
    qualifier, prefix = qualifier.casefold(), found["prefix"]
    if qualifier.startswith(("suppl", "supporting")):  # "Supplementary Figure 2" is "Figure S2"
        qualifier, prefix = "", prefix or "S"
    panel = (found["panel"] or "").lstrip("(")[:1].lower()
    return Key(head, qualifier, prefix, found["number"], found["supplement"] or "", panel)


@lru_cache(maxsize=256)
def _heads(words: frozenset[str]) -> re.Pattern[str]:
    other = [rf"{re.escape(word)}(?P<plural{i}>s?)" for i, word in enumerate(sorted(words))]
    return re.compile("|".join([r"(?<![A-Za-z])(?:Fig|fig|FIG)(?:ure|URE)?(?P<plural>[sS]?)(?![A-Za-z])\.?", *other]))


class Labels:
    """The labels of one article's figures, and who is meant by a number in its text.

    ``figures``: (label, scope) of each figure in document order, the scope being the sub-article that it stands in. A
    text in a sub-article means its own figures first, then the article's. A label that several figures share is
    nobody's, unless they are parts of one: its panels, or the members of a group (``shared``: label, scope, members).
    """

    def __init__(self, figures: Sequence[tuple[str, str]], shared: Sequence[tuple[str, str, list[int]]] = ()) -> None:
        self.keys = [key_of(label) for label, _ in figures]
        self._scopes = [scope for _, scope in figures]
        self._by_key: dict[tuple[str, Key], list[int]] = {}
        panels: dict[tuple[str, Key], list[int]] = {}
        for i, (key, scope) in enumerate(zip(self.keys, self._scopes, strict=True)):
            if key is not None:
                self._by_key.setdefault((scope, key), []).append(i)
                if key.panel:
                    panels.setdefault((scope, key._replace(panel="")), []).append(i)
        self._by_key = {k: v for k, v in self._by_key.items() if len(v) == 1}
        for at, members in panels.items():
            self._by_key.setdefault(at, members)
        for label, scope, members in shared:
            if (key := key_of(label)) is not None:
                self._by_key.setdefault((scope, key), members)
        heads = dict.fromkeys(key.head for _, key in self._by_key)
        words = [word for word in heads if word != "figure"][:MOST_HEADS]
        self._known: dict[tuple[str, Key, Key], tuple[list[int], bool]] = {}
        # As written and as begun with a capital: "Scheme 1", "scheme 1".
        self._pattern = _heads(frozenset(form for word in words for form in (word, word.capitalize())))
        self._marks = (*(("Fig", "fig", "FIG") if "figure" in heads else ()), *words, *map(str.capitalize, words))

    def between(self, first: int, last: int) -> list[int]:
        """The figures numbered from ``first``'s number to ``last``'s, both left out."""
        a, b = self.keys[first], self.keys[last]
        if a is None or b is None or self._scopes[first] != self._scopes[last]:
            return []
        return [i for key in _span(a, b)[1:-1] for i in self._by_key.get((self._scopes[first], key), ())]

    def named(self, text: str, scope: str, linked: Mapping[int, int]) -> Iterator[Named]:
        """Every figure that the words of ``text`` name by number; offsets in characters.

        ``linked``: where a cross-reference begins -> where it ends. One that is a single label needs no reading.
        """
        for mark in self._marks:
            at = text.find(mark)
            while at >= 0:
                end = linked.get(at)
                if end is None or not _SINGLE.fullmatch(text, at, end) or _BETWEEN.match(text, end):
                    head = self._pattern.match(text, at)
                    if head is not None:
                        yield from self._named_after(head, text, scope)
                at = text.find(mark, at + len(mark))

    def _named_after(self, head: re.Match[str], text: str, scope: str) -> Iterator[Named]:
        before = text[max(0, head.start() - _BEFORE) : head.start()]
        if _ELSEWHERE_BEFORE.search(before):
            return
        qualified = _QUALIFIER.search(before)
        start = head.start() if qualified is None else head.start() - len(before) + qualified.start()
        qualifier = qualified[1] if qualified else ""
        word = head.group().rstrip(".")
        plural = any(head.groupdict().values())
        name = _head(word[:-1] if plural and _head(word) != "figure" else word)
        for n, (first, last, at, end) in enumerate(_items(text, head.end(), name, qualifier, plural)):
            figures, in_range = self._meant(scope, first, last)
            for i in figures:
                yield Named(start if n == 0 else at, end, i, in_range)

    def _meant(self, scope: str, first: Key, last: Key) -> tuple[list[int], bool]:
        asked = (scope, first, last)
        if asked not in self._known:
            keys = [first] if first == last else _span(first, last)
            figures = [i for key in keys for i in self._of(scope, key)]
            in_range = first._replace(panel="") != last._replace(panel="")
            self._known[asked] = (list(dict.fromkeys(figures)), in_range)
        return self._known[asked]

    def _of(self, scope: str, key: Key) -> list[int]:
        for where in dict.fromkeys((scope, "")):
            for asked in dict.fromkeys((key, key._replace(panel=""))):
                if found := self._by_key.get((where, asked)):
                    return found
        return []


def _items(text: str, position: int, head: str, qualifier: str, plural: bool) -> list[tuple[Key, Key, int, int]]:
    """The numbers after a head: (first, last, start, end), first and last being one but for a range."""
    items: list[tuple[Key, Key, int, int]] = []
    item = _ITEM.match(text, position)
    start = position
    while item is not None and len(items) < MOST_IN_A_LIST:
        key = _key(head, qualifier, item)
        items.append((key, key, start, item.end()))
        between = _BETWEEN.match(text, item.end())
        if between is None:
            break
        ranged = between["by"].lower() in _RANGE
        start = between.start("head") if between["head"] else between.end()
        item = _ITEM.match(text, between.end())
        # "Figure 1, 20 mice" and "Fig. 2 to 5 mm" are not lists; "Fig. 2-4", "Fig. 1A, 2B", "Figs. 1, 2" are.
        if item is None or not (plural or between["head"] or item["panel"] or (ranged and len(between["by"]) == 1)):
            break
        if ranged:
            first, _, since, _ = items.pop()
            items.append((first, _key(head, qualifier, item), since, item.end()))
            between = _BETWEEN.match(text, item.end())
            if between is None or not plural:
                break
            start = between.end()
            item = _ITEM.match(text, start)
    if items and _ELSEWHERE.match(text, items[-1][3]):
        return []
    return items


def is_range(text: str, start: int, until: int, since: int) -> bool:
    """Whether a cross-reference at ``start:until`` and one from ``since`` on are the ends of a range of figures.

    Publishers also link "Figs. 1-16" of another work's plate: what lies between such ends is not meant.
    """
    if not 0 < since - until < 16 or not _GAP.fullmatch(text, until, since):
        return False
    return not _ELSEWHERE_BEFORE.search(_LAST_HEAD.sub("", text[max(0, start - _BEFORE) : start]))


def _span(a: Key, b: Key) -> list[Key]:
    """Both ends and what lies between; just the ends where they do not count up."""
    prefix = b.prefix or a.prefix  # "Figs. S2-4"
    if a.supplement or b.supplement:
        if (a.head, a.prefix, a.number) == (b.head, b.prefix, b.number) and a.supplement and b.supplement:
            numbers = range(int(a.supplement), min(int(b.supplement), int(a.supplement) + MOST_IN_A_RANGE) + 1)
            return [a._replace(supplement=str(n), panel="") for n in numbers]
        return [a, b]
    if a.number.isdigit() and b.number.isdigit() and prefix == a.prefix:
        low, high = int(a.number), int(b.number)
        if low < high <= low + MOST_IN_A_RANGE:
            inner = [a._replace(number=str(n), panel="") for n in range(low + 1, high)]
            return [a, *inner, b._replace(prefix=prefix)]
    return [a, b._replace(prefix=prefix)]
