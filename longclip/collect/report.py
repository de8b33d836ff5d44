"""One HTML file about a comparison, for the group meeting and the archive: it opens from a disk, with no network.

Tables that sort, curves that zoom (plotly.js, embedded once), single queries with their pictures, and what it takes to
do it again. Names of runs, captions and messages come from outside: all text is escaped, and the page's own policy
forbids whatever would load anything.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from html import escape
from importlib import resources
from typing import Any

from longclip import __version__
from longclip.collect.comparison import VAL, Comparison, Line
from longclip.collect.examples import LONGEST, Example, Examples, examples
from longclip.collect.interactive import figures
from longclip.collect.row import TEST, Row
from longclip.collect.tables import LEFT, best, caption, heading, main_columns, of_task, shown, words
from longclip.run.attempts import attempts_of

POLICY = "default-src 'none'; img-src data: blob:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
"""The page may run and show what is in it, and load nothing"""
_NUMBER = re.compile(r"([+-]?\d[\d.,]*)( [kM]\b)?(?: / (\d+))?")
_LONG = ("state", "differs in", "source")


def report(comparison: Comparison, command: str = "") -> str:
    """The page. ``command`` is what the user typed to make it."""
    title = " + ".join(dict.fromkeys(line.sweep for line in comparison.lines if line.sweep)) or "models"
    drawn = figures(comparison)
    parts = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{escape(POLICY)}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{escape(title)}</title>",
        f"<style>{_own('report.css')}</style></head><body>",
        f"<h1>{escape(title)}</h1>",
        f'<p class="caption">{escape(caption(comparison))}</p>',
        *_warnings(comparison),
        "<h2>Results</h2>",
        *(part for task in comparison.tasks for part in _table(comparison, task)),
        *_notes(comparison),
        *_figures(drawn),
        "<h2>Single queries</h2>",
        *_examples(examples(comparison)),
        "<h2>To do it again</h2>",
        *_again(comparison, command),
        f'<p class="note">Written by longclip {escape(__version__)}.</p>',
        *([f"<script>{_plotly()}</script>"] if drawn else []),
        f"<script>{_own('report.js')}</script>",
        "</body></html>",
    ]
    return "\n".join(parts) + "\n"


def _own(name: str) -> str:
    return resources.files("longclip.collect").joinpath(name).read_text(encoding="utf-8")


def _plotly() -> str:
    """The library's file, as ``plotly.offline`` would give it; that takes a second to import."""
    return resources.files("plotly").joinpath("package_data", "plotly.min.js").read_text(encoding="utf-8")


# ---- what is said first, and the tables ---------------------------------------------------------------------------


def _warnings(comparison: Comparison) -> Iterable[str]:
    if comparison.warnings:
        yield '<div class="warnings" role="alert"><strong>Before you read on</strong><ul>'
        yield from (f"<li>{escape(said)}</li>" for said in comparison.warnings)
        yield "</ul></div>"


def _notes(comparison: Comparison) -> Iterable[str]:
    said = [words(comparison), *comparison.choices, "Bold: the best measured. A click on a heading sorts."]
    yield from (f'<p class="note">{escape(line)}</p>' for line in said if line)


def _table(comparison: Comparison, task: str) -> Iterable[str]:
    if task not in (TEST, VAL):
        yield f"<h3>{escape(heading(comparison, task))}</h3>"
    texts, lines, bold = shown(comparison, task), of_task(comparison, task), best(comparison, task)
    columns = main_columns(list(texts[0]), comparison)
    columns += [c for c in texts[0] if c not in columns]
    strong = {(i, columns.index(column)) for i, column in bold if column in columns}
    yield from _grid(columns, [[text[c] for c in columns] for text in texts], [_class(x) for x in lines], strong)


def _class(line: Line) -> str:
    return "partial" if not line.counts or line.marks else "" if line.kind == "measured" else "other"


def _grid(
    columns: Sequence[str], rows: Sequence[Sequence[str]], classes: Sequence[str] = (), bold: Iterable[Any] = ()
) -> Iterable[str]:
    """A table whose headings are buttons that sort it."""
    strong = set(bold)
    left = [c in LEFT or c in ("uid", "folder", "code", "commit") for c in columns]
    marks = [" ".join(["left"] * side + ["long"] * (c in _LONG)) for c, side in zip(columns, left, strict=True)]
    yield '<div class="wide"><table><thead><tr>'
    for column, mark in zip(columns, marks, strict=True):
        yield f'<th scope="col" class="{mark}"><button type="button">{escape(column)}</button></th>'
    yield "</tr></thead><tbody>"
    for i, row in enumerate(rows):
        yield f'<tr class="{classes[i] if classes else ""}">'
        for j, (text, mark) in enumerate(zip(row, marks, strict=True)):
            value = "" if left[j] or (found := number(text)) is None else f' data-v="{found!r}"'
            said = escape(text)
            yield f'<td class="{mark}"{value}>{f"<strong>{said}</strong>" if (i, j) in strong else said}</td>'
        yield "</tr>"
    yield "</tbody></table></div>"


def number(text: str) -> float | None:
    """What a cell is sorted by: ``+1.8 [..]`` is 1.8, ``12.7 k`` 12,700, ``77 / 512`` comes after ``77 / 77``."""
    found = _NUMBER.match(text)
    if found is None:
        return None
    unit = {" k": 1e3, " M": 1e6}.get(found[2] or "", 1.0)
    return float(found[1].rstrip(".,").replace(",", "")) * unit + int(found[3] or 0) * 1e-7


# ---- curves --------------------------------------------------------------------------------------------------------


def _figures(drawn: Sequence[tuple[str, Any]]) -> Iterable[str]:
    yield "<h2>Curves</h2>"
    yield '<p class="note">Drag a box to zoom, double-click to see all; a click in the legend hides a line.</p>'
    yield '<div class="figures">'
    for i, (title, figure) in enumerate(drawn):
        yield f'<figure><figcaption>{escape(title)}</figcaption><div class="plot" data-figure="figure-{i}"></div>'
        yield f'<script type="application/json" id="figure-{i}">{_json(figure)}</script></figure>'
    yield "</div>"


def _json(value: Any) -> str:
    """In a script element only ``<`` could end it."""
    return json.dumps(value, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")


# ---- single queries ------------------------------------------------------------------------------------------------


def _examples(found: Examples) -> Iterable[str]:
    if found.missing:
        yield f"<p>None are shown: {escape(found.missing)}.</p>"
        return
    yield (
        f'<p class="note">{escape(found.short)} against {escape(found.long)}, image to caption. Places in the ranking '
        f'count from 1. <span class="unseen">So marked</span> is what a window of {found.window} tokens cuts off.</p>'
    )
    for title, total, shown_ in found.groups:
        yield f"<h3>{escape(title)}: {total:,}</h3>"
        yield from (_example(one, found) for one in shown_)


def _example(one: Example, found: Examples) -> str:
    picture = f'<img src="{one.thumbnail}" alt="">' if one.thumbnail else "<em>image not readable</em>"
    places = "; ".join(
        f"{escape(name)}: caption at {i2t:,}, image at {t2i:,}"
        for name, (i2t, t2i) in ((found.short, one.short), (found.long, one.long))
    )
    text, seen = one.caption[:LONGEST], one.seen
    more = " ..." if len(one.caption) > LONGEST else ""
    said = escape(text) if seen is None else escape(text[:seen])
    if seen is not None and seen < len(text):
        said += f'<span class="unseen">{escape(text[seen:])}</span>'
    return (
        f'<div class="example"><div>{picture}</div><div><p><strong>{places}</strong></p>'
        f"<p>{said}{more}</p><p><code>{escape(one.key)}</code></p></div></div>"
    )


# ---- to do it again ------------------------------------------------------------------------------------------------


def _again(comparison: Comparison, command: str) -> Iterable[str]:
    if command:
        yield f"<p>This page:</p><pre>{escape(command)}</pre>"
    here = [row for row in comparison.rows if row.run is not None]
    if here:
        submits = "\n".join(f"longclip submit {row.run.path}/experiment.yaml" for row in here if row.run)
        yield "<p>The runs, each from the experiment as its folder holds it (also below), which gives the same uid:</p>"
        yield f"<pre>{escape(submits)}</pre>"
    if comparison.rows:
        columns = ["run", "uid", "commit", "code", "folder"]
        yield from _grid(columns, [_origin(row) for row in comparison.rows])
        yield from _identity(comparison.rows)
    for row in here:
        assert row.run is not None
        text = row.run.experiment_file.read_text(encoding="utf-8")
        yield f"<details><summary>{escape(row.folder)}: experiment.yaml</summary><pre>{escape(text)}</pre></details>"


def _origin(row: Row) -> list[str]:
    submitted = [a.submitted or {} for a in attempts_of(row.run)] if row.run else []
    commits = dict.fromkeys(str(s["commit"]) for s in submitted if s.get("commit"))
    uid = row.folder.rpartition("-")[2]
    place = str(row.run.path) if row.run else f"{row.sweep}/{row.folder}"
    return [row.name, uid, " then ".join(commits), " then ".join(row.codes), place]


def _identity(rows: Sequence[Row]) -> Iterable[str]:
    """What decided the weights: once where it is the same in all runs, else by run. Hashes are of content."""
    every = [{**row.identity, **({"data.test": row.test_hash} if row.test_hash else {})} for row in rows]
    keys = sorted({key for facts in every for key in facts})
    yield "<details open><summary>What decided the weights, and the test set, by content</summary>"
    yield '<div class="wide"><table><tbody>'
    for key in keys:
        values = [json.dumps(facts.get(key)) for facts in every]
        same = len(set(values)) == 1
        said = values[0] if same else "; ".join(f"{r.name}: {v}" for r, v in zip(rows, values, strict=True))
        yield f'<tr><th scope="row" class="left">{escape(key)}</th>'
        yield f'<td class="left long"><code>{escape(said)}</code></td></tr>'
    yield "</tbody></table></div></details>"
