"""Samples that cannot be used: each named whenever its turn comes, and too many of them stop the run."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from longclip.run.attempts import attempts_of
from longclip.run.folder import RunFolder
from longclip.run.verdicts import verdict_of
from tests.data.test_loader import make_shards
from tests.launch.small import curve, longclip, make_sweep, the_run

SPOILED = tuple(f"00-{i:03d}" for i in range(12))
"""of the 50 samples of the second source"""


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Trains on two sources, the second with broken images, on a mix of texts."""
    sweep = make_sweep(tmp_path_factory.mktemp("spoiled"), (6,))
    make_shards(sweep.parent / "spoiled", [30, 20], spoil=SPOILED)
    base = (sweep / "_base.yaml").read_text()
    sources = "[{name: ../train, weight: 2}, {name: ../spoiled}]"
    text = "text: {short: txt, long: '{long} {txt}', p_long: 0.4}, shuffle_sentences: true"
    (sweep / "_base.yaml").write_text(base.replace("data: {train: ../train,", f"data: {{train: {sources}, {text},"))
    return sweep


def train(sweep: Path, name: str, *words: str, code: int = 0) -> tuple[str, RunFolder]:
    runs = sweep.parent / name
    said = longclip("train", sweep / "ctx6.yaml", "--runs", runs, *words, cwd=sweep.parent, code=code)
    return said, the_run(runs, "ctx6")


def named(run: RunFolder) -> Counter[str]:
    lines = [line for a in attempts_of(run) for file in a.path.glob("bad-samples-*") for line in file.open()]
    return Counter(json.loads(line)["sample"].split(":")[0] for line in lines)


def test_too_many_stop_the_run(sweep: Path) -> None:
    said, run = train(sweep, "strict", code=2)
    bad = sum(named(run).values())
    samples = curve(run)[-1][0]
    assert 10 + 0.01 * samples < bad <= 10 + 0.01 * samples + 24, "not at the first step at which it was too much"
    assert f"{bad} of {samples} samples cannot be used, engine.bad_limit is 0.01; such as 00-0" in said, said
    assert "bad-samples-*.jsonl" in said
    verdict = verdict_of(attempts_of(run)[-1])
    assert verdict is not None and verdict.kind == "bad input"


def test_below_the_limit_each_is_named_in_each_epoch(sweep: Path) -> None:
    """1,440 samples, a third of the second source: 480, which are 9 epochs of 50, and 30 more."""
    said, run = train(sweep, "lenient", "--set", "engine.bad_limit=0.2")
    found = named(run)
    assert set(found) == set(SPOILED)
    assert set(found.values()) <= {9, 10}, said
    assert sum(found.values()) == sum(value for _, value in curve(run, "data/bad_samples"))
    assert curve(run)[-1][0] == 1440
    assert [key for key in sorted(run.identity()) if key.startswith("data.")] == [
        "data.shuffle_sentences",
        "data.text.long",
        "data.text.p_long",
        "data.text.short",
        "data.train.0",
        "data.train.0.share",
        "data.train.1",
        "data.train.1.share",
        "data.val",
    ]
