"""Sentences of scientific English, and the abbreviations that a text defines."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longclip.data.sentences import abbreviations, sentences

PLOS = Path(os.environ.get("LONGCLIP_TEST_DATA", Path(__file__).parents[3] / "shared" / "data")) / "jats" / "plos"


def split(text: str) -> list[str]:
    return [text[start:end] for start, end in sentences(text)]


@pytest.mark.parametrize(
    "text",
    [
        "Cells were stained (Fig. 2A). | Nuclei appear blue.",
        "As shown in Fig. 2 and Figs. 3–5, growth stopped. | See Suppl. Fig. 1 for controls.",
        "Smith et al. found no effect. | Jones et al. (2003) did.",
        "This was reported by Smith et al. | We confirm it.",
        "Mice received 5 mg/kg i.v. Dexamethasone or i.p. Saline, e.g. Controls, vs. Placebo.",
        "S. aureus and E. coli were grown. | C. elegans was not.",
        "Dr. J. R. Miller read the slides. | Prof. Li did so again.",
        "The slope was 0.75 (P < 0.05). | It rose by 3.5 mm.",
        "Tumours shrank in most mice. [12,13] | Survival rose [14]. | Weight did not.",
        "Tumours shrank in most mice.12,13 | Survival rose.14–16 | Weight did not.",
        "Levels fell by half. | p53 was unchanged. | mRNA was not measured. | β-actin served as control.",
        "Does it matter? | It does! | (A) Before. | (B) After.",
        "“Pain is what the patient says.” | This view is old.",
        "Binding was weak (see Fig. 3. Data not shown) in all lines. | It grew later.",
        "1. Methods of staining | ",
        "He took vitamin C. | The dose was low.",
        "It was stored at 4 °C. | Then it was thawed.",
        "Kits came from Abcam Inc. and Roche Ltd. in Basel. | Antibodies did not.",
        "Growth follows y = ax. (12)",
        "It was done at approx. 5 p.m. on day 3, i.e. late. | No. 4 was lost.",
    ],
)
def test_boundaries(text: str) -> None:
    assert split(text.replace("| ", "")) == [part.strip() for part in text.split("|") if part.strip()]


@settings(deadline=None)
@given(st.text(alphabet="aA.?!)([] 12,;\u201d\nβ-", max_size=60))
def test_no_character_is_lost_or_told_twice(text: str) -> None:
    spans = sentences(text)
    assert "".join("".join(text[a:b].split()) for a, b in spans) == "".join(text.split())
    ends = [place for span in spans for place in span]
    assert ends == sorted(ends) and all(a < b for a, b in spans)
    assert all(text[a:b] == text[a:b].strip() for a, b in spans)


def test_a_long_text_without_boundaries_takes_no_time() -> None:
    """Hostile input: a rule that looks back over the whole text at each full stop would take hours."""
    assert len(sentences("Fig. " * 100_000)) == 1
    assert len(sentences("(" * 100_000 + "a. B" + ")" * 100_000)) >= 1
    assert list(abbreviations("(A" * 50_000 + "AB (" * 50_000)) == []


@pytest.mark.skipif(not PLOS.is_dir(), reason=f"no articles at {PLOS} (LONGCLIP_TEST_DATA names others)")
def test_real_articles_are_not_cut_where_a_figure_is_named() -> None:
    """A cross-reference that the publisher tagged never straddles two sentences, and what ends in a full stop before
    one ("Fig.", "et al.") never ends a sentence there."""
    from lxml import etree

    references = cut = total = 0
    for file in sorted(PLOS.glob("*.nxml"))[::4]:
        tree = etree.parse(str(file), etree.XMLParser(resolve_entities=False, no_network=True, recover=True))
        for paragraph in tree.iterfind(".//body//p"):
            for reference in paragraph.iterfind("./xref[@ref-type='fig']"):
                # a mark that can be found again, in place of the reference's own text
                reference.text = "Fig. ❖ ❖" + re.sub(r"\D", "", "".join(reference.itertext()))
            parts = split(" ".join("".join(paragraph.itertext()).split()))
            total += len(parts)
            references += sum(part.count("❖ ❖") for part in parts)
            cut += sum(part.count("❖") % 2 for part in parts)
            cut += sum(part.endswith(("Fig.", "e.g.", "i.e.", "vs.")) for part in parts[:-1])
    assert (references > 400, total > 5000, cut) == (True, True, 0)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("seen by optical coherence tomography (OCT) in all", [("OCT", "optical coherence tomography")]),
        ("The retinal nerve fibre layer (RNFL; n = 4)", [("RNFL", "retinal nerve fibre layer")]),
        ("MRI (magnetic resonance imaging) was used", [("MRI", "magnetic resonance imaging")]),
        ("Myalgic encephalomyelitis (ME), rare", [("ME", "Myalgic encephalomyelitis")]),
        ("of the vascular endothelial growth factor receptor 2 (VEGFR2)", [
            ("VEGFR2", "vascular endothelial growth factor receptor 2")
        ]),
        ("Dendritic cells (DCs) and brain–computer interfaces (BCIs)", [
            ("DCs", "Dendritic cells"), ("BCIs", "brain–computer interfaces")
        ]),
        ("heat shock protein (HSP) and heat shock factor [HSF]", [("HSP", "heat shock protein")]),
        ("in the left eye (left), at rest (n = 5), (P < 0.01), (A–C), (Fig. 2), see (2003)", []),
        ("cells were counted (XQZ)", []),
        ("tumour necrosis. It was found (TNI)", []),
    ],
)  # fmt: skip
def test_abbreviations(text: str, found: list[tuple[str, str]]) -> None:
    assert [(short, long) for short, long, _ in abbreviations(text)] == found
