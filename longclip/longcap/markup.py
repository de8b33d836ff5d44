"""Bytes from outside -> the element ``article``, read hardened: no DTD, no network, no entity ever expanded.

libxml2's own bounds on depth and on the size of one text stay on, a file's size is bounded, and every refusal has one
of a few reasons, to be counted.
"""

from __future__ import annotations

import re
from html.entities import html5
from typing import Any

from lxml import etree

MAX_BYTES = 64 << 20
"""a larger file is refused: its tree would take about ten times as much memory"""

REASONS = (
    "empty",
    "too large",
    "too deep",
    "truncated",
    "wrong encoding",
    "entity expansion",
    "not XML",
    "no article",
    "several articles",
)

_WIDE = (
    (b"\xff\xfe\0\0", "utf-32"),
    (b"\0\0\xfe\xff", "utf-32"),
    (b"\xff\xfe", "utf-16"),
    (b"\xfe\xff", "utf-16"),
    # Without a mark XML's first character tells; it is "<".
    (b"<\0\0\0", "utf-32-le"),
    (b"\0\0\0<", "utf-32-be"),
    (b"<\0", "utf-16-le"),
    (b"\0<", "utf-16-be"),
)
_DECLARED = re.compile(rb"""^\s*<\?xml[^>]*?\sencoding\s*=\s*["']([\w.:-]+)["']""")
_ENTITY = re.compile(rb"&(?!(?:amp|lt|gt|quot|apos);)([A-Za-z_][\w.-]{0,63});")
# An end that is missing is the file's: no part of it is looked at twice.
_LITERAL_OR_ENTITY = re.compile(rb"<!--.*?(?:-->|\Z)|<!\[CDATA\[.*?(?:\]\]>|\Z)|" + _ENTITY.pattern, re.DOTALL)
_DECLARES = re.compile(rb"<!ENTITY\s+(%?)\s*([^\s%]+)")


class BadArticle(ValueError):
    """A file that is no readable article. ``reason`` is one of REASONS, to count by; ``detail`` is for people."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason
        self.detail = detail


def article_element(data: bytes) -> Any:
    """The one article in ``data``, also inside a wrapper (OAI-PMH, pmc-articleset), its tags without namespace.

    Raises BadArticle.
    """
    if not data.strip():
        raise BadArticle("empty", "no bytes" if not data else "only white space")
    if len(data) > MAX_BYTES:
        raise BadArticle("too large", f"{len(data)} bytes, at most {MAX_BYTES}")
    data, encoding = _encoding(data)
    data = _without_entities(data)
    parser = etree.XMLParser(
        resolve_entities=False,
        load_dtd=False,
        no_network=True,
        huge_tree=False,  # libxml2's own bounds on depth and on the size of a text stay on
        remove_comments=True,
        remove_pis=True,
        encoding=encoding,
    )
    try:
        root = etree.fromstring(data, parser)
    except etree.XMLSyntaxError as error:
        raise BadArticle(_why(error, data), str(error)) from None
    except (LookupError, ValueError) as error:  # an encoding that libxml2 does not know
        raise BadArticle("wrong encoding", str(error)) from None
    if root.tag == "article":
        return root
    found = [e for e in root.iter("{*}article") if next(e.iterancestors("{*}article"), None) is None]
    if len(found) != 1:
        wrong = "several articles" if found else "no article"
        raise BadArticle(wrong, f"the root is <{etree.QName(root).localname}>, with {len(found)} articles in it")
    if found[0].tag != "article":  # JATS as a default namespace, as OAI-PMH serves it
        namespace = found[0].tag[: found[0].tag.index("}") + 1]
        for e in found[0].iter(f"{namespace}*"):
            e.tag = e.tag[len(namespace) :]
    return found[0]


def _encoding(data: bytes) -> tuple[bytes, str | None]:
    """(bytes in an encoding that contains ASCII, encoding to assume against what the file declares, or None)."""
    for mark, wide in _WIDE:
        if data.startswith(mark):
            try:
                return data.decode(wide).encode(), "utf-8"
            except UnicodeError as error:
                raise BadArticle("wrong encoding", str(error)) from None
    declared = _DECLARED.match(data[:1024])
    if declared is None or declared[1].lower().replace(b"-", b"") == b"utf8":
        return data, None
    try:
        # Text in another encoding does not happen to be UTF-8; files relabelled or transcoded by halves do happen.
        data.decode("utf-8")
    except UnicodeError:
        return data, None
    return data, "utf-8"


def _without_entities(data: bytes) -> bytes:
    """HTML's and ISO's named characters as numbers; names that nobody declares stay as they are written ("&foo;").

    A DTD would have declared them, and no DTD is read: a parser drops such names, or the whole article. What a file
    declares for itself is not expanded: an article that uses it is refused. CDATA says what it says to the letter.
    """
    declared = _DECLARES.findall(data) if b"<!ENTITY" in data else []
    own = {name for _, name in declared}
    if any(percent for percent, _ in declared):
        raise BadArticle("entity expansion", "the DOCTYPE declares a parameter entity")
    declarations_end = data.find(b">", data.rfind(b"<!ENTITY")) if own else 0

    def number(found: re.Match[bytes]) -> bytes:
        name = found[1]
        if name is None:
            return found.group()
        known = html5.get(name.decode("latin-1") + ";")
        if known is not None:
            return "".join(f"&#{ord(c)};" for c in known).encode()
        if name in own and found.start() < declarations_end:
            return found.group()  # one declaration that names another
        if name in own:
            raise BadArticle("entity expansion", f"&{name.decode('latin-1')}; is declared in the file itself")
        return b"&amp;" + name + b";"

    # With declarations of its own nothing is passed over, or they could open what hides their use.
    pattern = _LITERAL_OR_ENTITY if b"<![CDATA[" in data and not own else _ENTITY
    return pattern.sub(number, data) if b"&" in data else data


def _why(error: Any, data: bytes) -> str:
    text, code = str(error).lower(), error.code
    types = etree.ErrorTypes
    if "excessive depth" in text or "xml_parse_huge" in text:
        return "too deep" if "depth" in text else "too large"
    if code in (types.ERR_UNKNOWN_ENCODING, types.ERR_UNSUPPORTED_ENCODING, types.ERR_INVALID_ENCODING) or any(
        word in text for word in ("not proper utf-8", "encoding", "invalid bytes")
    ):
        return "wrong encoding"
    if code in (types.ERR_ENTITY_LOOP, types.ERR_UNDECLARED_ENTITY) or "amplification" in text:
        return "entity expansion"
    cut = b"<article" in data and not data.rstrip().endswith(b">")  # within a tag
    if cut or code in (types.ERR_TAG_NOT_FINISHED, types.ERR_DOCUMENT_END) or "premature end" in text:
        return "truncated"
    return "not XML"
