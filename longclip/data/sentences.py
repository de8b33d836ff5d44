"""Text to sentences, and the abbreviations that a text defines: rules for scientific English, no model.

A splitter errs in two ways. Here a missed boundary is the lesser evil: two sentences in one still read well, while half
a sentence ("as shown in Fig.") does not.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

_END = re.compile(
    r"""
    (?P<stop> [.!?] )
    (?P<close> ["'”’)\]]* )
    (?: (?P<bare> (?<=[a-z)\]”"]\.) \d{1,3} (?: \s?[,–-]\s? \d{1,3} )* (?=\s) )  # cells.12,13 We: once superscript
      | (?P<refs> (?: \s? \[ [\d\s,;–-]+ \] )+ ) )?                            # cells. [12] We, cells.[12–14] We
    (?= \s+ (?P<next> \S+ ) )
    """,
    re.VERBOSE,
)
_BREAK = re.compile(r"[\s()\[\]/–]")
_WORD = re.compile(r"\S+")
_INSIDE_BRACKETS = re.compile(r"\([^()]{1,400}\)")
_INITIALS = re.compile(r"(?:[^\W\d_]\.?-?)+", re.UNICODE)


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Never the end of a sentence: what follows belongs to them.
_LEADING = _words(
    "fig figs figure tab eq eqs eqn ref refs sec suppl supp supplementary vs cf e.g i.e eg ie viz dr prof mr mrs ms st "
    "no nos nr vol pp p ca approx resp ssp subsp var ed eds chap ch incl esp aka ser mt ft lt col gen sen rep"
)
# Sometimes the end: only where the next word opens sentences and hardly ever continues one.
_AMBIGUOUS = _words(
    "al etc spp sp inc ltd co corp dept univ i.v i.p i.m s.c p.o a.m p.m u.s u.k u.s.a ph.d m.d min max sec hr hrs h "
    "wt mol exp temp conc diam assoc int natl acad sci proc jr sr bros jan feb mar apr jun jul aug sept sep oct nov "
    "dec s.d s.e s.e.m b.w r.t v/v w/v"
)
_OPENERS = _words(
    "the we this these those in here our it its they there their to for although though however moreover furthermore "
    "thus therefore hence when while after before both each all as at by on with from using because since consequently "
    "finally first second third similarly interestingly importantly notably surprisingly additionally overall "
    "alternatively conversely specifically if no not one two three several many most other such"
)


def sentences(text: str) -> list[tuple[int, int]]:
    """Start and end, in characters, of each sentence: in order, not overlapping, without white space at their ends.

    Every character that is no white space lies in exactly one of them. References that stand behind the full stop
    ("... cells. [12] We ...", "... cells.12 We ...") belong to the sentence before.
    """
    brackets = [found.span() for found in _INSIDE_BRACKETS.finditer(text)]
    cuts: list[tuple[int, int]] = []
    start = len(text) - len(text.lstrip())
    inside = 0
    for found in _END.finditer(text):
        end = found.end()
        while inside < len(brackets) and brackets[inside][1] <= found.start():
            inside += 1
        if inside < len(brackets) and brackets[inside][0] < found.start() and end < brackets[inside][1]:
            continue
        if end > start and _ends(text, start, found):
            cuts.append((start, end))
            start = found.start("next")
    last = len(text.rstrip())
    if cuts and not any(map(str.isalpha, text[start:last])):  # "... exponentially. (12)", "... cells. [91]"
        start = cuts.pop()[0]
    if last > start:
        cuts.append((start, last))
    return cuts


def _ends(text: str, start: int, found: re.Match[str]) -> bool:
    following = found["next"]
    if not _may_open(following):
        return False
    if found["stop"] != ".":
        return True
    before = _BREAK.split(text[max(start, found.start() - 40) : found.start()])[-1]
    word = before.strip("\"'“‘,;:")
    lower = word.lower()
    opens = following.strip("\"'“‘(,;:").lower() in _OPENERS
    if lower in _LEADING:
        # "(Fig.) We" and "see Fig. The" are no references; a bare "no." may be the word
        return bool(found["close"]) or (lower in ("no", "p", "st", "ed") and opens)
    if lower in _AMBIGUOUS or (_INITIALS.fullmatch(word) and (len(word) == 1 or "." in word)):
        return opens or bool(found["refs"])
    # a numbered heading: "2. Methods"
    return not (word.isdigit() and found.start() - len(before) == start)


def _may_open(word: str) -> bool:
    """Whether a sentence can begin so: "The", "(A)", "12", "β-actin", and names such as "p53", "mRNA", "c-Myc"."""
    bare = word.lstrip("\"'“‘([")
    if not bare:
        return False
    first = bare[0]
    if first.isupper() or first.isdigit() or not first.isascii():
        return first.isalnum()
    return first.islower() and any(c.isupper() or c.isdigit() for c in bare[1:])


_SHORT_IN_BRACKETS = re.compile(r"\(([^\W_][^()\[\],;]{1,9})[,;)]")
_LONG_IN_BRACKETS = re.compile(r" \(([^\W\d_][^()\[\]]{3,79})\)")
_PANELS = re.compile(r"[A-Z]\d?(?:[-–/&+][A-Z]\d?)+")


def abbreviations(text: str) -> Iterator[tuple[str, str, int]]:
    """Each abbreviation that a text defines, what it stands for, and where the definition begins, in characters.

    "optical coherence tomography (OCT)" and "OCT (optical coherence tomography)". The rule is Schwartz and Hearst's
    (Pacific Symposium on Biocomputing 2003, 451-462): a short form has 2 to 10 characters, at most two words, and a
    letter; its characters must occur in this order, matched from the last to the first, in the at most
    min(n + 5, 2 n) words before the bracket (n: characters of the short form), the first of them at the beginning of
    a word. On top of it the short form must not look like a plain word: it has a capital beyond the first letter, or a
    digit.
    """
    for found in _SHORT_IN_BRACKETS.finditer(text):
        short = found[1].strip()
        if not _is_short_form(short):
            continue
        before = text[max(0, found.start() - 160) : found.start()].rstrip()
        for stop in (". ", "; ", "(", ")", "[", "]", "="):  # a long form reaches over none of these
            before = before[before.rfind(stop) + len(stop) :] if stop in before else before
        words = list(_WORD.finditer(before))[-min(len(short) + 5, 2 * len(short)) :]
        if words:
            window = before[words[0].start() :]
            if (at := _match(short, window)) is not None:
                yield short, window[at:], found.start()
    for found in _LONG_IN_BRACKETS.finditer(text):
        short = text[max(0, text.rfind(" ", 0, found.start()) + 1) : found.start()].lstrip("([\"'“‘")
        if _is_short_form(short):
            words_inside = re.split("[;,]", found[1])[0].split()
            if 2 <= len(words_inside) <= min(len(short) + 5, 2 * len(short)):
                long = " ".join(words_inside)
                if _match(short, long) == 0:
                    yield short, long, found.start()


def _is_short_form(short: str) -> bool:
    """2 to 10 characters that look like a name: not "(left)", "(n = 5)" or the panels "(A-C)"."""
    words = short.split()
    return (
        2 <= len(short) <= 10
        and 1 <= len(words) <= 2
        and short[0].isalpha()
        and any(c.isupper() or c.isdigit() for c in short[1:])
        and (len(words) == 1 or all(sum(c.isupper() or c.isdigit() for c in word) > 1 for word in words))
        and not _PANELS.fullmatch(short)
    )


def _match(short: str, long: str) -> int | None:
    """Where in ``long`` the shortest long form begins; None if there is none."""
    at, lower = len(long), long.lower()
    for i in range(len(short) - 1, -1, -1):
        letter = short[i].lower()
        if not letter.isalnum():
            continue
        at = lower.rfind(letter, 0, at)
        while i == 0 and at > 0 and lower[at - 1].isalnum():
            at = lower.rfind(letter, 0, at)
        if at < 0:
            return None
    # what holds the abbreviation itself, or is hardly longer, explains nothing
    form = long[at:]
    return None if len(form) <= len(short) or short.lower() in form.lower() else at
