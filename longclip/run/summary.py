"""What a table says of a run, as one JSON-able record: from its folder, or from a copy of it that a tracker keeps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from longclip.run.attempts import FINISHED, Attempt
from longclip.run.folder import RunFolder, read_json
from longclip.run.hours import rank_hours, span
from longclip.run.journal import Point, text_shares
from longclip.run.verdicts import verdict_of


def summary(run: RunFolder, attempts: Sequence[Attempt], journals: Mapping[Attempt, Sequence[Point]]) -> dict[str, Any]:
    """Facts of a run as it stands. ``journals`` are all points of each attempt, before they are laid end to end.

    ``spans`` has [begin, end, ranks] of each attempt that ran, in seconds since 1970, the end None where it is not
    known; ``test`` is ``evaluations/test.json``. All else is as in :class:`longclip.collect.row.Row`.
    """
    from longclip.run.journal import laid

    experiment = run.experiment()
    points = laid(attempts, journals)
    verdict = verdict_of(attempts[-1]) if attempts else None
    window = experiment.model.context_length
    waste, padding = text_shares(points, window) or (None, None)
    totals = [s["samples"] for a in attempts if (s := a.submitted) and s.get("samples")]
    hours, lost = rank_hours(attempts, journals)
    file = run.evaluations / "test.json"
    return {
        "sweep": run.sweep,
        "name": run.name,
        "label": run.label,
        "axes": run.axes(),
        "identity": run.identity(),
        "context_length": window,
        "finished": verdict is not None and verdict.kind == FINISHED,
        "verdict": verdict.kind if verdict else None,
        "message": verdict.message if verdict else "",
        "samples": points[-1].samples if points else 0,
        "total": totals[-1] if totals else experiment.train.samples,
        "waste": waste,
        "padding_avoided": padding,
        "test_set": _named(experiment.data.test),
        "test": read_json(file) if file.exists() else None,
        "hours": hours,
        "hours_lost": lost,
        "spans": [found for a in attempts if (found := span(a, journals.get(a, ())))],
        "on_gpu": any("cuda" in str((a.started or {}).get("device")) for a in attempts),
        "codes": _codes(attempts),
    }


def _named(dataset: str | None) -> str:
    """A dataset's name; of a path the last two parts, which mean something to people on other machines too."""
    return "/".join(Path(dataset).parts[-2:]) if dataset else ""


def _codes(attempts: Sequence[Attempt]) -> list[str]:
    """Without the attempts of which nothing was left: before training began, or computed once more from its start."""
    codes: list[str] = []
    cut = float("inf")
    for attempt in reversed(attempts):
        if attempt.resumed_at is not None and attempt.resumed_at < cut:
            cut = attempt.resumed_at
            codes.append(str((attempt.started or {}).get("code")))
    return list(dict.fromkeys(reversed(codes)))
