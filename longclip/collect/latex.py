"""A comparison as LaTeX: booktabs, the best of each column in bold, intervals in small print."""

from __future__ import annotations

import re
import unicodedata

from longclip.collect.comparison import Comparison
from longclip.collect.row import TEST
from longclip.collect.tables import LEFT, best, caption, heading, shown, words

COLUMNS = ("run", "window", "train / eval", "seeds", "waste", "i2t R@1", "t2i R@1", "of ceiling", "zero-shot")
"""and the other axes, differences to the smallest window, samples to goals, marks and sources; all are in the CSV"""

_SPECIAL = {
    "\\": r"\textbackslash{}",
    "&": r"\&",
    "%": r"\%",
    "$": r"\$",
    "#": r"\#",
    "_": r"\_",
    "{": r"\{",
    "}": r"\}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    '"': r"\textquotedbl{}",
    "±": r"$\pm$",
    "Δ": r"$\Delta$",
    "–": "--",
    "—": "---",
    "’": "'",
    "‘": "`",
    "·": r"$\cdot$",
    "×": r"$\times$",
    "−": r"$-$",
    "µ": r"$\mu$",
    "μ": r"$\mu$",
    "α": r"$\alpha$",
    "β": r"$\beta$",
    "\u00a0": "~",
}
_INTERVAL = re.compile(r"^(\S+) (\[.+\])$")


def latex(comparison: Comparison) -> str:
    """One table environment a task. Needs ``\\usepackage{booktabs,graphicx}`` and ``\\usepackage[T1]{fontenc}``."""
    parts = [
        r"% \usepackage{booktabs,graphicx} \usepackage[T1]{fontenc}",
        *(_table(comparison, task) for task in comparison.tasks),
    ]
    return "\n".join(parts)


def _table(comparison: Comparison, task: str) -> str:
    lines, bold = shown(comparison, task), best(comparison, task)
    columns = [c for c in lines[0] if _wanted(c, comparison)]
    if all(line.get("state", "") in ("", "finished", "same weights", "external") for line in lines):
        columns = [c for c in columns if c != "state"]
    aligned = "".join("l" if c in LEFT else "r" for c in columns)
    said = caption(comparison) if task == TEST or comparison.cut is not None else heading(comparison, task)
    notes = ". ".join(filter(None, [said, words(comparison)]))
    body = [_row([_cell(line[c], (i, c) in bold) for c in columns]) for i, line in enumerate(lines)]
    return "\n".join(
        [
            r"\begin{table}",
            r"\centering",
            rf"\caption{{{escape(notes)}.}}",
            # As wide as the text at most; graphicx.
            r"\resizebox{\ifdim\width>\linewidth\linewidth\else\width\fi}{!}{%",
            rf"\begin{{tabular}}{{{aligned}}}",
            r"\toprule",
            _row([escape(c) for c in columns]),
            r"\midrule",
            *body,
            r"\bottomrule",
            r"\end{tabular}}",
            r"\end{table}",
            "",
        ]
    )


def _row(cells: list[str]) -> str:
    """A line of the table. The end of the line before would take a bracket for its option, and a star for its own."""
    row = " & ".join(cells) + r" \\"
    return "{}" + row if row.startswith(("[", "*")) else row


def _wanted(column: str, comparison: Comparison) -> bool:
    more = (*COLUMNS, *comparison.varied, "state", "differs in", "source")
    return column in more or column.startswith(("Δ ", "samples to "))


def _cell(text: str, bold: bool) -> str:
    found = _INTERVAL.match(text)
    value, small = (found[1], rf" {{\scriptsize {escape(found[2])}}}") if found else (text, "")
    shown = escape(value)
    return (rf"\textbf{{{shown}}}" if bold else shown) + small


def escape(text: str) -> str:
    """Text as LaTeX prints it. A sign that its fonts do not have is named by its number: nothing vanishes."""
    return "".join(_sign(c) for c in " ".join(text.split()))


def _sign(sign: str) -> str:
    if sign in _SPECIAL:
        return _SPECIAL[sign]
    if (sign.isascii() and sign.isprintable()) or (
        "\u00c0" <= sign <= "\u00ff" and unicodedata.category(sign).startswith("L")
    ):
        return sign
    return rf"{{\ttfamily U+{ord(sign):04X}}}"
