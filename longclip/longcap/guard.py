"""Does a rewritten description say anything that its source does not?

A language model that is asked to rewrite may invent. What can be checked without another model is checked here:
numbers, with their sign, comparison and unit; units; names and abbreviations (tokens with a capital); and codes (tokens
with a digit, "CD8+"). Each has to stand in the source. What cannot be checked so, a "not" left out or a cause made of a
coincidence, passes: the guard bounds invention, it does not rule it out.
"""

from __future__ import annotations

import re
import unicodedata


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_UNITS = _words(
    "% ‰ ° °C °F K kg g mg μg ng pg kDa Da bp kb kbp Mb L l dL dl mL ml μL μl nL nl km m cm mm μm nm pm Å "
    "h hr hrs min mins s sec ms μs ns Hz kHz MHz GHz V kV mV W mW kW J kJ kcal cal eV keV MeV Pa kPa MPa mmHg bar atm "
    "mol mmol μmol nmol M mM μM nM pM IU U Gy mGy Sv mSv Bq MBq rpm dB ppm ppb T mT "
    "percent percentage degree degrees fold folds times micron microns meter meters metre metres liter liters litre "
    "litres gram grams second seconds minute minutes hour hours day days week weeks month months year years"
)
_NUMBER_WORDS = _words(
    "zero two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen twenty thirty forty fifty sixty seventy eighty ninety hundred hundreds thousand thousands "
    "million millions billion half halves third thirds quarter quarters twice thrice double doubled triple tripled "
    "dozen dozens"
)  # "one" and "first" are grammar more often than numbers
_GRAMMAR = _words(
    "a after all although among an and as at based because before below both but by compared during each following for "
    "from given here however if in into is it its most no not of on one only or other our overall shown since so some "
    "such than that the their then there these they this those thus to together under upon was we were when where "
    "whereas which while with within"
)
"""words that a sentence may begin with, capitalised, without naming anything"""

_UNIT = "|".join(sorted(map(re.escape, _UNITS), key=len, reverse=True))
_END_OF_UNIT = r"(?![^\W_])"
_N = r"\d+(?:\.\d+)*(?:\^[-+]?\d+)?"
_GLUED = re.compile(rf"(?<![\w-])({_N})((?:{_UNIT}){_END_OF_UNIT})")
_QUANTITY = re.compile(
    rf"(?:(?P<sign>[<>≤≥±≈~]|(?<!\w)-)\s*|(?<![\w-])(?<!\d\.))(?P<number>{_N}(?:-{_N})?)"
    rf"(?:[\s-]*(?P<unit>{_UNIT}){_END_OF_UNIT})?(?![^\W_])"
)
_TOKEN = re.compile(
    rf"[^\W_]+(?:(?:[-./']|(?<=\d)\^[-+]?(?=\d))[^\W_]+)*\+?|{'|'.join(map(re.escape, ('%', '‰', '°')))}"
)
_EXPONENT = re.compile(r"(?<=\d)[⁺⁻]?[⁰¹²³⁴-⁹]+")
_SENTENCE_START = re.compile(r"(?:^|[.!?:;]\s+)[\"'(\[]*$")


def invented(rewrite: str, source: str) -> tuple[str, ...]:
    """What the rewrite says and the source does not: quantities and tokens, each once; empty where it may pass."""
    new, old = _plain(rewrite), _plain(source)
    quantities = dict.fromkeys(_quantities(new))
    known_quantities = set(_quantities(old))
    found = [" ".join(filter(None, q)) for q in quantities if q not in known_quantities]
    tokens = set(_TOKEN.findall(old))
    parts = {part for token in tokens for part in token.split("-")}
    lower = {part.lower() for part in parts}
    for match in _TOKEN.finditer(new):
        token = match[0]
        if token in tokens or token in found:
            continue
        if any(c.isdigit() for c in token):
            found.append(token)
        elif any(part in _UNITS for part in token.split("/")):  # "mg/kg" is another unit than "mg"
            found += () if token in parts else (token,)
        elif any(c.isupper() for c in token):
            known = all(p in parts for p in token.split("-") if any(c.isupper() for c in p))
            # The first word of a sentence may have its capital from there: then it is the word that has to be known.
            if token.istitle() and _SENTENCE_START.search(new[max(0, match.start() - 10) : match.start()]):
                word = token.lower()
                known = known or word in _GRAMMAR or all(part in lower for part in word.split("-"))
            if not known:
                found.append(token)
        elif any(part in _NUMBER_WORDS and part not in lower for part in token.split("-")):  # "two-fold"
            found.append(token)
    return tuple(dict.fromkeys(found))


def _plain(text: str) -> str:
    """One way to write each thing: µ, dashes, 1,000, 10⁶ and 5mm."""
    text = _EXPONENT.sub(r"^\g<0>", text)  # NFKC makes 106 of 10⁶
    text = unicodedata.normalize("NFKC", text).replace("µ", "μ")
    text = re.sub("[\u2010-\u2015\u2212]", "-", text).replace("\u2019", "'")
    text = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", text)
    return _GLUED.sub(r"\1 \2", text)


def _quantities(text: str) -> list[tuple[str, str, str]]:
    """(sign or comparison, number, unit), as in ("<", "0.05", "") and ("", "5", "mm")."""
    return [(m["sign"] or "", m["number"], m["unit"] or "") for m in _QUANTITY.finditer(text)]
