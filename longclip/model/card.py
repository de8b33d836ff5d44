"""The model card of an export: what was trained on what, how well it does, and how to use it. Only what is known."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from longclip.data.order import evenly
from longclip.data.shards import Dataset

LICENSES = ("license", "article_license")
"""fields of a sample's JSON member that say its licence; the second is BIOMEDICA's"""
COUNTED = 2000
"""training pairs whose licence is looked up, evenly over the dataset"""


def licenses(dataset: Dataset) -> tuple[Counter[str], int]:
    """What the training pairs say of their licence, and how many pairs were asked."""
    places = evenly(dataset.sizes, COUNTED)
    found: Counter[str] = Counter()
    for place in places:
        _, _, fields = dataset.fields_and_text(*place)
        found[next((str(fields[key]) for key in LICENSES if fields.get(key)), "not stated")] += 1
    return found, len(places)


def card(facts: Mapping[str, Any], recipe: str, notes: list[str]) -> str:
    """README.md of the folder. ``facts``: run, checkpoint, samples, model, data, licenses, validation, test."""
    lines = [
        "---",
        "license: unknown",
        "pipeline_tag: zero-shot-image-classification",
        "---",
        "",
        f"# {facts['run']}",
        "",
    ]
    seen = f"checkpoint `{facts['checkpoint']}`, {facts['samples']:,} pairs seen"
    lines += [f"Image-text model of run `{facts['run']}`, {seen}.", ""]
    lines += ["| model | |", "|---|---|", *(f"| {key} | {value} |" for key, value in facts["model"].items()), ""]
    lines += ["## Use", "", "```python", recipe.rstrip(), "```", "", *notes, ""]
    lines += ["## Results", ""]
    for name in ("test", "validation"):
        if scores := facts[name]:
            lines += [f"| {name} | |", "|---|---|", *(f"| {key} | {value} |" for key, value in scores.items()), ""]
    if not (facts["test"] or facts["validation"]):
        lines += ["No evaluation is recorded.", ""]
    lines += ["## Data", "", "| | name | content (sha256) |", "|---|---|---|"]
    lines += [f"| {part} | {name} | {content} |" for part, name, content in facts["data"]]
    lines += ["", "## Licence", "", "Nobody has stated a licence for these weights. " + facts["licenses"], ""]
    return "\n".join(lines)
