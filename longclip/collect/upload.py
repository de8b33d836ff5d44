"""What ``collect`` wrote, to where the sweep stands in MLflow."""

from __future__ import annotations

from collections.abc import Sequence

from longclip.collect.collect import Collected
from longclip.collect.comparison import MEAN, Comparison
from longclip.collect.row import TEST
from longclip.collect.tables import markdown
from longclip.run.folder import RunFolder
from longclip.track.parent import log_results
from longclip.track.scores import HEADLINE


def upload(result: Collected, runs: Sequence[RunFolder], uri: str) -> list[str]:
    """Files, table and means under the parent run of every sweep that was collected whole; the names of these.

    Raises SiteError where the store cannot be reached or written.
    """
    return log_results(runs, result.files, markdown(result.comparison), headlines(result.comparison), uri)


def headlines(comparison: Comparison) -> dict[str, dict[str, float]]:
    """Mean Recall@1 of the test set over seeds, by sweep, then by ``sweep/Recall at 1/<other axes>/<window>``."""
    found: dict[str, dict[str, float]] = {}
    for line in comparison.lines:
        if line.kind == "measured" and line.task == TEST and line.own and line.counts and MEAN in line.scores:
            axes = [f"{key} {value}" for key, value in sorted(line.axes.items())]
            name = "/".join(["sweep", HEADLINE, *axes, str(line.window)])
            found.setdefault(line.sweep, {})[name] = line.scores[MEAN].value
    return found
