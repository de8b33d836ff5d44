"""A small sweep, written by hand, whose every number can be computed by hand."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from rich.console import Console

from longclip.collect.checks import differences
from longclip.collect.collect import Options, collect
from longclip.collect.compare import compare
from longclip.collect.frame import frame
from longclip.collect.gather import gather
from longclip.collect.plots import draw, save, smoothed
from longclip.collect.row import count, reaches
from longclip.collect.tables import caption, markdown, terminal
from longclip.errors import UserError
from longclip.run.folder import RunFolder, write_json
from tests.helpers import add_attempt, end, experiment, finished_run, make_run, save_checkpoint, save_test, train


@pytest.fixture
def sweep(tmp_path: Path) -> list[RunFolder]:
    """77 in one attempt; 512 in two, of which the first was killed 200 samples after its checkpoint; 154 half done."""
    c77 = finished_run(tmp_path, experiment(77), {500: 0.2, 800: 0.3, 1000: 0.25}, i2t=0.2, t2i=0.3, ceiling=0.5)
    c512 = make_run(tmp_path, experiment(512))
    train(add_attempt(c512, 0), 0, 700, 60, val={300: 0.1, 600: 0.9})
    save_checkpoint(c512, 500)
    second = add_attempt(c512, 1000)
    train(second, 500, 1000, 1060, val={600: 0.29, 900: 0.3, 1000: 0.6})
    save_test(c512, 0.6, 0.5, 1000, ceiling=1.0)
    end(second, "finished", 1000, 1120)
    c154 = make_run(tmp_path, experiment(154))
    train(add_attempt(c154, 0), 0, 400, 60, val={400: 0.1})
    return [c512, c154, c77]


def test_numbers(sweep: list[RunFolder]) -> None:
    c77, c154, c512 = gather(sweep)
    assert [r.name for r in (c77, c154, c512)] == ["ctx77", "ctx154", "ctx512"]
    assert c77.waste == c512.waste == pytest.approx(0.4)
    assert c77.padding_avoided == pytest.approx(1 - 60 / 77)
    assert c512.padding_avoided == pytest.approx(1 - 60 / 512)
    assert (c77.test_samples, c77.test["i2t_recall_at_1"], c77.ceiling["t2i"]) == (800, 0.2, 0.5)
    # The 0.9 at 600 was lost with the first attempt.
    assert c512.val == [(300, 0.1), (600, 0.29), (900, 0.3), (1000, 0.6)]
    assert (c77.samples_to, c512.samples_to, c154.samples_to) == (800, 900, None)
    assert reaches([(100, 0.1), (200, 0.3), (300, 0.2)], 0.25) == 175, "on the line between two evaluations"
    assert {c77.baseline, c154.baseline, c512.baseline} == {"ctx77"}
    # 2 ranks: 0 to 160 s; and 0 to 120 s, of which what came after 100 s (500 samples) is lost, and 1000 to 1120 s.
    assert (c77.hours, c77.hours_lost) == (pytest.approx(2 * 160 / 3600), 0.0)
    assert (c512.hours, c512.hours_lost) == (pytest.approx(2 * 240 / 3600), pytest.approx(2 * 20 / 3600))
    assert (c154.samples, c154.total, c154.finished, dict(c154.test)) == (400, 1000, False, {})
    assert c154.hours == pytest.approx(2 * 91 / 3600), "validation was the last that it wrote"


def test_hours_of_attempts_that_came_to_nothing(tmp_path: Path) -> None:
    run = make_run(tmp_path, experiment())
    end(add_attempt(run, 0), "crashed", 0, 36, "no such file")  # before training began
    train(add_attempt(run, 100), 0, 300, 160)  # killed without a checkpoint
    train(add_attempt(run, 1000), 0, 200, 1060)
    (row,) = gather([run])
    assert row.hours == pytest.approx(2 * (36 + 80 + 70) / 3600)
    assert row.hours_lost == pytest.approx(2 * (36 + 80) / 3600)
    # What only tests a checkpoint that an earlier attempt had finished is of use.
    third = add_attempt(run, 2000)
    third.begin(200)
    end(third, "finished", 200, 2036)
    assert gather([run])[0].hours_lost == pytest.approx(row.hours_lost)


def test_an_unfinished_smallest_window_is_no_baseline(tmp_path: Path) -> None:
    run = make_run(tmp_path, experiment(77))
    train(add_attempt(run, 0), 0, 400, 60, val={400: 0.1})
    rows = gather([run, finished_run(tmp_path, experiment(512), {1000: 0.5})])
    assert [(r.samples_to, r.baseline) for r in rows] == [(None, None)] * 2


def test_every_seed_has_its_own_baseline(tmp_path: Path) -> None:
    runs = []
    for seed, best in ((0, 0.3), (1, 0.4)):
        for window, value in ((77, best), (512, 0.35)):
            asked = experiment(window, name=f"ctx{window}_s{seed}", seed=seed)
            axes = {"model.context_length": window, "train.seed": seed}
            runs.append(finished_run(tmp_path, asked, {1000: value}, axes=axes))
    rows = gather(runs)
    assert [(r.name, r.samples_to) for r in rows] == [
        ("ctx77_s0", 1000),
        ("ctx512_s0", 1000),
        ("ctx77_s1", 1000),
        ("ctx512_s1", None),
    ]
    assert differences(rows) == []
    found = compare(rows)
    assert "samples to ctx77's best" in markdown(found)
    c77, c512 = found.lines
    assert (c77.name, c512.name, len(c77.rows), len(c512.rows)) == ("ctx77", "ctx512", 2, 2)
    assert c512.samples_to is not None and c512.samples_to.by_seed == (1000.0,), (
        "seed 1 never was as good as its own 77"
    )
    assert list(frame(found)["seeds"]) == [2, 2]


def test_a_difference_that_nobody_declared(tmp_path: Path, sweep: list[RunFolder]) -> None:
    odd = finished_run(tmp_path, experiment(256, lr=2e-3, weight_decay=0.1), {1000: 0.5})
    write_json(odd.evaluations / "test.json", {**_read(odd), "dataset": "8" * 64})
    found = [w for w in differences(gather([*sweep, odd])) if "undeclared" in w]
    assert [w.partition(";")[0] for w in found] == [
        f"ctx256: undeclared difference: data.test is {'8' * 40}, elsewhere {'7' * 40}",
        "ctx256: undeclared difference: train.lr is 0.002, elsewhere 0.001",
        "ctx256: undeclared difference: train.weight_decay is 0.1, elsewhere the default",
    ]
    other_sweep = finished_run(tmp_path, experiment(77, lr=2e-3), {1000: 0.5}, sweep="other")
    assert not [w for w in differences(gather([*sweep, other_sweep])) if "undeclared" in w]
    with pytest.raises(UserError, match=r"ctx256: undeclared difference: train\.lr is 0\.002") as refused:
        collect([*sweep, odd], tmp_path / "out")
    assert refused.value.exit_code == 2 and "--allow-differences" in str(refused.value)
    assert not (tmp_path / "out").exists()
    marked = collect([*sweep, odd], tmp_path / "out", Options(allow_differences=True))
    table = pd.read_csv(marked.files[0]).set_index("run")
    assert table.loc["ctx256", "differs_in"] == f"data.test is {'8' * 40}; train.lr is 0.002; train.weight_decay is 0.1"
    assert np.isnan(table.loc["ctx256", "delta_i2t_recall_at_1"]), "other queries: no difference"
    assert "train.lr is 0.002" in marked.files[1].read_text() and "train.lr is 0.002" in marked.files[2].read_text()


def _read(run: RunFolder) -> dict[str, object]:
    from longclip.run.folder import read_json

    return read_json(run.evaluations / "test.json")


def test_unequal_and_unfinished_are_said(tmp_path: Path, sweep: list[RunFolder]) -> None:
    short = finished_run(tmp_path, experiment(256, samples=500), {500: 0.5})
    diverged = make_run(tmp_path, experiment(128))
    attempt = add_attempt(diverged, 0)
    train(attempt, 0, 300, 60, losses={300: math.nan})
    end(attempt, "diverged", 300, 100, "the loss is nan")
    rows = gather([*sweep, short, diverged])
    found = differences(rows)
    assert "ctx154: unfinished (400/1.0 k)" in found
    assert "ctx128: unfinished (300/1.0 k), diverged: the loss is nan" in found
    assert "runs saw unequal numbers of samples: ctx77 1.0 k, ctx256 500, ctx512 1.0 k" in found
    assert caption(compare(rows, allow_differences=True)).endswith("UNEQUAL samples")


def test_files(tmp_path: Path, sweep: list[RunFolder]) -> None:
    result = collect(sweep, tmp_path / "deep" / "results")
    assert [f.name for f in result.files] == [
        *("table.csv", "table.md", "table.tex", "table.json", "report.html"),
        *("curves.png", "curves.svg", "curves.pdf"),
    ]
    assert result.comparison.warnings == ("ctx154: unfinished (400/1.0 k)",)

    table = pd.read_csv(result.files[0]).set_index("run")
    assert list(table.index) == ["ctx77", "ctx154", "ctx512"]
    assert table.loc["ctx512", "i2t_recall_at_1"] == 0.6
    assert table.loc["ctx512", "delta_i2t_recall_at_1"] == pytest.approx(0.4)
    assert table.loc["ctx77", "samples_to"] == 800
    assert np.isnan(table.loc["ctx154", "i2t_recall_at_1"])
    assert table.loc["ctx154", "state"] == "unfinished (400/1.0 k)"

    lines = result.files[1].read_text().splitlines()
    assert lines[0] == (
        "tiny-test, n = 500, one caption an image, ties = misses, checkpoint chosen on val, equal 1.0 k samples"
    )
    assert lines[2] == "[low, high]: 95 % over the queries of the test set"
    body = [line for line in lines if line.startswith("| ctx")]
    assert len(body) == 3
    columns = [c.strip() for c in lines[4].strip("|").split("|")]
    cells = [dict(zip(columns, (c.strip() for c in line.strip("|").split("|")), strict=True)) for line in body]
    assert [c["i2t R@1"] for c in cells] == ["20.0 [16.7, 23.7]", "", "**60.0 [55.6, 64.2]**"]
    assert [c["Δ i2t vs ctx77"] for c in cells] == ["", "", "+40.0"], "no ranks were kept: no interval"
    assert [c["samples to ctx77's best"] for c in cells] == ["**800**", "", "900"]
    assert [c["of ceiling"] for c in cells] == ["50.0%", "", "**55.0%**"]
    assert cells[2]["GPU-h (lost)"] == "0.1 (0.011)"
    assert "> **!** ctx154: unfinished (400/1.0 k)" in lines

    with Image.open(result.files[5]) as image:
        assert image.format == "PNG"
        pixels = np.asarray(image.convert("RGB")).reshape(-1, 3)
    assert image.width > 1000
    for colour in ((0x00, 0x72, 0xB2), (0xD5, 0x5E, 0x00), (0x00, 0x9E, 0x73)):
        assert (pixels == colour).all(axis=1).sum() > 100, "every run has its line"


@pytest.mark.parametrize("width", [100, 200])
def test_terminal(tmp_path: Path, sweep: list[RunFolder], width: int) -> None:
    console = Console(width=width, record=True, file=sys.stderr)
    console.print(terminal(compare(gather(sweep))))
    text = console.export_text()
    for word in ("tiny-test, n = 500", "ctx77", "ctx154", "ctx512", "60.0", "unfinished"):
        assert word in text


def test_runs_without_a_single_point(tmp_path: Path) -> None:
    queued = make_run(tmp_path, experiment())
    result = collect([queued], tmp_path / "out")
    assert result.comparison.warnings == ("ctx77: unfinished (0/1.0 k)",)
    assert "not tested yet" in result.files[1].read_text()
    with Image.open(result.files[5]) as image:
        image.verify()


def test_no_runs(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no runs"):
        collect([], tmp_path)


def test_a_png_needs_no_pyplot(tmp_path: Path, sweep: list[RunFolder]) -> None:
    save(draw(compare(gather(sweep))), [tmp_path / "a.png"])
    assert "matplotlib.pyplot" not in sys.modules


def test_smoothing_leaves_out_nan() -> None:
    assert smoothed([1.0] * 60 + [math.nan] + [1.0] * 40)[60] == 1.0
    assert math.isnan(smoothed([math.nan])[0])


def test_counts() -> None:
    assert [count(n) for n in (640, 12_800, 6_300_000, 999_960)] == ["640", "12.8 k", "6.3 M", "1.0 M"]


def test_start_is_light_and_torch_is_not_needed(tmp_path: Path, sweep: list[RunFolder]) -> None:
    check = f"""
import sys
from pathlib import Path
from longclip.collect.collect import collect
assert not {{"pandas", "matplotlib", "mlflow"}} & set(sys.modules)
from longclip.run.folder import RunFolder
collect([RunFolder(Path({str(sweep[0].path)!r}))], Path({str(tmp_path)!r}))
assert not {{"torch", "transformers", "deepspeed", "mlflow"}} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", check], check=True)
