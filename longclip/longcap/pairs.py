"""An article's figures as pairs: the key, the caption, the long caption, and the fields that BIOMEDICA's samples have.

Fields are those of BIOMEDICA (arXiv 2501.07171) under their names. What needs a classifier (image_cluster_id,
image_panel_type, image_*_label) is absent rather than invented. Three differ in form: ``article_date`` is ISO 8601,
``article_license`` is a name such as "CC BY 4.0", and ``image_hash`` is the perceptual hash that duplicates were found
by. Beyond them:

    long_caption            the caption and what the article says of the figure, within the token budget
    long_caption_sentences  [{text, source}]: the same, sentence by sentence, with where each stands
    image_figure_id         id, label and title of the figure; a figure of several graphics gives several pairs
    image_label
    image_title
    article_doi, article_pmid
    license_url, license_source
                            a figure's own licence where that is stricter than the article's, from which the text is:
                            then the source is "figure link", "figure attribute" or "figure prose"
"""

from __future__ import annotations

import hashlib
import re
from typing import Any

from longclip.longcap.article import Article, Figure, License
from longclip.longcap.context import Description
from longclip.longcap.images import EncodedImage
from longclip.longcap.license import stricter

_LONGEST_NAME = 60


def key_of(article: Article, place: str, figure: Figure, graphic: int) -> str:
    """``PMC123_fig2_0``: a tar member's name for any article, figure and graphic, and another for any other."""
    return f"{plain(article.pmcid or article.doi.lower() or place)}_{plain(figure.id)}_{graphic}"


def plain(name: str) -> str:
    """``name`` in letters, digits and hyphens; with a piece of its hash where that has changed it, so that what
    differs stays different."""
    safe = re.sub(r"[^A-Za-z0-9-]+", "-", name).strip("-")[:_LONGEST_NAME]
    if safe == name:
        return name
    return f"{safe}-{hashlib.sha256(name.encode(errors='surrogateescape')).hexdigest()[:10]}".lstrip("-")


def article_fields(article: Article) -> dict[str, Any]:
    """The fields that all pairs of an article share."""
    return {
        "article_accession_id": article.pmcid,
        "article_doi": article.doi,
        "article_pmid": article.pmid,
        "article_title": article.title,
        "article_journal": article.journal,
        "article_date": article.date,
        "article_abstract": "\n".join(article.abstract),
        "article_mesh_terms": list(article.mesh_terms),
        "article_keywords": list(article.keywords),
        "article_reference_ids": list(article.references),
        "article_reference_count": str(len(article.references)),
        "article_subject": list(article.subjects),
        "article_citation": article.citation,
        "article_license": article.license.name,
        "license_url": article.license.url,
        "license_source": article.license.source,
        "article_text": "\n".join(paragraph.text for paragraph in article.paragraphs),
    }


def license_of(article: Article, figure: Figure) -> License:
    """Of a pair: the stricter one of the figure's own and the article's, for the caption is the article's text."""
    return article.license if figure.license is None else stricter(figure.license, article.license)


def figure_fields(article: Article, figure: Figure, description: Description) -> dict[str, Any]:
    """The fields that all graphics of a figure share; a licence is among them where it is the figure's own."""
    cited = dict.fromkeys(article.paragraphs[mention.paragraph].text for mention in figure.mentions)
    license = license_of(article, figure)
    own = {
        "article_license": license.name,
        "license_url": license.url,
        "license_source": f"figure {license.source}",
    }
    return {
        **(own if license is figure.license else {}),
        "image_figure_id": figure.id,
        "image_label": figure.label,
        "image_title": figure.title,
        "image_set": {figure.id: list(figure.graphics)},
        "image_context": {figure.id: list(cited)},
        "long_caption": description.text,
        "long_caption_sentences": [{"text": s.text, "source": s.source} for s in description.sentences],
    }


def image_fields(name: str, image: EncodedImage) -> dict[str, Any]:
    return {"image_file_name": name, "image_size": [image.width, image.height], "image_hash": f"{image.phash:016x}"}
