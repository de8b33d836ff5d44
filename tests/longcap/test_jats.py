"""What an article says, whatever its markup looks like; and which refusal an unreadable file gets."""

from __future__ import annotations

import time
import tracemalloc

import pytest

pytest.importorskip("lxml", reason="the extra longcap is not installed")

from longclip.longcap.article import Article, Figure
from longclip.longcap.jats import REASONS, BadArticle, parse
from tests.longcap.articles import article, fig, xref

FIVE = "".join(fig(n) for n in range(1, 6))


def told(read: Article, figure: str) -> list[tuple[str, str]]:
    """(words, how) of each mention of one figure."""
    (found,) = [f for f in read.figures if f.id == figure]
    return [(read.paragraphs[m.paragraph].text[m.start : m.end], m.how) for m in found.mentions]


def only(data: bytes) -> Figure:
    (figure,) = parse(data).figures
    return figure


# Figures


def test_a_caption_is_title_and_panels_with_spaces_between() -> None:
    figure = only(
        article(
            '<fig id="f1"><label>Figure 1</label><caption><title>Cells.</title><p>(A) One.</p><p>(B) Two:<list>'
            "<list-item><p>left</p></list-item><list-item><p>right</p></list-item></list>end.</p></caption>"
            '<graphic xlink:href="f1"/></fig>'
        )
    )
    assert (figure.title, figure.caption) == ("Cells.", "Cells. (A) One. (B) Two: left right end.")


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ("20 × 10<sup>6</sup> cells, p = 10<sup>−5</sup>", "20 × 10^6 cells, p = 10^−5"),
        ("m<sup>2</sup>, Ca<sup>2+</sup>, CO<sub>2</sub>, <italic>IL</italic>-6", "m2, Ca2+, CO2, IL-6"),
        ('as seen before<sup><xref ref-type="bibr" rid="b1">38</xref></sup>.', "as seen before[38]."),
        ('as seen before<xref ref-type="bibr" rid="b1"><sup>38</sup></xref>.', "as seen before[38]."),
        (
            "<inline-formula><alternatives><tex-math>\\documentclass{minimal}\\begin{document}$$x^2$$\\end{document}"
            "</tex-math><mml:math><mml:msup><mml:mi>x</mml:mi><mml:mn>2</mml:mn></mml:msup></mml:math>"
            "</alternatives></inline-formula> is small",
            "x2 is small",
        ),
        (
            "<inline-formula><tex-math>\\usepackage{amsmath}\\begin{document}$x=1$\\end{document}</tex-math>"
            "</inline-formula>.",
            "x=1 .",
        ),
        (
            "<mml:math><mml:msup><mml:mn>10</mml:mn><mml:mn>6</mml:mn></mml:msup><mml:mfrac><mml:mn>1</mml:mn>"
            "<mml:mn>2</mml:mn></mml:mfrac></mml:math>",
            "10^61/2",
        ),
        ("细胞 (Zellen,\n\tклетки)\u2003次", "细胞 (Zellen, клетки) 次"),
        ("micro\u00adscopy<break/>of <!-- no --><?pi no?><![CDATA[A<B]]>", "microscopy of A<B"),
    ],
)
def test_marked_up_text_reads_as_the_page_does(written: str, read: str) -> None:
    assert only(article(fig(1, written))).caption == read


def test_several_graphics_stay_one_figure_and_alternatives_are_one_graphic() -> None:
    body = (
        '<fig id="f1"><label>Figure 1</label><caption><p>Two pages <inline-formula><alternatives>'
        '<graphic xlink:href="formula.gif"/></alternatives></inline-formula></p></caption>'
        '<alternatives><graphic xlink:href="p1.svg"/><graphic specific-use="thumbnail" xlink:href="p1_s.jpg"/>'
        '<graphic xlink:href="p1.tif"/></alternatives><graphic xlink:href="p2"/><graphic xlink:href="p2"/>'
        '<media mimetype="video" xlink:href="film.mp4"/></fig>'
    )
    assert only(article(body)).graphics == ("p1.tif", "p2")


def test_a_href_is_found_under_any_prefix() -> None:
    body = '<fig id="f1"><label>1</label><graphic xmlns:x="http://www.w3.org/1999/xlink" x:href="a.jpg"/></fig>'
    assert only(article(body)).graphics == ("a.jpg",)
    assert only(article('<fig id="f1"><label>1</label><graphic href="a.jpg"/></fig>')).graphics == ("a.jpg",)


def test_figures_in_groups_share_label_and_caption_and_the_groups_mention() -> None:
    body = (
        '<fig-group id="g"><label>Figure 2</label><caption><title>All cells.</title></caption>'
        '<fig id="a"><caption><p>Left.</p></caption><graphic xlink:href="a"/></fig>'
        '<fig id="b"><graphic xlink:href="b"/></fig></fig-group>'
        '<p>See <xref ref-type="fig" rid="g">Fig. 2</xref>; Figure 2 again.</p>'
    )
    read = parse(article(body))
    assert [(f.id, f.label, f.group, f.caption) for f in read.figures] == [
        ("a", "Figure 2", "Figure 2", "All cells. Left."),
        ("b", "Figure 2", "Figure 2", "All cells."),
    ]
    assert told(read, "a") == told(read, "b") == [("Fig. 2", "xref"), ("Figure 2", "text")]


def test_a_figure_needs_no_id_and_no_label_and_may_lie_anywhere() -> None:
    bare = '<fig><caption><p>{}</p></caption><graphic xlink:href="x"/></fig>'
    body = (
        f"<p>Before {bare.format('in a paragraph')} after.</p><disp-quote><p>quoted</p>{bare.format('in a quote')}"
        f"</disp-quote><boxed-text><caption><title>Box</title></caption>{bare.format('boxed')}<p>in a box</p>"
        "</boxed-text>"
        '<fig id="same"><caption><p>one</p></caption></fig><fig id="same"><caption><p>two</p></caption></fig>'
        '<fig id="nothing"><label>Figure 9</label></fig>'
    )
    read = parse(
        article(body).replace(b"</back>", f"</back><floats-group>{bare.format('floats')}</floats-group>".encode())
    )
    assert [f.caption for f in read.figures] == ["in a paragraph", "in a quote", "boxed", "one", "two", "floats"]
    assert len({f.id for f in read.figures}) == 6
    assert [p.text for p in read.paragraphs] == ["Before after.", "quoted", "in a box"]


def test_a_label_within_the_caption_is_the_label() -> None:
    figure = only(article('<fig id="f1"><caption><p><label>Fig. 1</label> Cells.</p></caption></fig>'))
    assert (figure.label, figure.caption) == ("Fig. 1", "Cells.")


def test_a_sub_article_has_figures_of_its_own() -> None:
    sub = (
        '<sub-article id="SA1"><front-stub><title-group><article-title>Reply</article-title></title-group></front-stub>'
        f"<body>{fig('r1', 'Ours.', 'Figure 1.')}<p>Figure 1 here, Figure 2 there.</p></body></sub-article>"
    )
    read = parse(article(FIVE).replace(b"</back>", b"</back>" + sub.encode()))
    assert read.title == "On cells"
    assert [f.sub_article for f in read.figures] == [""] * 5 + ["SA1"]
    assert (told(read, "fr1"), told(read, "f1"), told(read, "f2")) == (
        [("Figure 1", "text")],
        [],
        [("Figure 2", "text")],
    )


# Mentions


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (f"See {xref(2)}.", {2: [("Figure 2", "xref")]}),
        (
            'See <xref ref-type="fig" rid="f1 f3, f4">Figures 1, 3, 4</xref>.',
            {n: [("Figures 1, 3, 4", "xref")] for n in (1, 3, 4)},
        ),
        (
            f"(Figs. {xref(2, '2')}–{xref(4, '4')})",
            {2: [("2", "xref")], 3: [("2–4", "range")], 4: [("4", "xref")]},
        ),
        (
            f"({xref(2, 'Fig. 2')} to {xref(4, 'Fig. 4')})",
            {2: [("Fig. 2", "xref")], 3: [("Fig. 2 to Fig. 4", "range")], 4: [("Fig. 4", "xref")]},
        ),
        (
            f"{xref(3, 'Figures 3 to 5')}",
            {3: [("Figures 3 to 5", "xref")], 4: [("Figures 3 to 5", "range")], 5: [("Figures 3 to 5", "range")]},
        ),
        ("as in Figs. 2–4.", {n: [("Figs. 2–4", "range")] for n in (2, 3, 4)}),
        ("as in Figure 3A, 20 mice", {3: [("Figure 3A", "text")]}),
        ("as in FIG. 3 (b) and fig 4c.", {3: [("FIG. 3", "text")], 4: [("fig 4c", "text")]}),
        ("Figs 1A–C, 2 and 4b", {1: [("Figs 1A–C", "text")], 2: [("2", "text")], 4: [("4b", "text")]}),
        ("in Figure 1, 2 mM and Figure 5 to 6 cells", {1: [("Figure 1", "text")], 5: [("Figure 5", "text")]}),
        (
            "Figure 2 of ref. 12; Fig. 3 in Smith et al.; [17, Figure 4]; Supplementary Figure 1; Figure S2; Config 3",
            {},
        ),
        ("Kohn, 2014, p. 345–357, pl. 97, Figs. 1–3", {}),
        (f"Kohn, 2014, pl. 97, Figs. {xref(1, '1')}–{xref(3, '3')}", {1: [("1", "xref")], 3: [("3", "xref")]}),
        ("Kohn 1899a, Figs. 1–3; (Kohn 2004, Fig. 4)", {}),
        (
            "more (p &lt; 0.0001, Fig. 3) in all (n = 1000, Fig. 4) or most (n = 2000, Fig. 5)",
            {3: [("Fig. 3", "text")], 4: [("Fig. 4", "text")], 5: [("Fig. 5", "text")]},
        ),
        (
            "AS FIGURES 2 AND 3 SHOW, AND FIGURES 4 TO 5",
            {
                2: [("FIGURES 2", "text")],
                3: [("3", "text")],
                4: [("FIGURES 4 TO 5", "range")],
                5: [("FIGURES 4 TO 5", "range")],
            },
        ),
        (
            "in Figs 1(a) and 2(b), Figs. 3(a,c)–5 (not its b)",
            {
                1: [("Figs 1(a)", "text")],
                2: [("2(b)", "text")],
                3: [("Figs. 3(a,c)–5", "range")],
                4: [("Figs. 3(a,c)–5", "range")],
                5: [("Figs. 3(a,c)–5", "range")],
            },
        ),
        ("in fig1data.txt and Figure 1—source data 1", {}),
        ('See <xref ref-type="fig" rid="gone">Fig. 2</xref>.', {2: [("Fig. 2", "text")]}),
        (
            '<italic>See <xref ref-type="fig" rid="f1"> <bold>Fig.\n1</bold> </xref> </italic> now',
            {1: [("Fig. 1", "xref")]},
        ),
        ('empty <xref ref-type="fig" rid="f1"/>', {1: [("", "xref")]}),
        ("如图2所示, Abbildung 3", {}),
    ],
)
def test_mentions(text: str, expected: dict[int, list[tuple[str, str]]]) -> None:
    read = parse(article(f"<sec><title>Results</title><p>{text}</p></sec>{FIVE}"))
    assert {n: told(read, f"f{n}") for n in range(1, 6) if told(read, f"f{n}")} == expected


RANGES = "Figs. 1–50, "
LINK = '<xref ref-type="fig" rid="{}"/>'.format(" ".join(f"f{n}" for n in range(1, 51)))


@pytest.mark.parametrize(
    "body",
    [
        f"<p>{RANGES * 20_000}</p>",
        f"<p>{RANGES}</p>" * 20_000,
        f"<p>{LINK * 2000}</p>",
        f"<p>{xref(1)}–{xref(50)} </p>" * 4000,
    ],
    ids=["words", "paragraphs", "links", "ranges"],
)
def test_ranges_said_over_and_over_take_no_memory_to_speak_of(body: str) -> None:
    data = article("".join(fig(n) for n in range(1, 51)) + f"<p>First {xref(7)}.</p>" + body)
    tracemalloc.start()
    read = parse(data)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 60e6
    assert told(read, "f7")[0] == ("Figure 7", "xref") and all(len(f.mentions) > 10 for f in read.figures)


def test_a_label_of_its_own_for_every_figure_is_not_looked_for_one_by_one() -> None:
    figures = "".join(fig(n, label=f"head{'abcdefghij'[n % 10]}{'x' * (n // 10)} {n}") for n in range(3000))
    data = article(f"{figures}<p>{'As heada 0 shows, so it is. ' * 30_000}</p>")
    read = parse(data)
    assert told(read, "f0")[0] == ("heada 0", "text")


def test_labels_other_than_figure() -> None:
    labels = {
        1: "Scheme 1",
        2: "Supplementary Fig. 2",
        3: "Extended Data Figure 1",
        4: "图3",
        5: "Figure 7—figure supplement 1.",
    }
    text = (
        "Scheme 1, Schemes 1 and 9; Figure S2, Suppl. Fig. 2; Extended Data Fig. 1; 如图3所示; "
        "Figure 7—figure supplement 1B; Figure 1; Figure 2; Figure 7"
    )
    read = parse(article("".join(fig(n, "x", label) for n, label in labels.items()) + f"<p>{text}</p>"))
    assert {n: [words for words, _ in told(read, f"f{n}")] for n in labels} == {
        1: ["Scheme 1", "Schemes 1"],
        2: ["Figure S2", "Suppl. Fig. 2"],
        3: ["Extended Data Fig. 1"],
        4: ["图3"],
        5: ["Figure 7—figure supplement 1B"],
    }


def test_a_mention_in_a_caption_is_none_and_in_a_footnote_is_one() -> None:
    body = fig(1) + fig(2, f"As in {xref(1)}.") + f"<p>Text.<fn><p>See {xref(1)}.</p></fn> More.</p>"
    table = f"<table-wrap><caption><p>{xref(1)}</p></caption></table-wrap>"
    read = parse(article(body + table))
    assert [p.text for p in read.paragraphs] == ["Text. More.", "See Figure 1."]
    assert [(m.paragraph, m.start, m.end, m.how) for m in read.figures[0].mentions] == [(1, 4, 12, "xref")]


def test_sections_are_named_around_a_paragraph() -> None:
    body = "<p>Top.</p><sec><title>Methods</title><p>One.</p><sec><title>Mice</title><p>Two.</p></sec></sec>"
    read = parse(article(body))
    assert [(p.text, p.section) for p in read.paragraphs] == [
        ("Top.", ""),
        ("One.", "Methods"),
        ("Two.", "Methods / Mice"),
    ]


# Front matter


def test_front_matter_and_references() -> None:
    front = """<front><journal-meta><journal-title-group><journal-title>PLOS ONE</journal-title></journal-title-group>
      </journal-meta><article-meta><article-id pub-id-type="pmid">123</article-id>
      <article-id pub-id-type="pmc">456</article-id><article-id pub-id-type="doi">https://doi.org/10.1371/x.1</article-id>
      <article-categories><subj-group><subject>Research</subject><subj-group><subject>Biology</subject></subj-group>
      </subj-group></article-categories>
      <title-group><article-title>On <italic>cells</italic><xref ref-type="fn" rid="n">*</xref></article-title>
      </title-group><contrib-group><contrib contrib-type="author"><name><surname>Doe</surname>
      <given-names>Jane M.</given-names></name></contrib>
      <contrib contrib-type="editor"><name><surname>Ed</surname></name></contrib>
      <contrib contrib-type="author"><collab>The Group</collab></contrib></contrib-group>
      <pub-date pub-type="collection"><year>2019</year></pub-date>
      <pub-date pub-type="epub"><day>7</day><month>May</month><year>2019</year></pub-date>
      <pub-date pub-type="pmc-release"><day>1</day><month>1</month><year>2018</year></pub-date>
      <volume>14</volume><issue>3</issue><elocation-id>e01</elocation-id>
      <abstract abstract-type="graphical"><p>No.</p></abstract>
      <abstract><sec><title>Aim</title><p>To see.</p></sec><sec><title>End</title><p>Seen.</p></sec></abstract>
      <kwd-group><kwd>cell</kwd></kwd-group><kwd-group kwd-group-type="MeSH"><kwd>Humans</kwd></kwd-group>
      <kwd-group kwd-group-type="abbreviations"><kwd>CM, malaria</kwd></kwd-group></article-meta></front>"""
    back = """<ref-list><ref><element-citation><pub-id pub-id-type="doi">10.1/a</pub-id>
      <pub-id pub-id-type="pmid">9</pub-id></element-citation></ref><ref><mixed-citation>none</mixed-citation></ref>
      <ref><mixed-citation><ext-link xlink:href="https://doi.org/10.1234/b">b</ext-link></mixed-citation></ref></ref-list>"""
    read = parse(article("<p>Text.</p>", front, back))
    assert (read.pmcid, read.pmid, read.doi) == ("PMC456", "123", "10.1371/x.1")
    assert (read.title, read.journal, read.date) == ("On cells", "PLOS ONE", "2019-05-07")
    assert (read.abstract, read.keywords, read.mesh_terms) == (("To see.", "Seen."), ("cell",), ("Humans",))
    assert read.subjects == ("Research", "Biology")
    assert read.citation == "Doe JM, The Group. On cells. PLOS ONE. 2019;14(3):e01. doi:10.1371/x.1"
    assert read.references == ("pmid:9", "doi:10.1234/b")


CC = "http://creativecommons.org"
BY = f"{CC}/licenses/by/4.0/"
WAIVER = f'<ext-link xlink:href="{CC}/publicdomain/zero/1.0/">waiver for data</ext-link>'


def link(url: str) -> str:
    return f'<license-p>Open (<ext-link xlink:href="{url}">here</ext-link>).</license-p>'


def terms(prose: str) -> str:
    return f"<license><p>Distributed under {prose}.</p></license>"


@pytest.mark.parametrize(
    ("permissions", "name", "source"),
    [
        (f'<license xlink:href="{BY}"><license-p>Open.</license-p></license>', "CC BY 4.0", "link"),
        (
            f"<license><ali:license_ref>{CC}/licenses/by-nc-nd/4.0/</ali:license_ref></license>",
            "CC BY-NC-ND 4.0",
            "link",
        ),
        (
            f'<license license-type="open-access">{link(CC + "/licenses/by-nc/3.0/us/")}</license>',
            "CC BY-NC 3.0",
            "link",
        ),
        (f"<license>{link(BY)}<license-p>A {WAIVER}</license-p></license>", "CC BY 4.0", "link"),
        (f'<license xlink:href="{CC}/publicdomain/zero/1.0/"/>', "CC0 1.0", "link"),
        ('<license license-type="cc-by-nc-sa"><license-p>Some.</license-p></license>', "CC BY-NC-SA", "attribute"),
        ('<license license-type="ccbyncnd"><license-p>Some.</license-p></license>', "CC BY-NC-ND", "attribute"),
        ('<license license-type="CC-BYNCND"><license-p>Some.</license-p></license>', "CC BY-NC-ND", "attribute"),
        (terms("CC-BYNC 4.0"), "CC BY-NC 4.0", "prose"),
        (terms("CC BY sample terms"), "CC BY", "prose"),
        (terms("a Creative Commons Attribution Licence. No commercial use is permitted"), "CC BY-NC", "prose"),
        (terms("a Creative Commons Attribution Licence. It may not be used for commercial ends"), "CC BY-NC", "prose"),
        (terms("the Creative Commons Attribution License, which permits unrestricted use"), "CC BY", "prose"),
        (terms("a Creative Commons Attribution-Non Commercial-No Derivs 3.0 licence"), "CC BY-NC-ND 3.0", "prose"),
        (terms("the Creative Commons Attribution License, which permits non-commercial use"), "CC BY-NC", "prose"),
        (terms(f"the terms at {CC}/licenses/by-sa/2.0"), "CC BY-SA 2.0", "prose"),
        (terms("the Creative Commons Public Domain Declaration"), "CC0", "prose"),
        ("<copyright-statement>Doe. Distributed under CC BY 4.0</copyright-statement>", "CC BY 4.0", "prose"),
        (terms("our terms: all rights reserved, free to read"), "other", "prose"),
        ("<copyright-statement>© 2015 Doe</copyright-statement>", "unknown", "none"),
        ("", "unknown", "none"),
    ],
)
def test_license(permissions: str, name: str, source: str) -> None:
    """The article's own: a sub-article's licence says nothing of it."""
    front = f"<front><article-meta><permissions>{permissions}</permissions></article-meta></front>"
    sub = f'<sub-article><front-stub><permissions><license xlink:href="{BY}"/></permissions></front-stub></sub-article>'
    read = parse(article("<p>Text.</p>", front).replace(b"</article>", sub.encode() + b"</article>"))
    assert (read.license.name, read.license.source) == (name, source)


@pytest.mark.parametrize(
    ("said", "own"),
    [
        ("", None),
        ("<permissions><copyright-statement>© 2015 Doe</copyright-statement></permissions>", None),
        ("<attrib>Photograph: J. Doe</attrib>", None),
        (f'<permissions><license xlink:href="{CC}/licenses/by-nc/4.0/"/></permissions>', ("CC BY-NC 4.0", "link")),
        (f"<permissions>{terms('the terms of the publisher')}</permissions>", ("other", "prose")),
        (f"<permissions>{terms('CC BY-SA 3.0')}</permissions>", ("CC BY-SA 3.0", "prose")),
        ("<attrib>J. Doe, Wikimedia (CC BY-SA 3.0)</attrib>", ("CC BY-SA 3.0", "prose")),
        ("<attrib>Reproduced with permission from Elsevier [12].</attrib>", ("unknown", "prose")),
        (
            "<permissions><copyright-statement>Reprinted by kind permission of the Louvre</copyright-statement>"
            "</permissions>",
            ("unknown", "prose"),
        ),
        (
            "<permissions><copyright-statement>© 2015 Wiley. All rights reserved.</copyright-statement></permissions>",
            ("unknown", "prose"),
        ),
        (
            f"<permissions><copyright-statement>With permission from Doe</copyright-statement>"
            f'<license xlink:href="{BY}"/></permissions>',
            ("CC BY 4.0", "link"),
        ),
    ],
)
def test_a_figure_may_have_a_licence_of_its_own(said: str, own: tuple[str, str] | None) -> None:
    figure = fig(1).replace("<graphic", f"{said}<graphic")
    in_group = f'<fig-group id="g"><caption><p>All.</p></caption>{said}{fig(1)}</fig-group>'
    inside = fig(1).replace('.jpg"/>', f'.jpg">{said}</graphic>')
    for body in (figure, inside, in_group):
        license = only(article(body)).license
        assert (license and (license.name, license.source)) == own
        assert only(article(body)).caption in ("Cells.", "All. Cells.")


# Markup that came through other hands


def test_other_wrappings_of_the_same_article_read_the_same() -> None:
    plain = article(fig(1, "Größe 5 µm") + f"<p>{xref(1)}</p>")
    expected = parse(plain)
    text = plain.decode()
    namespace = text.replace("<article ", '<article xmlns="https://jats.nlm.nih.gov/ns/archiving/1.3/" ', 1)
    doctype = '<!DOCTYPE article PUBLIC "-//NLM//DTD JATS v1.2//EN" "http://192.0.2.1/JATS.dtd">'
    for data in (
        doctype.encode() + plain,
        b"\xef\xbb\xbf" + plain,
        ('<?xml version="1.0" encoding="UTF-16"?>' + text).encode("utf-16"),
        ('<?xml version="1.0" encoding="UTF-16"?>' + text).encode("utf-16-le"),  # no byte-order mark
        text.encode("utf-16-be"),
        text.encode("utf-32-le"),
        ('<?xml version="1.0" encoding="ISO-8859-1"?>' + text).encode("latin-1"),
        ('<?xml version="1.0" encoding="ISO-8859-1"?>' + text).encode(),  # says Latin-1, is UTF-8
        namespace.encode(),
        f'<OAI-PMH xmlns="http://www.openarchives.org/OAI/2.0/"><metadata>{namespace}</metadata></OAI-PMH>'.encode(),
        f"<pmc-articleset>{text}</pmc-articleset>".encode(),
    ):
        assert parse(data) == expected


@pytest.mark.parametrize(
    "doctype", ["", '<!DOCTYPE article SYSTEM "JATS.dtd">', "<!DOCTYPE article [<!ENTITY nbsp '&#160;'>]>"]
)
def test_an_undefined_entity_loses_neither_article_nor_text(doctype: str) -> None:
    data = doctype.encode() + article(fig(1, "5&nbsp;&micro;m &lt; 6 &AMP; &foo; &hellip;"))
    assert only(data).caption == "5 µm < 6 & &foo; …"


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16", "utf-16-le", "utf-16-be", "utf-32-be"])
def test_entities_are_seen_in_any_encoding(encoding: str) -> None:
    assert only(article(fig(1, "5&nbsp;&micro;m &foo;")).decode().encode(encoding)).caption == "5 µm &foo;"
    with pytest.raises(BadArticle, match="entity expansion"):
        parse((BOMB + "]>" + article("<p>&i;</p>").decode()).encode(encoding))


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ("<![CDATA[&alpha; &foo; <b>]]> &alpha;", "&alpha; &foo; <b> α"),
        ("<!-- <![CDATA[ -->&alpha;<!-- ]]> -->", "α"),
        ("<![CDATA[<!--]]>&alpha;", "<!--α"),
    ],
)
def test_what_cdata_says_is_meant_to_the_letter(written: str, read: str) -> None:
    assert only(article(fig(1, written))).caption == read


BOMB = "<!DOCTYPE article [<!ENTITY a 'ha'>" + "".join(
    f"<!ENTITY {b} '{f'&{a};' * 10}'>" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)
GOOD = article(FIVE + f"<p>{xref(1)}</p>")


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty"),
        (b" \n", "empty"),
        (b"<article/>", "empty"),
        (article("", front=""), "empty"),
        (b"hello", "not XML"),
        (GOOD[:-300], "truncated"),
        (GOOD[:40], "truncated"),
        (article("<p>Größe</p>").decode().encode("latin-1"), "wrong encoding"),
        (b'<?xml version="1.0" encoding="x-none"?>' + article("<p>Gr</p>") + b"<!--\xff-->", "wrong encoding"),
        (b"\xff\xfe" + b"<\0a\0r", "wrong encoding"),
        (BOMB.encode() + b"]>" + article("<p>&i;</p>"), "entity expansion"),
        (b'<!DOCTYPE article [<!ENTITY x SYSTEM "file:///etc/passwd">]>' + article("<p>&x;</p>"), "entity expansion"),
        (b'<!DOCTYPE article [<!ENTITY % x SYSTEM "file:///etc/passwd"> %x;]>' + GOOD, "entity expansion"),
        (b"<html><body>404</body></html>", "no article"),
        (b"<pmc-articleset>" + GOOD + GOOD + b"</pmc-articleset>", "several articles"),
        (b"<article>" + b"<sec>" * 100_000, "too deep"),
        (b"<article><body>" + b"<p>" * 5000 + b"x" + b"</p>" * 5000 + b"</body></article>", "too deep"),
    ],
)
def test_an_unreadable_file_is_refused_by_name(data: bytes, reason: str) -> None:
    began = time.monotonic()
    with pytest.raises(BadArticle) as refused:
        parse(data)
    assert refused.value.reason == reason and reason in REASONS
    assert time.monotonic() - began < 10


def test_an_entity_that_is_declared_and_never_used_costs_nothing() -> None:
    assert parse(BOMB.encode() + b"]>" + GOOD) == parse(GOOD)
