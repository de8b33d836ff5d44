"""What is compared with what: groups, seeds, axes, equal samples, other windows, models from outside."""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from longclip.collect import command
from longclip.collect.collect import Options, collect
from longclip.collect.compare import compare
from longclip.collect.comparison import Line
from longclip.collect.gather import gather
from longclip.collect.plots import draw, probe
from longclip.collect.references import read_references
from longclip.collect.tables import markdown
from longclip.errors import ExperimentError, UserError
from longclip.experiment.sweep import short_name
from longclip.run.evaluations import place, write
from longclip.run.folder import RunFolder, read_json, write_json
from tests.collect.planted import QUERIES, metrics, ranks, retrieval_task, scored_run, suite_record
from tests.helpers import add_attempt, end, experiment, finished_run, make_run, save_checkpoint, train

WINDOWS = (77, 154, 256, 512)
SKILL = {77: 0.4, 154: 0.45, 256: 0.5, 512: 0.6}
BETTER = {0.001: 0.0, 0.002: 0.05}
"""what the second learning rate adds"""


@pytest.fixture(scope="module")
def sixteen(tmp_path_factory: pytest.TempPathFactory) -> list[RunFolder]:
    """2 learning rates x 4 windows x 2 seeds."""
    root = tmp_path_factory.mktemp("sixteen")
    return [
        scored_run(root, window, SKILL[window] + BETTER[lr], seed, {"train.lr": lr}, lr=lr)
        for lr, window, seed in itertools.product(BETTER, WINDOWS, (0, 1))
    ]


def test_two_rates_four_windows_two_seeds(sixteen: list[RunFolder]) -> None:
    found = compare(gather(sixteen))
    assert found.warnings == () and found.varied == ("train.lr",) and found.folded
    assert [(x.axes["train.lr"], x.window, len(x.rows)) for x in found.lines] == [
        (lr, window, 2) for lr in BETTER for window in WINDOWS
    ]
    for line in found.lines:
        lr, window = line.axes["train.lr"], line.window
        assert window is not None
        skill, smallest = SKILL[window] + BETTER[lr], SKILL[77] + BETTER[lr]
        ours = [(ranks(skill, seed) < 1).mean() for seed in (0, 1)]
        cell = line.scores["i2t_recall_at_1"]
        assert cell.by_seed == pytest.approx(ours) and cell.value == pytest.approx(np.mean(ours))
        assert cell.spread == pytest.approx(np.std(ours, ddof=1))
        assert cell.low is not None and cell.low < cell.value
        if window == 77:
            assert (line.baseline, line.deltas) == (None, {})
            continue
        theirs = [(ranks(smallest, seed) < 1).mean() for seed in (0, 1)]
        delta = line.deltas["i2t_recall_at_1"]
        assert delta.value == pytest.approx(np.mean(ours) - np.mean(theirs))
        each = np.mean([ranks(skill, s) < 1 for s in (0, 1)], axis=0)
        each = each - np.mean([ranks(smallest, s) < 1 for s in (0, 1)], axis=0)
        error = each.std() / np.sqrt(QUERIES)
        assert delta.low == pytest.approx(delta.value - 1.96 * error, abs=0.4 * error)
        assert delta.high == pytest.approx(delta.value + 1.96 * error, abs=0.4 * error)
        assert (delta.seeds, line.baseline) == (2, f"ctx77_{short_name('train.lr', lr)}"), (
            "its own rate's 77, seeds folded"
        )
        assert line.samples_to is not None and line.samples_to.by_seed[0] < 600


def test_the_rate_chosen_on_validation(sixteen: list[RunFolder]) -> None:
    found = compare(gather(sixteen), best_over=["train.lr"])
    assert [(x.window, {r.axes["train.lr"] for r in x.rows}) for x in found.lines] == [(w, {0.002}) for w in WINDOWS]
    assert found.varied == () and found.lines[3].baseline == found.lines[0].name
    assert found.choices[0].startswith("ctx77: train.lr 0.002, chosen on validation (R@1: 0.001 40.0, 0.002 45.0)")
    with pytest.raises(UserError, match=r"--best-over train\.lrr: not a declared axis; valid: train\.lr"):
        compare(gather(sixteen), best_over=["train.lrr"])


def test_the_smallest_window_is_the_goal_where_the_grid_is_not_whole(tmp_path: Path) -> None:
    """The first rate was tried at 512 only."""
    tried = ((1e-3, 512, 0.3), (2e-3, 77, 0.4), (2e-3, 512, 0.6))
    runs = [scored_run(tmp_path, w, skill, 0, {"train.lr": lr}, lr=lr) for lr, w, skill in tried]
    c77, c512 = compare(gather(runs), best_over=["train.lr"]).lines
    assert (c77.window, c512.window, c512.baseline) == (77, 512, c77.name)
    # Validation rises to half the skill at 300 and to all of it at 600.
    assert c77.samples_to is not None and c77.samples_to.value == 600
    assert c512.samples_to is not None and c512.samples_to.value == 400, "0.4, between 0.3 at 300 and 0.6 at 600"


def test_an_unfinished_run_of_a_rate_that_lost_stays_visible(sixteen: list[RunFolder], tmp_path: Path) -> None:
    asked = experiment(77, name="ctx77_lr3e-3_s0", lr=3e-3)
    late = make_run(tmp_path, asked, axes={"model.context_length": 77, "train.lr": 3e-3, "train.seed": 0})
    train(add_attempt(late, 0), 0, 300, 60, val={300: 0.9})
    found = compare(gather([*sixteen, late]), best_over=["train.lr"])
    assert [(x.name, x.counts) for x in found.lines][:2] == [
        ("ctx77_lr2e-3", True),
        ("ctx77_lr3e-3_s0", False),
    ]


def test_a_seed_that_only_one_window_has(tmp_path: Path) -> None:
    runs = [scored_run(tmp_path, w, 0.4 + w / 5120, seed) for w, seed in ((77, 0), (77, 1), (512, 1))]
    found = compare(gather(runs))
    assert found.warnings == ("ctx512: no run with seed 0, which other windows have",)
    c77, c512 = found.lines
    delta = c512.deltas["i2t_recall_at_1"]
    seed_one = float((ranks(0.4 + 0.1, 1) < 1).mean() - (ranks(0.4 + 77 / 5120, 1) < 1).mean())
    assert delta.seeds == 1 and delta.value == pytest.approx(seed_one), "the seed that both have"
    assert c77.scores["i2t_recall_at_1"].spread is not None


def test_a_missing_seed_and_one_that_failed_leave_the_others_means(tmp_path: Path) -> None:
    runs = [scored_run(tmp_path, w, 0.4, seed) for w in (77, 512) for seed in (0, 1)]
    failed = make_run(
        tmp_path, experiment(512, name="ctx512_s2", seed=2), axes={"model.context_length": 512, "train.seed": 2}
    )
    attempt = add_attempt(failed, 0)
    train(attempt, 0, 300, 60, val={300: 0.2})
    end(attempt, "crashed", 300, 100, "out of luck")
    found = compare(gather([*runs, failed]))
    assert [(x.name, len(x.rows), x.state) for x in found.lines] == [
        ("ctx77", 2, "finished, 2 seeds"),
        ("ctx512", 2, "finished, 2 seeds"),
        ("ctx512_s2", 1, "unfinished (300/1.0 k)"),
    ]
    assert found.warnings == (
        "ctx512_s2: unfinished (300/1.0 k), crashed: out of luck",
        "ctx77: no run with seed 2, which other windows have",
    )
    assert found.lines[2].scores == {} and "ctx512_s2" in markdown(found)


def test_runs_that_differ_undeclared_are_not_folded_as_seeds(tmp_path: Path) -> None:
    runs = [scored_run(tmp_path, w, 0.4, seed) for w in (77, 512) for seed in (0, 1)]
    odd = scored_run(tmp_path, 77, 0.9, 0, weight_decay=0.1)
    found = compare(gather([*runs, odd]), allow_differences=True)
    assert [(x.window, len(x.rows), x.marks) for x in found.lines] == [
        (77, 2, ()),
        (77, 1, ("train.weight_decay is 0.1",)),
        (512, 2, ()),
    ]
    assert [x.baseline for x in found.lines] == [None, "ctx77", "ctx77"]
    assert found.lines[2].deltas["i2t_recall_at_1"].value == pytest.approx(0)
    # Another name, and the same seed: the same weights twice are no two seeds.
    twin = finished_run(tmp_path, experiment(512, name="twin", seed=0), {1000: 0.1})
    assert [len(x.rows) for x in compare(gather([*runs, twin])).lines] == [2, 2, 1]


# ---- equal samples, goals ----------------------------------------------------------------------------------------


def half_done(runs: Path, window: int, seed: int = 0) -> RunFolder:
    axes = {"model.context_length": window, "train.seed": seed}
    run = make_run(runs, experiment(window, name=f"ctx{window}_s{seed}", seed=seed), axes=axes)
    train(add_attempt(run, 0), 0, 700, 60, val={300: 0.25, 600: 0.35})
    return run


def test_trimmed_to_the_least_advanced(tmp_path: Path) -> None:
    runs = [scored_run(tmp_path, 77, 0.4), half_done(tmp_path, 512)]
    queued = make_run(tmp_path, experiment(154, name="ctx154_s0"), axes={"model.context_length": 154})
    found = compare(gather([*runs, queued]), trim=True)
    assert found.cut == 600
    c77, c154, c512 = found.lines
    assert (c77.task, c77.counts, c512.counts, c154.counts) == ("val", True, True, False)
    assert (c77.scores["i2t_recall_at_1"].value, c512.scores["i2t_recall_at_1"].value) == (0.4, 0.35)
    assert c512.deltas["i2t_recall_at_1"].value == pytest.approx(-0.05)
    assert c512.deltas["i2t_recall_at_1"].low is None, "validation keeps no ranks"
    assert c512.samples == 600 and c512.state == "unfinished (700/1.0 k)"
    assert "all at 600 samples" in markdown(found).splitlines()[0]
    assert "not evaluated by then, and left out: ctx154_s0" in found.warnings
    said = "ctx512_s0: shown in curves, left out of means; --trim compares all at 600 samples"
    assert command.next_step(compare(gather(runs))) == said and command.next_step(found) is None
    drawn = draw(found).axes[0].lines
    assert all(max(line.get_xdata(), default=0) <= 600 for line in drawn if not line.get_label().startswith("best of"))


def evaluated_at(runs: Path, window: int, val: dict[int, float]) -> RunFolder:
    run = make_run(runs, experiment(window), axes={"model.context_length": window})
    train(add_attempt(run, 0), 0, 900, 60, val=val)
    return run


def test_trimmed_to_where_all_were_evaluated(tmp_path: Path) -> None:
    """77 every 300 samples, 512 every 200: 600 is the last that both have, not 77's 900 with 512's 800."""
    rows = [{300: 0.1, 600: 0.2, 900: 0.3}, {200: 0.1, 400: 0.15, 600: 0.25, 800: 0.4}]
    runs = [evaluated_at(tmp_path, w, val) for w, val in zip((77, 512), rows, strict=True)]
    found = compare(gather(runs), trim=True)
    assert found.cut == 600 and [x.scores["i2t_recall_at_1"].value for x in found.lines] == [0.2, 0.25]
    assert "all compared at 600 samples, on validation: the last evaluation that all have" in found.warnings
    assert str(command.next_step(compare(gather(runs)))).endswith("--trim compares all at 600 samples")


def test_runs_that_were_never_evaluated_at_the_same_samples(tmp_path: Path) -> None:
    rows = [{300: 0.1, 600: 0.2, 900: 0.3}, {200: 0.1, 500: 0.15, 800: 0.4}]
    found = compare(gather([evaluated_at(tmp_path, w, val) for w, val in zip((77, 512), rows, strict=True)]), trim=True)
    said = "UNEQUAL samples: no position at which all were evaluated up to 800: ctx77 at 600, ctx512 at 800"
    assert found.cut == 800 and said in found.warnings
    assert "UNEQUAL samples, each at its last evaluation up to 800 samples" in markdown(found).splitlines()[0]


def test_at_equal_samples_there_is_no_zero_shot(tmp_path: Path) -> None:
    """It is of the checkpoint that validation chose, wherever that stands."""
    runs = [scored_run(tmp_path, 77, 0.4), half_done(tmp_path, 512)]
    suite_record(runs[0], classes(hard=0.4))
    assert [x.accuracy for x in compare(gather(runs), trim=True).lines] == [None, None]


def test_goals_in_samples_and_hours(tmp_path: Path) -> None:
    """Restarted: what the first attempt lost is paid for, too."""
    run = make_run(tmp_path, experiment(77))
    train(add_attempt(run, 0), 0, 700, 60, val={300: 0.1, 600: 0.9})
    save_checkpoint(run, 500)
    second = add_attempt(run, 1000)
    train(second, 500, 1000, 1060, val={600: 0.3, 1000: 0.5})
    end(second, "finished", 1000, 1120)
    (line,) = compare(gather([run]), goal=0.4).lines
    assert line.samples_to_goal is not None and line.samples_to_goal.value == 800
    # 2 ranks: the first attempt ran 120 s (its last loss at 60 + 10 * 6), the second 80 s until it had seen 800.
    assert line.hours_to_goal is not None
    assert line.hours_to_goal.value == pytest.approx(2 * (120 + 80) / 3600)
    # From 0: triangle to 0.1 at 300, then 0.3 at 600, 0.5 at 1000.
    assert line.area is not None
    assert line.area.value == pytest.approx((300 * 0.05 + 300 * 0.2 + 400 * 0.4) / 1000)
    assert compare(gather([run]), goal=0.6).lines[0].samples_to_goal is None


# ---- suites, other windows, models from outside ------------------------------------------------------------------


def test_train_window_by_evaluation_window(tmp_path: Path) -> None:
    runs = [scored_run(tmp_path, w, 0.4 + w / 5120) for w in (77, 512)]
    for run in runs:
        window = run.experiment().model.context_length
        own, other = ranks(0.41, 3), ranks(0.5, 4)
        task = retrieval_task(
            own, own, **{f"w512/{k}": v for k, v in metrics(other, other).items()}, **{"w512/waste": 0.02}
        )
        far = retrieval_task(own, own, data="8" * 64)
        arrays = {"long/w512/i2t": other, "long/w512/t2i": other} if window == 77 else {}
        kinds = {"kind": "classification", "data": "1" * 64, "images": 90}
        tasks = {
            "long": task if window == 77 else retrieval_task(other, other),
            "far": far,
            "stain": {**kinds, "metrics": {"accuracy": window / 1000}},
            "shape": {**kinds, "metrics": {"accuracy": 0.5}},
            "labels": {**kinds, "metrics": {"auc": 0.9}},
        }
        suite_record(run, tasks, arrays)
    found = compare(gather(runs))
    assert [(x.task, x.window, x.evaluated) for x in found.lines] == [
        ("test", 77, 77),
        ("test", 77, 512),
        ("test", 512, 512),
        ("zoo/far", 77, 77),
        ("zoo/far", 512, 512),
    ]
    crossed = found.lines[1]
    assert crossed.state == "same weights" and crossed.hours is None and crossed.waste == 0.02
    expected = float((ranks(0.5, 4) < 1).mean() - (ranks(0.4 + 77 / 5120, 0) < 1).mean())
    assert crossed.deltas["i2t_recall_at_1"].value == pytest.approx(expected)
    assert crossed.deltas["i2t_recall_at_1"].low is not None
    assert [x.accuracy.value for x in found.lines if x.accuracy] == pytest.approx(
        [(0.077 + 0.5) / 2, (0.512 + 0.5) / 2]
    )
    text = markdown(found)
    assert "| 77 / 512 |" in text and "### zoo/far, n = 400" in text and "| zero-shot |" in text


def test_queries_are_the_captions_that_were_asked(tmp_path: Path) -> None:
    """Of five captions an image open_clip asks the first."""
    run = scored_run(tmp_path, 77, 0.4)
    r = ranks(0.5, 3)
    task = retrieval_task(r, r, data="8" * 64, convention="open_clip") | {"captions": 5 * QUERIES}
    suite_record(run, {"far": task})
    line = compare(gather([run])).lines[1]
    i2t, t2i = (line.scores[f"{side}_recall_at_1"] for side in ("i2t", "t2i"))
    assert line.scored[0].queries == {"i2t": QUERIES, "t2i": QUERIES}
    assert (t2i.low, t2i.high) == (i2t.low, i2t.high), "as many queries, as many hits: the same interval"


def classes(**accuracy: float) -> dict[str, Any]:
    """Classification tasks by name."""
    facts = {"kind": "classification", "data": "1" * 64, "images": 90}
    return {name: {**facts, "metrics": {"accuracy": value}} for name, value in accuracy.items()}


def test_zero_shot_is_a_mean_over_the_tasks_that_all_have(tmp_path: Path) -> None:
    runs = [scored_run(tmp_path, w, 0.4) for w in (77, 154, 512)]
    suite_record(runs[0], classes(hard=0.4, easy=0.9))
    suite_record(runs[1], classes(hard=0.5), suite_hash="6" * 64)
    suite_record(runs[2], classes(hard=0.3, easy=0.8))
    found = compare(gather(runs))
    assert [x.accuracy and x.accuracy.value for x in found.lines] == [0.4, 0.5, 0.3], (
        "0.65 of two tasks is no 0.5 of one"
    )
    assert "| **50.0** |" in markdown(found) and "**40.0**" not in markdown(found)
    assert found.warnings == (
        "ctx154_s0: zoo/easy was not scored: left out of the zero-shot mean of all",
        "ctx154_s0: suite zoo is not that of the others (its hash differs): zero-shot may be of other data, "
        "classes or templates",
    )


def test_zero_shot_of_some_seeds_is_marked(tmp_path: Path) -> None:
    runs = [scored_run(tmp_path, w, 0.4, seed) for w in (77, 512) for seed in (0, 1)]
    for run, value in zip(runs, (0.4, 0.5, 0.9), strict=False):
        suite_record(run, classes(hard=value))
    found = compare(gather(runs))
    assert "| 90.0 (1 of 2) |" in markdown(found), "and it is not the best"
    assert found.warnings == ("ctx512_s1: no zero-shot task was scored (zoo/hard of others)",)


def test_a_suite_on_another_checkpoint_is_not_taken_for_the_chosen(tmp_path: Path) -> None:
    run = scored_run(tmp_path, 77, 0.4)
    suite_record(run, {"far": retrieval_task(ranks(0.4, 1), ranks(0.4, 1), data="8" * 64)}, checkpoint="step-00000003")
    found = compare(gather([run]))
    assert [x.task for x in found.lines] == ["test"]
    assert found.warnings == ("ctx77_s0: suite zoo: not evaluated at step-00000006, only at step-00000003",)


def test_models_from_outside_and_figures_from_papers(tmp_path: Path) -> None:
    runs = [scored_run(tmp_path, w, 0.4 + w / 5120) for w in (77, 512)]
    folder = tmp_path / "models" / "openai--clip-0123abcd"
    i2t = ranks(0.3, 9)
    record = {
        "suite": "zoo",
        "weights": "4" * 64,
        "checkpoint": "whole",
        "context_length": 77,
        "convention": "strict",
        "tasks": {"long": retrieval_task(i2t, i2t)},
    }
    write(place(folder / "evaluations", "zoo", "whole"), record, {"long/i2t": i2t, "long/t2i": i2t})
    write_json(folder / "model.json", {"source": "openai/clip", "weights": "4" * 64, "context_length": 77})
    quotes = tmp_path / "references.yaml"
    quotes.write_text(
        "rows:\n- {name: A & B_c, source: 'arXiv 1, table 2', window: 256, metrics: {i2t_recall_at_1: 0.735}}\n"
    )
    targets = ["tiny", "models/openai"]
    result, read = command.run(targets, tmp_path / "out", Options(), quotes, tmp_path)
    assert {r.path for r in read} == {r.path for r in runs}
    kinds = [(x.kind, x.name, x.task, x.window) for x in result.comparison.lines]
    assert kinds[2:] == [("external", "openai--clip", "test", 77), ("reported", "A & B_c", "test", 256)]
    outside, quoted = result.comparison.lines[2:]
    expected = float((i2t < 1).mean() - (ranks(0.4 + 77 / 5120, 0) < 1).mean())
    assert outside.deltas["i2t_recall_at_1"].value == pytest.approx(expected)
    assert outside.deltas["i2t_recall_at_1"].low is not None, "the same queries, paired"
    assert quoted.scores["i2t_recall_at_1"].low is None and quoted.deltas == {}
    text = (tmp_path / "out" / "table.md").read_text()
    assert "reported, not measured" in text and "**73.5" not in text, "what was not measured here is not the best here"
    assert [c for c in draw(result.comparison).axes[0].get_legend_handles_labels()[1] if "best of" not in c] == [
        "ctx77_s0",
        "ctx512_s0",
    ]


def outside(root: Path, tasks: dict[str, Any]) -> None:
    """A model that no run has trained, scored on the suite ``zoo``."""
    folder = root / "models" / "openai--clip-0123abcd"
    record = {"suite": "zoo", "checkpoint": "model", "context_length": 77, "tasks": tasks}
    write(place(folder / "evaluations", "zoo", "model"), record, {})
    write_json(folder / "model.json", {"source": "openai/clip", "context_length": 77})


def test_other_captions_of_the_same_shards_are_another_test(tmp_path: Path) -> None:
    """The runs were trained on ``txt``; shards are the same by hash, whatever text is taken of them."""
    runs = [scored_run(tmp_path, w, 0.4 + w / 5120) for w in (77, 512)]
    r = ranks(0.9, 3)
    for run in runs:
        suite_record(
            run, {"long": retrieval_task(r, r, text="long_caption"), "model": retrieval_task(r, r, text="txt")}
        )
    outside(tmp_path, {"long": retrieval_task(r, r, text="long_caption"), "model": retrieval_task(r, r, text="alt")})
    found = command.run(["tiny", "models"], tmp_path / "out", Options(), None, tmp_path)[0].comparison
    assert [(x.task, x.name) for x in found.lines] == [
        ("test", "ctx77_s0"),
        ("test", "ctx512_s0"),
        *(("zoo/long", name) for name in ("ctx77_s0", "ctx512_s0", "openai--clip")),
        ("zoo/model", "openai--clip"),
    ]
    first, *_, last = found.lines
    assert first.scores["i2t_recall_at_1"].value == float((ranks(0.4 + 77 / 5120, 0) < 1).mean())
    assert last.deltas == {} and found.lines[4].deltas["i2t_recall_at_1"].value == 0
    said = [w for w in found.warnings if w.startswith("openai--clip: zoo/model")]
    assert said == [
        "openai--clip: zoo/model at window 77 is of the test set's shards with text alt, the runs' test with txt: not "
        "compared with it (text: txt in the suite's task, and longclip evaluate, does that)"
    ]


def test_two_test_sets_of_one_model_are_two(tmp_path: Path) -> None:
    """Sweeps that were tested on other data, side by side."""
    scored_run(tmp_path, 77, 0.4)
    (tmp_path / "tiny").rename(tmp_path / "first")
    second = scored_run(tmp_path, 77, 0.4)
    write_json(second.evaluations / "test.json", read_json(second.evaluations / "test.json") | {"dataset": "8" * 64})
    r, q = ranks(0.9, 3), ranks(0.2, 3)
    outside(tmp_path, {"a": retrieval_task(r, r), "b": retrieval_task(q, q, data="8" * 64)})
    found = command.run(["first", "tiny", "models"], tmp_path / "out", Options(), None, tmp_path)[0].comparison
    theirs = [x for x in found.lines if x.kind == "external"]
    assert [(x.task, x.scores["i2t_recall_at_1"].value) for x in theirs] == [
        ("test", float((one < 1).mean())) for one in (r, q)
    ]


def test_a_task_that_took_each_model_s_own_text_is_a_table_for_each(tmp_path: Path) -> None:
    run = scored_run(tmp_path, 77, 0.4)
    r = ranks(0.5, 3)
    suite_record(run, {"far": retrieval_task(r, r, data="8" * 64, text="long_caption")})
    outside(tmp_path, {"far": retrieval_task(r, r, data="8" * 64, text="txt")})
    found = command.run(["tiny", "models"], tmp_path / "out", Options(), None, tmp_path)[0].comparison
    assert [x.task for x in found.lines] == ["test", "zoo/far (long_caption)", "zoo/far (txt)"]
    assert found.lines[2].deltas == {} and "### zoo/far (txt), n = 400" in markdown(found)


def test_another_convention_on_the_test_set_is_a_task_by_itself(tmp_path: Path) -> None:
    run = scored_run(tmp_path, 77, 0.4)
    r, w512 = ranks(0.5, 3), {f"w512/{k}": v for k, v in metrics(ranks(0.6, 1), ranks(0.6, 1)).items()}
    ties = retrieval_task(r, r, text="txt", convention="open_clip", **w512)
    suite_record(run, {"ties": ties, "plain": retrieval_task(r, r, text="txt", kept16=0.1, **w512)})
    found = compare(gather([run]))
    assert [(x.task, x.evaluated) for x in found.lines] == [
        ("test", 77),
        ("test", 512),
        ("zoo/ties", 77),
        ("zoo/ties", 512),
    ]
    assert "kept16" in found.lines[0].scores


def test_two_tasks_on_the_test_set_are_both_of_it(tmp_path: Path) -> None:
    run = scored_run(tmp_path, 77, 0.4)
    r = ranks(0.5, 3)
    w512 = metrics(ranks(0.6, 1), ranks(0.6, 1))
    both = [{f"w512/{k}": v for k, v in {**w512, probe: 0.2}.items()} for probe in ("kept16", "shuffled")]
    suite_record(run, {f"t{i}": retrieval_task(r, r, **more) for i, more in enumerate(both)})
    found = compare(gather([run]))
    assert [(x.task, x.evaluated) for x in found.lines] == [("test", 77), ("test", 512)]
    assert {"kept16", "shuffled"} <= set(found.lines[1].scores), "the second is not lost"


def test_models_alone(tmp_path: Path) -> None:
    folder = tmp_path / "models" / "openai--clip-0123abcd"
    i2t = ranks(0.3, 9)
    record = {"suite": "zoo", "checkpoint": "whole", "context_length": 77, "tasks": {"far": retrieval_task(i2t, i2t)}}
    write(place(folder / "evaluations", "zoo", "whole"), record, {"far/i2t": i2t, "far/t2i": i2t})
    with pytest.raises(UserError, match="no such model"):
        command.run(["models/none"], tmp_path / "out", Options(), None, tmp_path)
    write_json(folder / "model.json", {"source": "openai/clip", "context_length": 77})
    result, read = command.run(["models"], tmp_path / "out", Options(), None, tmp_path)
    assert read == [] and [(x.kind, x.task) for x in result.comparison.lines] == [("external", "zoo/far")]
    assert result.files[1].read_text().startswith("openai--clip: trained by no run here")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("rows:\n- {name: x, metrics: {i2t_recall_at_1: 0.7}}\n", "references.yaml:2: rows.0.source: missing"),
        (
            "rows:\n- name: x\n  source: y\n  metrics: {i2t_recal_at_1: 0.7}\n",
            "references.yaml:4: rows.0.metrics.i2t_recal_at_1: unknown key; did you mean i2t_recall_at_1?",
        ),
        (
            "rows:\n- name: x\n  source: y\n  metrics:\n    accuracy: 73.5\n",
            "references.yaml:5: rows.0.metrics.accuracy: is 73.5; input should be less than or equal to 1",
        ),
        ("rows: []\n", "references.yaml:1: rows: "),
    ],
)
def test_mistakes_in_references(text: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "references.yaml").write_text(text)
    with pytest.raises(ExperimentError) as caught:
        read_references(tmp_path / "references.yaml")
    assert said in str(caught.value)


# ---- what is drawn -----------------------------------------------------------------------------------------------


def drawn(runs: list[RunFolder], panel: int) -> dict[str, np.ndarray]:
    """(x, y) of every line of a panel, by label."""
    lines = draw(compare(gather(runs))).axes[panel].lines
    return {str(line.get_label()): np.asarray(line.get_xydata()) for line in lines}


def test_restarted_unfinished_and_missing_runs_are_drawn_as_they_are(tmp_path: Path) -> None:
    whole = finished_run(tmp_path, experiment(77), {500: 0.2, 1000: 0.3})
    torn = make_run(tmp_path, experiment(512))
    train(add_attempt(torn, 0), 0, 700, 60, val={300: 0.1, 600: 0.9})
    save_checkpoint(torn, 500)
    train(add_attempt(torn, 1000), 500, 800, 1060, val={600: 0.29})
    queued = make_run(tmp_path, experiment(154))
    runs = [whole, torn, queued]
    recall = drawn(runs, 0)
    assert recall["ctx77"].tolist() == [[500, 20], [1000, 30]]
    assert recall["ctx512 (unfinished)"].tolist() == [[300, 10], [600, pytest.approx(29)]], "0.9 was lost"
    assert recall["ctx154 (unfinished): nothing yet"].tolist() == []
    loss = drawn(runs, 1)["ctx512 (unfinished)"]
    assert loss[:, 0].tolist() == list(range(100, 801, 100))
    paid = drawn(runs, 2)["ctx512 (unfinished)"]
    # 2 ranks: 81 s to the first; 120 s of the first attempt and 61 s of the second to the other.
    assert paid[:, 0] == pytest.approx([2 * 81 / 3600, 2 * (120 + 61) / 3600])
    ran = drawn(runs, 3)["ctx512 (unfinished)"]
    assert ran[:, 0] == pytest.approx([81 / 3600, (120 + 61) / 3600]), "not the 880 s in the queue"


def test_seeds_are_a_line_with_a_band(tmp_path: Path) -> None:
    a = finished_run(tmp_path, experiment(77, name="a_s0"), {500: 0.2, 1000: 0.3})
    b = finished_run(tmp_path, experiment(77, name="a_s1", seed=1), {500: 0.4, 900: 0.5})
    figure = draw(compare(gather([a, b])))
    panel = figure.axes[0]
    (line, *_) = panel.lines
    assert line.get_label() == "a (2 seeds)"
    # To where both have come; in between on straight lines: a is 0.28 at 900.
    assert np.asarray(line.get_xydata()) == pytest.approx(np.array([[500, 30], [900, 39]]))
    (band,) = panel.collections
    corners = band.get_paths()[0].vertices
    spread = 100 * np.std([0.2, 0.4], ddof=1)
    assert corners[:, 1].min() == pytest.approx(30 - spread)


def test_nothing_is_drawn_across_a_hole_in_the_journal(tmp_path: Path) -> None:
    run = make_run(tmp_path, experiment(77, samples=8000))
    attempt = add_attempt(run, 0)
    train(attempt, 0, 8000, 60)
    lines = attempt.journal.read_text().splitlines(keepends=True)
    attempt.journal.write_text("".join(lines[:30] + lines[60:70]) + lines[70][:20])
    loss = drawn([run], 1)["ctx77 (unfinished)"]
    assert np.isnan(loss[:, 1]).sum() == 1
    where = loss[np.isnan(loss[:, 1]), 0][0]
    assert 3000 < where < 6100 and loss[-1, 0] == 7000


def test_the_truncation_probe(tmp_path: Path) -> None:
    runs = [scored_run(tmp_path, w, 0.4 + w / 5120) for w in (77, 512)]
    assert probe(compare(gather(runs))) is None
    for run in runs:
        r = ranks(0.4, 1)
        kept = {
            f"kept{k}/mean_recall_at_1": k / 1000 for k in (16, 77, 512) if k <= run.experiment().model.context_length
        }
        tasks = {"far": retrieval_task(r, r, data="8" * 64, **kept), "same": retrieval_task(r, r, **kept)}
        suite_record(run, tasks)
    figure = probe(compare(gather(runs)))
    assert figure is not None
    lines = {str(x.get_label()): np.asarray(x.get_xydata()).tolist() for x in figure.axes[0].lines}
    assert lines["ctx77_s0"] == [[16, 1.6], [77, 7.7]]
    assert lines["ctx512_s0"] == [[16, 1.6], [77, 7.7], [512, 51.2]]
    assert len(figure.axes) == 2, "a suite on the test set itself adds its probe to the test's line"
    (first, *_) = compare(gather(runs)).lines
    assert first.scores["i2t_recall_at_1"].value == float((ranks(0.4 + 77 / 5120, 0) < 1).mean()), "the test's own"
    files = collect(runs, tmp_path / "out").files
    assert [f.name for f in files if f.name.startswith("probe")] == ["probe.png", "probe.svg", "probe.pdf"]


def test_lines_are_told_apart_without_colour(tmp_path: Path) -> None:
    runs = [finished_run(tmp_path, experiment(w), {1000: 0.1}) for w in (77, 154, 256, 512)]
    lines = [x for x in draw(compare(gather(runs))).axes[0].lines if re.fullmatch(r"ctx\d+", str(x.get_label()))]
    assert len({(x.get_linestyle(), str(x.get_marker())) for x in lines}) == 4
    assert len({str(x.get_marker()) for x in lines}) == 4


def test_what_is_said_of_a_line_is_stable() -> None:
    """Reports are built on these."""
    assert {"kind", "name", "task", "window", "evaluated", "axes", "rows", "scores", "deltas", "state"} <= set(
        Line.__dataclass_fields__
    )
