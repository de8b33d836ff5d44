"""Plain text out of marked-up text: numbers keep their meaning, blocks keep their distance, formulas stand once.

Whoever reads an element's text must have called ``make_readable`` on the tree before.
"""

from __future__ import annotations

import re
from typing import Any

from lxml import etree

MATHML = "{http://www.w3.org/1998/Math/MathML}"

_SPACED = ("p", "title", "break", "list-item", "def", "term", "disp-formula", "disp-quote", "list", "boxed-text")
_HIDDEN = ("index-term", f"{MATHML}annotation", f"{MATHML}annotation-xml")
REWRITTEN = (*_SPACED, *_HIDDEN, "sup", "tex-math", f"{MATHML}msup", f"{MATHML}mfrac")
"""tags that ``make_readable`` has to be shown"""

_EXPONENT = re.compile(r"[-−–+]?\d+")
_TEX_BODY = re.compile(r"\\begin\s*\{document\}(.*?)(?:\\end\s*\{document\}|$)", re.DOTALL)
_INVISIBLE = "\u00ad\u200b\u2060\ufeff"
"""soft hyphen, zero-width space, word joiner, byte-order mark: they split words for a tokenizer and for nobody else"""


def collapse(text: str) -> str:
    """White space of any kind becomes one space; invisible characters go."""
    if not text.isascii():
        for character in _INVISIBLE:
            if character in text:
                text = text.replace(character, "")
    return " ".join(text.split())


def raw_text(element: Any) -> str:
    """The text within ``element`` (not its tail) as the tree has it, gathered by libxml2."""
    text: str = etree.tostring(element, method="text", encoding="unicode", with_tail=False)
    return text


def text_of(element: Any) -> str:
    """The same with white space collapsed; empty for None."""
    return "" if element is None else collapse(raw_text(element))


def make_readable(tag: str, element: Any) -> None:
    """Rewrites one element in place so that its characters, strung together, say what the page says.

    ``20 x 10<sup>6</sup>`` would read 20 x 106, a fraction 1/2 would read 12, a superscript reference 38 would grow
    onto the word before it, and PMC's tex-math brings a LaTeX preamble: what is wrong to read is wrong to train on.
    """
    if tag == "sup":
        _superscript(element)
    elif tag in _SPACED:
        if tag not in ("list", "disp-quote", "boxed-text"):
            element.text = " " + (element.text or "")
        if tag not in ("p", "title"):
            element.tail = " " + (element.tail or "")
    elif tag == "tex-math":
        # A formula that is given twice is read from its MathML.
        parent = element.getparent()
        twice = parent is not None and parent.find(f"{MATHML}math") is not None
        body = _TEX_BODY.search(element.text or "")
        element.text = "" if twice else (body.group(1) if body else element.text or "").replace("$", " ")
    elif tag in _HIDDEN:
        element.clear(keep_tail=True)
    elif len(element) >= 2:
        base = element[0]
        if tag.endswith("mfrac"):
            base.tail = "/"
        elif (base.text or "").rstrip()[-1:].isdigit():
            base.tail = "^"


def _superscript(sup: Any) -> None:
    parent, previous = sup.getparent(), sup.getprevious()
    if parent is not None and parent.tag == "xref" and parent.get("ref-type") == "bibr" and len(sup) == 0:
        sup.text = f"[{sup.text or ''}]"
    elif len(sup) and sup[0].tag == "xref" and sup[0].get("ref-type") == "bibr":
        sup.text = "[" + (sup.text or "")
        sup[-1].tail = (sup[-1].tail or "") + "]"
    elif len(sup) == 0 and _EXPONENT.fullmatch(sup.text or ""):
        before = previous.tail if previous is not None else parent.text if parent is not None else None
        if before and before[-1].isdigit():
            sup.text = "^" + sup.text
