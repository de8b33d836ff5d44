"""A small corpus of articles, written by hand: JATS with figures, mentions and pictures that no two articles share."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from PIL import Image

ARTICLE = """<?xml version="1.0" encoding="UTF-8"?>
<article xmlns:xlink="http://www.w3.org/1999/xlink" article-type="research-article">
<front><article-meta>{ids}
<title-group><article-title>Cells of kind {number}</article-title></title-group>
<permissions>{license}</permissions>
<abstract><p>Cells of kind {number} were looked at in every light.</p></abstract>
</article-meta></front>
<body><sec><title>Results</title>{body}</sec></body>
</article>
"""
FIGURE = """
<p>The membrane of cell {number} is folded twice, as <xref ref-type="fig" rid="f{n}">Figure {n}</xref> shows.
It folds again at noon.</p>
<fig id="f{n}"><label>Figure {n}</label><caption><title>Cell {number} in light {n}.</title>
<p>The membrane of cell {number} is seen from side {n}, stained, at scale {n}0 µm.</p></caption>
<graphic xlink:href="{href}"/></fig>
"""
CC_BY = '<license xlink:href="https://creativecommons.org/licenses/by/4.0/"><license-p>CC BY</license-p></license>'
CC_BY_NC = '<license xlink:href="https://creativecommons.org/licenses/by-nc/4.0/"><license-p>NC</license-p></license>'


def picture(seed: int, size: tuple[int, int] = (96, 64)) -> Image.Image:
    """Large soft blotches, so that the picture is recognised when it is scaled."""
    cells = np.random.default_rng(seed).integers(0, 256, (6, 9, 3), dtype=np.uint8)
    return Image.fromarray(cells).resize(size, Image.Resampling.BICUBIC)


def jpeg(image: Image.Image, quality: int = 90) -> bytes:
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=quality)
    return stream.getvalue()


def article(number: int, figures: int = 2, license: str = CC_BY, ids: str | None = None, href: str = "f{n}") -> str:
    if ids is None:
        ids = f'<article-id pub-id-type="doi">10.1000/cells.{number}</article-id>'
        ids += f'<article-id pub-id-type="pmc">{1000 + number}</article-id>'
    body = "".join(FIGURE.format(number=number, n=n, href=href.format(n=n)) for n in range(1, figures + 1))
    return ARTICLE.format(ids=ids, number=number, license=license, body=body)


def write_article(folder: Path, number: int, figures: int = 2, **kinds: str) -> Path:
    """The folder of one article with its pictures; returns the XML's path."""
    folder.mkdir(parents=True)
    (folder / "article.nxml").write_text(article(number, figures, **kinds))
    for n in range(1, figures + 1):
        (folder / f"f{n}.jpg").write_bytes(jpeg(picture(100 * number + n)))
    return folder / "article.nxml"


def write_corpus(root: Path, articles: int = 9) -> Path:
    for number in range(articles):
        write_article(root / f"group{number % 2}" / f"article{number}", number, 1 + number % 3)
    return root
