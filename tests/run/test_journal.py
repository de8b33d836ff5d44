"""Reading a journal: what was torn, by whatever tore it, costs its own line and no other."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longclip.run.journal import Journal, Point, effective, read_points, series
from tests.helpers import add_attempt, experiment, make_run, train


def one_by_one(text: str) -> list[Point]:
    found = []
    for line in text.splitlines():
        try:
            entry = json.loads(line)
            found.append(Point(entry["t"], entry["step"], entry["samples"], entry["metrics"]))
        except (ValueError, KeyError, TypeError):
            continue
    return found


def line(step: int) -> str:
    return json.dumps({"t": 1.5 * step, "step": step, "samples": 10 * step, "metrics": {"train/loss": step / 7}})


BROKEN = ("", "null", "3", "[1, 2]", "{}", line(3)[:20], line(3)[20:], f"{line(3)},{line(4)}", '{"t": 1', "\x00\x00")


@settings(deadline=None)
@given(st.lists(st.integers(0, 9).map(line) | st.sampled_from(BROKEN), max_size=8), st.booleans())
def test_a_line_that_is_broken_is_the_only_one_lost(lines: list[str], ends: bool) -> None:
    import tempfile

    text = "\n".join(lines) + ("\n" if ends else "")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "journal.jsonl"
        file.write_text(text)
        assert read_points(file) == one_by_one(text)


def test_a_whole_journal_reads_back_to_the_last_bit(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal.jsonl")
    values = [1 / 3, float("nan"), float("inf"), 1e-300, -0.0]
    for step, value in enumerate(values):
        journal.write(step, 10 * step, {"train/loss": value}, when=1.0 + step)
    journal.close()
    found = read_points(tmp_path / "journal.jsonl")
    assert [p.samples for p in found] == [0, 10, 20, 30, 40]
    assert repr([p.metrics["train/loss"] for p in found]) == repr(values)


def test_what_was_computed_twice_shows_once(tmp_path: Path) -> None:
    run = make_run(tmp_path, experiment())
    train(add_attempt(run, 0), 0, 700, 60, losses={600: 9.0})
    train(add_attempt(run, 1000), 500, 600, 1060, losses={600: 8.0})
    train(add_attempt(run, 2000), 300, 800, 2060, losses={600: 7.0})
    points = effective(run)
    assert [p.samples for p in points] == list(range(100, 801, 100))
    assert [p.metrics["train/loss"] for p in points if p.samples == 600] == [7.0]
    assert points[2].time < points[3].time


def test_a_validation_made_up_for_shows_once(tmp_path: Path) -> None:
    """Three attempts resume at 500, and each begins with what the first had no time for; the last goes on."""
    run = make_run(tmp_path, experiment())
    train(add_attempt(run, 0), 0, 500, 60)
    for number, until in enumerate((500, 700, 800)):
        attempt = add_attempt(run, 1000 * (number + 1))
        attempt.begin(500)
        journal = Journal(attempt.journal)
        journal.write(5, 500, {"val/mean_recall_at_1": float(number)})
        journal.close()
        train(attempt, 500, until, 1000 * (number + 1))
    points = effective(run)
    assert series(points, "train/loss") == [(s, 5.0 - s / 1000) for s in range(100, 801, 100)]
    assert series(points, "val/mean_recall_at_1") == [(500, 2.0)]
    train(add_attempt(run, 9000), 500, 600, 9000)
    assert series(effective(run), "val/mean_recall_at_1") == [(500, 2.0)], "that one was noted in the checkpoint"


def test_there_is_no_journal_yet(tmp_path: Path) -> None:
    assert read_points(tmp_path / "journal.jsonl") == []
    with pytest.raises(FileNotFoundError):
        Journal(tmp_path / "no" / "journal.jsonl")
