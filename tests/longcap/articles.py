"""JATS written by hand, small."""

from __future__ import annotations

FRONT = "<front><article-meta><title-group><article-title>On cells</article-title></title-group></article-meta></front>"


def article(body: str, front: str = FRONT, back: str = "") -> bytes:
    return (
        '<article xmlns:xlink="http://www.w3.org/1999/xlink" xmlns:mml="http://www.w3.org/1998/Math/MathML"'
        ' xmlns:ali="http://www.niso.org/schemas/ali/1.0/">'
        f"{front}<body>{body}</body><back>{back}</back></article>"
    ).encode()


def fig(number: int | str, caption: str = "Cells.", label: str | None = None) -> str:
    label = f"Figure {number}." if label is None else label
    return (
        f'<fig id="f{number}"><label>{label}</label><caption><p>{caption}</p></caption>'
        f'<graphic xlink:href="f{number}.jpg"/></fig>'
    )


def xref(number: int | str, text: str | None = None) -> str:
    return f'<xref ref-type="fig" rid="f{number}">{text if text is not None else f"Figure {number}"}</xref>'
