"""``longclip collect``: runs to tables and figures in a folder."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from longclip.collect.compare import compare
from longclip.collect.comparison import Comparison
from longclip.collect.gather import gather
from longclip.collect.references import Reference
from longclip.collect.row import Row
from longclip.collect.scores import External
from longclip.errors import SiteError, UserError
from longclip.run.folder import RunFolder


@dataclass(frozen=True)
class Options:
    """How to compare."""

    best_over: tuple[str, ...] = ()
    """axes of which validation chooses the value, for each window"""
    allow_differences: bool = False
    """undeclared differences are marked, not refused"""
    trim: bool = False
    """all at the samples of the least advanced"""
    goal: float | None = None
    """a Recall@1 in [0, 1]: samples and hours to it"""
    references: tuple[Reference, ...] = ()
    command: str = ""
    """what was typed, for the report to say"""


@dataclass(frozen=True)
class Collected:
    """What ``collect`` found and wrote."""

    comparison: Comparison
    files: list[Path]


def collect(
    runs: Sequence[RunFolder], out: Path, options: Options | None = None, externals: Sequence[External] = ()
) -> Collected:
    """Compares the runs in folders; see :func:`write`."""
    if not runs and not externals:
        raise UserError("nothing to collect: no runs", "longclip status")
    return write(gather(runs), out, options, externals)


def write(
    rows: Sequence[Row], out: Path, options: Options | None = None, externals: Sequence[External] = ()
) -> Collected:
    """Writes ``table.{csv,md,tex,json}``, ``report.html``, ``curves.{png,svg,pdf}`` and, where captions were cut to see
    what the rest is worth, ``probe.{png,svg,pdf}`` about ``rows`` to the folder ``out``.

    Raises:
        UserError: rows differ in what nobody declared; an option does not fit them.
        SiteError: ``out`` cannot be written.
    """
    from longclip.collect import plots
    from longclip.collect.frame import as_json, frame
    from longclip.collect.latex import latex
    from longclip.collect.report import report
    from longclip.collect.tables import markdown

    given = options or Options()
    found = compare(rows, externals, given.references, given.best_over, given.allow_differences, given.trim, given.goal)
    if not found.lines:
        raise UserError("nothing to collect: no runs, and models without scores", "longclip evaluate MODEL --suite S")
    texts = {
        "table.csv": frame(found).to_csv(index=False),
        "table.md": markdown(found),
        "table.tex": latex(found),
        "table.json": json.dumps(as_json(found), indent=1, allow_nan=False, ensure_ascii=False) + "\n",
        "report.html": report(found, given.command),
    }
    figures = {"curves": plots.draw(found), "probe": plots.probe(found)}
    files = [out / name for name in texts]
    try:
        out.mkdir(parents=True, exist_ok=True)
        for file, text in zip(files, texts.values(), strict=True):
            file.write_text(text, encoding="utf-8")
        for name, figure in figures.items():
            if figure is not None:
                files += (drawn := [out / f"{name}.{form}" for form in plots.FORMATS])
                plots.save(figure, drawn)
    except OSError as error:
        raise SiteError(
            f"{out}: cannot be written: {error.strerror or error}", "choose another folder with --out"
        ) from None
    return Collected(found, files)
