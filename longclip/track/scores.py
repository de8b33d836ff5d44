"""The metrics of a run as a whole: what it scored on the test set and in suites, and the one that comparisons show.

MLflow's pages for comparing runs begin with the parameter and the metric that come first: by name in the scatter plot,
by the order in which they were stored in the parallel coordinates. ``HEADLINE`` and ``WINDOW`` are first in both: a
capital sorts before all other names, and the headline is stored, as not a number, when the run is made.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from longclip.run.attempts import FINISHED, Attempt
from longclip.run.folder import RunFolder, read_json
from longclip.run.journal import Point, text_shares
from longclip.track.store import key_of, ms

CONTEXT_LENGTH = "model.context_length"
WINDOW = "Window"
"""The parameter: the run's context length"""
HEADLINE = "Recall at 1"
"""The metric: on the test set, mean of both directions, in [0, 1]; not a number until it is measured"""
AXIS = "axis."
"""Before the parameters that the sweep varies, the window aside: these come next by name"""

Value = tuple[str, float, int, int]
"""(name, value, time [ms since 1970], step)"""


def axes(window: int, varied: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters that a comparison is about."""
    return {WINDOW: window, **{f"{AXIS}{k}": v for k, v in varied.items() if k != CONTEXT_LENGTH}}


def finals(run: RunFolder, last: Attempt, points: Sequence[Point], experiment: Any) -> list[Value]:
    """Only when the run has finished and the whole journal is here (NFS may show the verdict first): a value that
    changed later would be a second point. For the same reason their time is the verdict's; that of a suite's scores
    is their record's, and the newest counts."""
    ended = last.ended or {}
    if ended.get("verdict") != FINISHED or not points or points[-1].samples != ended.get("samples"):
        return []
    when, end = ms(ended["time"]), points[-1].samples
    shares = text_shares(points, experiment.model.context_length)
    values = [] if shares is None else [("text/waste", shares[0], when, end)]
    # Not text/padding_avoided, which is a curve: the same over the last few steps.
    values += [] if shares is None else [("text/padding_avoided_overall", shares[1], when, end)]
    test = tested(run)
    if test is None:
        return values
    scores = {**test["metrics"], **{f"ceiling_{k}": v for k, v in (test.get("ceiling") or {}).items()}}
    values += [(f"test/{key_of(k)}", float(v), when, int(test["samples"])) for k, v in scores.items()]
    if "mean_recall_at_1" in scores:
        # At step 0, where it was not a number before: the UI draws bars of what has one step, and lines of the rest.
        values.append((HEADLINE, float(scores["mean_recall_at_1"]), when, 0))
    return values + _suites(run, test["checkpoint"])


def tested(run: RunFolder) -> dict[str, Any] | None:
    """The record of the chosen checkpoint on the test set."""
    file = run.evaluations / "test.json"
    return read_json(file) if file.exists() else None


def _suites(run: RunFolder, checkpoint: str) -> list[Value]:
    """``<suite>/<task>/<metric>`` of the checkpoint that validation chose; other checkpoints' are in the run folder."""
    records = [read_json(f) for f in sorted(run.evaluations.glob(f"*/{checkpoint}.json"))]
    return [
        (key_of(f"{record['suite']}/{task}/{metric}"), float(value), ms(record["time"]), int(record["samples"]))
        for record in records
        for task, scored in record["tasks"].items()
        for metric, value in scored.get("metrics", {}).items()
        if isinstance(value, (int, float))
    ]
