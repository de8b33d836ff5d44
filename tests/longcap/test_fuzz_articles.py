"""Seeded damage to articles and images: a result or a named refusal, in bounded time, and nothing else."""

from __future__ import annotations

import io
import random
import re
import time
from collections import Counter

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("lxml", reason="the extra longcap is not installed")

from longclip.longcap import images, jats
from tests.longcap.articles import article, fig, xref

SLOWEST = 5.0
"""seconds for one input of a few kB: some 1,000 times what a sound one takes"""
FEW, MANY = 1000, 5000
NAMES = [
    b"article-meta", b"fig-group", b"caption", b"graphic", b"label", b"title", b"xref", b"body", b"front", b"back",
    b"list-item", b"list", b"sup", b"mml:msup", b"table-wrap", b"sub-article", b"alternatives",
    b"supplementary-material", b"sec", b"p", b"fig",
]  # fmt: skip

BODY = "".join(fig(n, "<title>Cells</title> 10<sup>6</sup> &nbsp; <italic>in</italic> vitro") for n in range(1, 5))
SEEDS = [
    article(f"<sec><title>R</title><p>Figs. {xref(1, '1')}–{xref(3, '3')}, Figure 2A and Fig. 4.</p>{BODY}</sec>"),
    b'<?xml version="1.0" encoding="UTF-8"?><!DOCTYPE article [<!ENTITY a "x">]>' + article(f"<p>{BODY}</p>"),
    article(
        f"<fig-group id='g'><label>Figure 9</label>{BODY}</fig-group><p><list><list-item><p>{xref(1)}</p></list-item>"
        "</list><mml:math><mml:msup><mml:mn>1</mml:mn><mml:mn>2</mml:mn></mml:msup></mml:math></p>"
    ),
]
PIECES = [
    b"<p>", b"</p>", b"<fig>", b"</fig>", b"<caption>", b"<xref rid='f1 f2'>", b"</xref>", b"&nbsp;", b"&a;", b"&#0;",
    b"&#xFDD0;", b"<![CDATA[", b"]]>", b"<!--", b"<!ENTITY", b"\xff", b"\xef\xb7\x90", b"\0", b"Figs. 1-9999 and 2",
    b"<sub-article>", b"<sup>2</sup>", b"<alternatives>", b"<article>", b'"',
    b"<?xml version='1.0' encoding='utf-16'?>",
]  # fmt: skip


def picture(kind: str, mode: str = "RGB", **options: object) -> bytes:
    pixels = np.random.default_rng(1).integers(0, 255, (24, 40, 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(out, kind, **options)
    return out.getvalue()


PICTURES = [
    picture("JPEG"), picture("JPEG", "CMYK"), picture("JPEG", progressive=True), picture("PNG"), picture("PNG", "P"),
    picture("TIFF"), picture("TIFF", compression="tiff_lzw"), picture("GIF", "P"), picture("WEBP"), picture("BMP"),
]  # fmt: skip


def damaged(seed: bytes, rng: random.Random, head: int) -> bytes:
    """Bytes flipped, cut, repeated or put in; half of them within the first ``head`` bytes, where formats decide."""
    data = bytearray(seed)
    for _ in range(rng.randint(1, 6)):
        at = rng.randrange(max(1, min(len(data), head) if rng.random() < 0.5 else len(data)))
        kind = rng.randrange(5)
        if kind == 0 and data:
            data[min(at, len(data) - 1)] = rng.randrange(256)
        elif kind == 1:
            del data[at : at + rng.randint(1, 40)]
        elif kind == 2:
            data[at:at] = data[at : at + rng.randint(1, 200)] * rng.randint(1, 4)
        elif kind == 3:
            data[at:at] = rng.choice(PIECES) * rng.choice((1, 1, 1, 300))
        elif rng.random() < 0.2:
            del data[at:]
    return bytes(data)


def renamed(seed: bytes, rng: random.Random) -> bytes:
    """Well-formed, and built as no article is: elements under each other's names."""
    data = seed
    for _ in range(rng.randint(1, 5)):
        one, other = rng.sample(NAMES, 2)
        data = re.sub(rb"(</?)%s(?=[ >/])" % one, rb"\1" + other, data)
    return data


def fuzz_articles(count: int) -> Counter[str]:
    rng, told = random.Random(20240607), Counter[str]()
    for _ in range(count):
        data = rng.choice(SEEDS)
        data = renamed(data, rng) if rng.random() < 0.5 else damaged(data, rng, 300)
        began = time.monotonic()
        try:
            read = jats.parse(data)
        except jats.BadArticle as error:
            assert error.reason in jats.REASONS
            told[error.reason] += 1
        else:
            told["read"] += 1
            for figure in read.figures:
                for m in figure.mentions:
                    assert 0 <= m.start <= m.end <= len(read.paragraphs[m.paragraph].text)
        assert time.monotonic() - began < SLOWEST, data
    return told


def fuzz_images(count: int) -> Counter[str]:
    rng, told = random.Random(20240608), Counter[str]()
    for _ in range(count):
        data = damaged(rng.choice(PICTURES), rng, 64)
        began = time.monotonic()
        try:
            image = images.encode(data, max_pixels=4_000_000)
        except images.BadImage as error:
            assert error.reason in images.REASONS
            told[error.reason] += 1
        else:
            told["read"] += 1
            assert Image.open(io.BytesIO(image.jpeg)).size == (image.width, image.height)
        assert time.monotonic() - began < SLOWEST, data
    return told


def test_damaged_articles() -> None:
    told = fuzz_articles(FEW)
    assert told["read"] > 50 and len(told) >= 4, told


def test_damaged_images() -> None:
    told = fuzz_images(FEW)
    assert told["read"] > 50 and len(told) >= 4, told


@pytest.mark.slow
def test_many_damaged_articles_and_images() -> None:
    assert sum(fuzz_articles(MANY).values()) + sum(fuzz_images(MANY).values()) == 10_000


def test_attacks_on_time() -> None:
    """Small files made to be slow: each within seconds."""
    for body in (
        "<p>" + "Figs. " + "1, 2 and " * 5_000 + "</p>" + BODY,
        "<p>" + "Fig. 1–50 " * 5_000 + "</p>" + BODY,
        "<p>" + xref(1) * 5_000 + "</p>" + BODY,
        "<p>" + "Figs. 1" + "A, " * 20_000 + "</p>" + BODY,
        "<list>" + "<list-item><p>" * 60 + "x" * 100_000 + "</p></list-item>" * 60 + "</list>" + BODY,
        "<p>" + "et al. " * 20_000 + "Fig " * 5_000 + " " * 50_000 + "</p>" + BODY,
        fig(1, "a", "Figure " + "A" * 100_000) + "<fig><label/>" * 60 + "</fig>" * 60,
        "".join(fig(n) for n in range(1, 3000)) + "<p>" + "Figs. 1–2999 " * 1000 + "</p>",
    ):
        began = time.monotonic()
        jats.parse(article(body.replace("&nbsp;", "")))
        assert time.monotonic() - began < 2 * SLOWEST, body[:60]
