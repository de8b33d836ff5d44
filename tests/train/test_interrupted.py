"""A run that is asked to stop before or within a validation saves at once, and makes the validation up when it goes on:
its curve has the points of a run left in peace, bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.launch.small import make_sweep
from tests.train.conftest import Groups

SHORT = """\
extends: _base.yaml
name: short
model: {context_length: 5}
train: {samples: 240}
evaluate: {every: 4 steps}
checkpoint: {every: 100 steps}
"""
"""Ten steps of 24 samples, with validations after 4, 8 and 10"""
STOPS: dict[str, list[Any]] = {
    "at the step": [["step", 4], None],
    "within": [["validation 1", 1], None],
    "within, and again when it is made up": [["validation 1", 2], ["validation 1", 1], ["validation 2", 2], None],
    "before the last": [["step", 10], None],
    "within the last": [["validation 3", 2], None],
    "within the last, and again": [["validation 3", 1], ["validation 1", 1], None],
    "between validations": [["step", 5], ["step", 1], None],
}


STAGES = {
    label: (1, 3) if label in ("in peace", "within, and again when it is made up", "before the last") else (1,)
    for label in ("in peace", *STOPS)
}


@pytest.fixture(scope="module")
def found(run_ranks: Callable[[Groups], Groups], tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    root = tmp_path_factory.mktemp("interrupted")
    file = make_sweep(root, ()) / "short.yaml"
    file.write_text(SHORT)
    jobs = {
        label: {"do": "interrupted", "file": str(file), "runs": str(root / label.replace(" ", "-")), "stops": stops}
        for label, stops in {"in peace": [None], **STOPS}.items()
    }
    asked = {
        f"{label} zero{stage}": {**job, "runs": f"{job['runs']}-{stage}", "stage": stage}
        for label, job in jobs.items()
        for stage in STAGES[label]
    }
    return run_ranks({2: asked})[2]


@pytest.mark.parametrize(("label", "stage"), [(label, stage) for label in STOPS for stage in STAGES[label]])
def test_the_curve_is_that_of_a_run_in_peace(found: dict[str, dict[str, Any]], label: str, stage: int) -> None:
    peace, run = found[f"in peace zero{stage}"], found[f"{label} zero{stage}"]
    assert [samples for samples, _ in peace["curves"]["val/pairs"]] == [96, 192, 240]
    assert run["verdicts"] == ["interrupted"] * (len(STOPS[label]) - 1) + ["finished"]
    assert run["curves"] == peace["curves"]
    assert run["best"] == peace["best"] and not run["due"]
    assert run["test"] == peace["test"]


@pytest.mark.parametrize("label", STOPS)
def test_nothing_is_computed_twice(found: dict[str, dict[str, Any]], label: str) -> None:
    """Saved where it was asked to stop, and not at the validation before."""
    steps = {"at the step": 4, "between validations": 5, "before the last": 10}
    first = steps.get(label, 10 if "last" in label else 4)
    assert found[f"{label} zero1"]["resumed"][1] == 24 * first
