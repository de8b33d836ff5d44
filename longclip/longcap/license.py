"""The licence of an article, and of a figure that states its own.

By the strongest evidence given: a link, an attribute, prose; else unknown.
"""

from __future__ import annotations

import re
from typing import Any

from longclip.longcap.article import License
from longclip.longcap.text import collapse, text_of

_HREF = "{http://www.w3.org/1999/xlink}href"
_REFERENCES = ("{http://www.niso.org/schemas/ali/1.0/}license_ref", "{http://www.niso.org/schemas/ali/1.0}license_ref")

_URL = re.compile(
    r"creativecommons\.org/(?:licen[sc]es/(?P<terms>by[a-z-]*)(?:/(?P<version>\d\.\d))?"
    r"|(?:publicdomain|licen[sc]es)/(?P<public>zero|mark|publicdomain)(?:/(?P<public_version>\d\.\d))?)",
    re.IGNORECASE,
)
_SHORT = re.compile(
    r"\bcc[\s_-]*(?P<terms>0|by(?:[\s_/-]*(?:nc|nd|sa))*)(?![a-z])[\s_v-]*(?P<version>\d\.\d)?", re.IGNORECASE
)
_LONG = re.compile(r"creative\s+commons(?:['’]s?)?\s+(?P<terms>\(?attribution.{0,80})", re.IGNORECASE | re.DOTALL)
_ZERO = re.compile(r"public\s+domain\s+(?:dedication|declaration)|\bCC\s?zero\b", re.IGNORECASE)
_TERMS = (
    ("nc", re.compile(r"\bnon?[\s-]*commercial|\bnot\s+(?:\w+\s+){0,3}commercial|\bnc\b", re.IGNORECASE)),
    ("nd", re.compile(r"no[\s-]*deriv|\bnd\b", re.IGNORECASE)),
    ("sa", re.compile(r"share[\s-]*alike|\bsa\b", re.IGNORECASE)),
)
_VERSION = re.compile(r"\b([1-4]\.\d)\b")
_OTHERS = re.compile(
    r"\bpermission\s+(?:of|from|by)\b|\b(?:with|by)\s+(?:\w+\s+){0,2}permission\b|\ball\s+rights\s+reserved\b",
    re.IGNORECASE,
)


def find_license(meta: Any) -> License:
    """``meta``: the article's own article-meta (a sub-article's terms are not the article's).

    Where several Creative Commons licences are named, the most restrictive one counts: a CC0 waiver for an article's
    data does not free its figures. Prose that names plain Attribution and speaks of non-commercial use is BY-NC.
    """
    if meta is None:
        return License("unknown")
    elements = list(meta.iter("license"))
    statements = [text_of(e) for e in meta.iter("copyright-statement")]
    text = collapse(" ".join(text_of(e) for e in elements))
    links = [e.get(_HREF) or "" for e in elements]
    links += [e.get(_HREF) or "" for license in elements for e in license.iter("ext-link", "uri")]
    links += [text_of(e) for e in meta.iter(*_REFERENCES)]
    if named := [(name, link) for link in links if (name := _of_url(link))]:
        name, url = max(named, key=lambda pair: _restrictions(pair[0]))
        return License(name, url.strip(), "link", text)
    for element in elements:
        kind = element.get("license-type") or ""
        short = _SHORT.search(kind)
        if short:
            return License(_short(short), "", "attribute", text)
    for prose in (text, *statements):
        if name := _of_prose(prose):
            found = _URL.search(prose)
            return License(name, found.group() if found else "", "prose", text or prose)
    if elements:
        url = next((link for link in links if link), "")
        return License("other", url, "link" if url else "prose" if text else "attribute", text)
    return License("unknown")


def find_own_license(fig: Any, group: Any) -> License | None:
    """What a figure, or the fig-group around it (None: there is none), states for itself; see ``Figure.license``."""
    around = [] if group is None else [*group.findall("permissions"), *group.findall("attrib")]
    for element in (fig, *around):
        found = find_license(element)
        if found.name != "unknown":
            return found
        said = [text_of(e) for e in element.iter("permissions", "attrib")]
        for text in said:
            if name := _of_prose(text):
                return License(name, "", "prose", text)
        for text in said:
            if _OTHERS.search(text):
                return License("unknown", "", "prose", text)
    return None


def stricter(one: License, other: License) -> License:
    """The one that allows less; ``one`` where they allow the same."""
    return max(one, other, key=lambda license: (license.name in ("other", "unknown"), _restrictions(license.name)))


def _restrictions(name: str) -> tuple[bool, int]:
    return name.startswith("CC BY"), name.count("-")


def _of_url(url: str) -> str:
    found = _URL.search(url)
    if found is None:
        return ""
    if found["public"]:
        public = "CC0" if found["public"].lower() == "zero" else "Public Domain"
        return f"{public} {found['public_version'] or ''}".strip()
    terms = found["terms"].lower().split("-")
    return _name([term for term in ("nc", "nd", "sa") if term in terms], found["version"])


def _name(terms: list[str], version: str | None) -> str:
    # The names' own order: BY-NC-SA, BY-NC-ND.
    return f"CC {'-'.join(['BY', *(term.upper() for term in terms)])} {version or ''}".strip()


def _short(found: re.Match[str]) -> str:
    terms = found["terms"].lower()
    if terms == "0":
        return f"CC0 {found['version'] or ''}".strip()
    return _name([term for term in ("nc", "nd", "sa") if term in terms], found["version"])


def _of_prose(text: str) -> str:
    if urls := [_of_url(found.group()) for found in _URL.finditer(text)]:
        return max(urls, key=_restrictions)
    named = _LONG.search(text)
    short = _SHORT.search(text)
    if named is None and (short is None or short["terms"] == "0"):
        return "CC0" if short or _ZERO.search(text) else ""
    stated = named["terms"] if named else short.group() if short else ""
    # "Attribution License, which permits non-commercial use" is no plain Attribution.
    brief = short["terms"].lower() if short else ""
    terms = [t for t, pattern in _TERMS if t in brief or pattern.search(text if t == "nc" else stated)]
    version = _VERSION.search(stated)
    return _name(terms, version[1] if version else None)
