"""132 real articles against counts and joins that others extracted: every difference is named here."""

from __future__ import annotations

import csv
import json
import os
import re
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lxml", reason="the extra longcap is not installed")

from lxml import etree
from PIL import Image

from longclip.longcap.article import Article, Figure
from longclip.longcap.images import encode, find, listing
from longclip.longcap.jats import parse
from longclip.longcap.text import collapse

HERE = Path(os.environ.get("LONGCLIP_TEST_DATA", Path(__file__).parents[3] / "shared" / "data")) / "jats"
pytestmark = pytest.mark.skipif(not HERE.is_dir(), reason=f"no articles at {HERE} (LONGCLIP_TEST_DATA names others)")


def squeezed(text: str) -> str:
    """Without what this package writes on purpose: spaces between title and panels, 10^6, [38] for a superscript."""
    return re.sub(r"\s", "", collapse(text)).replace("^", "").replace("[", "").replace("]", "")


def attached(xml: Any, figure: str) -> str:
    """What the captions of files attached to a figure add to its caption."""
    path = f"//fig[@id='{figure}']/caption//supplementary-material"
    return "".join("".join(e.itertext()) for e in xml.xpath(path))


@pytest.fixture(scope="module")
def articles() -> dict[str, Article]:
    return {str(p.relative_to(HERE)): parse(p.read_bytes()) for p in sorted(HERE.glob("with-images/*/*.nxml"))}


@pytest.fixture(scope="module")
def records() -> list[dict[str, Any]]:
    return [json.loads(line) for line in (HERE / "with-images" / "records.jsonl").read_text().splitlines()]


def test_the_records_figures_are_found_with_caption_image_and_mentions(
    articles: dict[str, Article], records: list[dict[str, Any]]
) -> None:
    """104 of 104, and no other. Differences in the text:

    - ``squeezed`` says what is written differently on purpose;
    - the caption of a data file that is attached to a figure (eLife's "source data") is not the figure's;
    - the foot of a table is no paragraph: three of elife-30274-v1 name a figure.
    """
    assert len(records) == 104 == sum(len(read.figures) for read in articles.values())
    longer, not_mentions = [], []
    trees = {file: etree.parse(HERE / file) for file in articles}
    for record in records:
        file = f"with-images/{record['xml']}"
        figures = {re.sub(r"\W", "-", figure.id): figure for figure in articles[file].figures}
        figure = figures[re.sub(r"\W", "-", record["figure_id"])]
        folder = HERE / "with-images" / Path(record["xml"]).parent

        assert figure.label == record["label"]
        assert figure.graphics == (record["xml_href"],)
        image = find(figure.graphics[0], listing(folder))
        assert image == HERE / "with-images" / record["image"]
        assert bool(figure.sub_article) == record["sub_article"]

        xml = trees[file]
        added = attached(xml, figure.id)
        longer += [record["id"]] if added else []
        assert sorted(squeezed(figure.caption + added)) == sorted(squeezed(record["caption"]))
        if not added:
            assert squeezed(figure.caption) == squeezed(record["caption"])

        ours = [squeezed(text) for text in paragraphs(articles[file], figure)]
        theirs = [squeezed(text) for text in record["mentions"]]
        assert [text for text in theirs if text in ours] == ours
        feet = {squeezed("".join(p.itertext())) for p in xml.xpath("//table-wrap-foot//p")}
        rest = [text for text in theirs if text not in ours]
        assert set(rest) <= feet
        not_mentions += [record["id"]] * len(rest)
    assert len(longer) == 11
    assert not_mentions == ["elife-30274-v1-fig2"] * 3


def paragraphs(read: Article, figure: Figure) -> list[str]:
    return list(dict.fromkeys(read.paragraphs[m.paragraph].text for m in figure.mentions if m.how == "xref"))


def test_front_matter_of_the_records(articles: dict[str, Article], records: list[dict[str, Any]]) -> None:
    """The DOI of an eLife record is its figure's; a licence of which the XML says nothing is unknown here."""
    for record in records:
        read = articles[f"with-images/{record['xml']}"]
        assert read.title == record["article_title"]
        assert read.doi == (record["doi"] or "") or record["doi"].startswith(f"{read.doi}.")
        if "license_note" in record:
            assert read.license.name == "unknown"
        else:
            assert read.license.name.replace(" ", "-").removesuffix("-1.0") == record["license"]


def test_every_image_of_the_records_is_encoded_at_the_size_it_has(records: list[dict[str, Any]]) -> None:
    """The JPEG files keep their bytes; 9 PNG files are encoded."""
    kept = 0
    for record in records:
        path = HERE / "with-images" / record["image"]
        image = encode(path)
        same = image.jpeg == path.read_bytes()
        assert same == (path.suffix == ".jpg")
        with Image.open(path) as opened:
            assert (image.width, image.height) == opened.size
        kept += same
    assert kept == 95


def test_counts_of_the_plos_articles() -> None:
    """675 captioned figures, 673 of them mentioned, article by article, and 2,565 cross-references to figures.

    A cross-reference is a mention unless it stands in a caption or a table (counted in the XML, with other code); it
    is one mention for each figure that it names.
    """
    rows = list(csv.DictReader((HERE / "plos" / "manifest.csv").open()))
    total = {"figures": 0, "mentioned": 0, "xrefs": 0}
    for row in rows:
        data = (HERE / "plos" / row["file"]).read_bytes()
        read = parse(data)
        captioned = [figure for figure in read.figures if figure.caption]
        mentioned = [figure for figure in captioned if any(m.how == "xref" for m in figure.mentions)]
        linked = sum(m.how == "xref" for figure in read.figures for m in figure.mentions)
        xml = etree.fromstring(data)
        aside = xml.xpath(
            "count(//xref[@ref-type='fig'][ancestor::caption or ancestor::table-wrap or ancestor::title"
            " or not(ancestor::p)])"
        )
        assert (len(captioned), len(mentioned)) == (int(row["n_figs"]), int(row["figs_with_mention"])), row["file"]
        assert linked + int(aside) == int(row["n_fig_xrefs"]), row["file"]
        assert read.doi == row["doi"]
        assert read.title.startswith(collapse(row["title"]))  # the manifest cuts long ones
        assert read.license.name.replace(" ", "-").startswith(row["license"].replace("public-domain", "CC0"))
        for figure in read.figures:
            for m in figure.mentions:
                words = read.paragraphs[m.paragraph].text[m.start : m.end]
                assert words == words.strip()
                assert words or m.how == "xref"
        total["figures"] += len(captioned)
        total["mentioned"] += len(mentioned)
        total["xrefs"] += linked + int(aside)
    assert total == {"figures": 675, "mentioned": 673, "xrefs": 2565}
