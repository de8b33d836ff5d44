"""Suites: scored by the job that trains, and by ``longclip evaluate`` for runs and for models that no run has made."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from longclip import cli
from longclip.errors import LongclipError, UserError
from longclip.evaluate.ranking import summary
from longclip.evaluate.suite import read_suite
from longclip.experiment.load import load
from longclip.launch import evaluation, evaluation_jobs
from longclip.launch.plan import plan, problems
from longclip.launch.site import Site
from longclip.run.evaluations import cached, read_arrays
from longclip.run.folder import RunFolder, read_json
from tests.data.test_loader import picture
from tests.helpers import experiment, finished_run
from tests.launch.small import environment, longclip, make_sweep, the_run
from tests.launch.test_moved import NOBODY, content

PAIRS = "{kind: retrieval, data: ../test, windows: [own, 7, 512], strata: [5], probes: [kept, shuffled, first]}"
FOLDER = "{kind: retrieval, data: ../figures, convention: clip_benchmark}"
CLASSES = "{kind: classification, reader: images, data: ../classes, classes: [w1, w2], templates: ['{} w3']}"
SETS = [
    word
    for each in (
        "evaluate.suites=[./suites/whole.yaml, ./suites/half.yaml]",
        "train.samples=480",
        "checkpoint.every=8 steps",
    )
    for word in ("--set", each)
]


@pytest.fixture(scope="module")
def root() -> Iterator[Path]:
    """Data and suites, in a folder that every user can reach."""
    root = Path(tempfile.mkdtemp(prefix="longclip-evaluate-"))
    root.chmod(0o755)
    make_sweep(root, (5,))
    (root / "suites").mkdir()
    for k, name in enumerate(("figures", "classes/w1", "classes/w2")):
        (root / name).mkdir(parents=True)
        for i in range(4):
            (root / name / f"{i}.png").write_bytes(picture(10 * k + i))
    rows = [f"{i}.png,w{i} w{i + 1}\n{i}.png,w{i + 5}\n" for i in range(4)]
    (root / "figures" / "captions.csv").write_text("image,caption\n" + "".join(rows))
    suite(root, "whole", f"pairs: {PAIRS}", f"folder: {FOLDER}", f"classes: {CLASSES}")
    suite(root, "half", f"pairs: {PAIRS}")
    yield root
    shutil.rmtree(root)


def suite(root: Path, name: str, *tasks: str) -> Path:
    file = root / "suites" / f"{name}.yaml"
    file.write_text("tasks:\n" + "".join(f"  {task}\n" for task in tasks))
    return file


@pytest.fixture(scope="module")
def run(root: Path) -> RunFolder:
    """Trained on one rank, scored on two suites at its end."""
    longclip("train", root / "small" / "ctx5.yaml", *SETS, cwd=root)
    return the_run(root / "runs", "ctx5")


@pytest.fixture
def evaluate(root: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """``longclip evaluate ...`` in this process; what it printed."""
    before = dict(os.environ)
    monkeypatch.chdir(root)
    torch.set_num_threads(1)

    def call(*words: str | Path, on: str = "debug") -> str:
        done = CliRunner().invoke(cli.app, ["evaluate", *map(str, words), "--on", on], catch_exceptions=True)
        if done.exception is not None:
            raise done.exception
        return done.output

    yield call
    os.environ.clear()
    os.environ.update(before)


def record_of(run: RunFolder, name: str, step: str = "") -> dict[str, Any]:
    """Of the best checkpoint, if not of another."""
    best = read_json(run.evaluations / "test.json")["checkpoint"]
    return read_json(run.evaluations / name / f"{step or best}.json")


def test_the_job_that_trained_it_has_scored_its_best_checkpoint(run: RunFolder) -> None:
    test = read_json(run.evaluations / "test.json")
    best = test["checkpoint"]
    record = record_of(run, "whole", best)
    assert (record["checkpoint"], record["samples"]) == (best, test["samples"])
    manifest = read_json(run.checkpoints / best / "manifest.json")
    assert record["weights"] == manifest["files"]["weights.safetensors"]["sha256"]
    assert record["convention"] == "strict, clip_benchmark" and record["context_length"] == 5
    tasks = record["tasks"]
    assert list(tasks) == ["pairs", "folder", "classes"]
    for key, value in test["metrics"].items():  # the same pairs as data.test
        assert tasks["pairs"]["pairs" if key == "pairs" else "metrics"] == value or tasks["pairs"]["metrics"][
            key
        ] == pytest.approx(value), key
    assert tasks["pairs"]["skipped"] == {"w512": "the text tower has 64 positions"}
    assert tasks["folder"]["captions"] == 8 and tasks["folder"]["images"] == 4
    assert 0 <= tasks["classes"]["metrics"]["accuracy"] <= 1
    arrays = read_arrays(run.evaluations / "whole" / f"{best}.json")
    assert {"pairs/i2t", "pairs/t2i", "pairs/tokens", "pairs/w7/i2t", "folder/i2t"} <= set(arrays)
    assert summary(arrays["pairs/w7/t2i"], "w7/t2i").items() <= tasks["pairs"]["metrics"].items()


def test_the_test_set_s_ranks_are_beside_its_scores(run: RunFolder) -> None:
    test, arrays = read_json(run.evaluations / "test.json"), read_arrays(run.evaluations / "test.json")
    assert set(arrays) == {"test/i2t", "test/t2i", "test/tokens"}
    for side in ("i2t", "t2i"):
        assert summary(arrays[f"test/{side}"], side).items() <= test["metrics"].items()
        assert arrays[f"test/{side}"].dtype == np.int32
    lengths = arrays["test/tokens"].astype(int)
    assert test["metrics"]["waste"] == np.maximum(lengths - 5, 0).sum() / lengths.sum()


def test_what_travels_is_the_suite_and_not_its_path(run: RunFolder) -> None:
    records = read_json(run.attempts / "0001" / "suites.json")["suites"]
    assert [record["suite"]["name"] for record in records] == ["whole", "half"]
    assert records[0]["suite"]["tasks"]["pairs"]["text"] == "txt"
    paths = read_json(run.attempts / "0001" / "submitted.json")["paths"]
    assert paths["evaluate.suites.half.pairs"].endswith("/test")


def test_a_job_that_was_killed_scores_what_is_missing(root: Path, run: RunFolder) -> None:
    """As if it had been killed after the first suite: the next attempt trains nothing, and computes the second."""
    best = read_json(run.evaluations / "test.json")["checkpoint"]
    first, second = (run.evaluations / name / f"{best}.json" for name in ("whole", "half"))
    before, expected = first.stat().st_mtime_ns, read_json(second)["tasks"]
    second.unlink()
    (run.attempts / "0001" / "ended.json").unlink()
    said = longclip("train", root / "small" / "ctx5.yaml", *SETS, "--set", "engine.zero_stage=1", cwd=root)
    assert "finished" in said and "half/pairs at" in said and "whole/pairs at" not in said
    assert first.stat().st_mtime_ns == before
    assert read_json(second)["tasks"] == expected


def test_a_checkpoint_afterwards_gives_the_job_s_figures(root: Path, run: RunFolder, evaluate: Any) -> None:
    """Without DeepSpeed and on two ranks, what one gave in the job; the other checkpoints besides."""
    best = read_json(run.evaluations / "test.json")["checkpoint"]
    file = suite(root, "again", f"first: {PAIRS}", f"second: {FOLDER}", f"third: {CLASSES}")
    said = evaluate("small", "--suite", file, "--checkpoint", "all", on="local")
    steps = sorted(path.name for path in run.checkpoints.glob("step-*"))
    assert len(steps) > 1 and f"{len(steps)} records; next: longclip collect small" in said
    assert said.count("no window 512: the text tower has 64 positions") == len(steps)
    assert "4 images, 8 captions, CLIP_benchmark's convention: any caption of an image, ties by index" in said
    again, once = record_of(run, "again", best), record_of(run, "whole", best)
    for name, other in (("first", "pairs"), ("second", "folder"), ("third", "classes")):
        assert again["tasks"][name] == once["tasks"][other]
    assert again["weights"] == once["weights"] and again["suite_hash"] != once["suite_hash"]

    times = {step: (run.evaluations / "again" / f"{step}.json").stat().st_mtime_ns for step in steps}
    (run.evaluations / "again" / f"{steps[0]}.json").unlink()
    said = evaluate(run.name, "--suite", file, "--checkpoint", "all")
    assert said.count("there already") == len(steps) - 1
    for step in steps:
        kept = (run.evaluations / "again" / f"{step}.json").stat().st_mtime_ns == times[step]
        assert kept == (step != steps[0])


def test_under_another_name_a_suite_is_the_same(root: Path, run: RunFolder, evaluate: Any) -> None:
    text = (root / "suites" / "half.yaml").read_text()
    (root / "elsewhere").mkdir()
    (root / "elsewhere" / "named.yaml").write_text(f"name: other\n{text}")
    said = evaluate("ctx5", "--suite", root / "elsewhere" / "named.yaml", on="local")
    assert "there already" in said and "half" in said
    loud = json.loads(evaluate("ctx5", "--suite", root / "suites" / "half.yaml", "--json", on="local"))
    assert [record["suite"] for record in loud] == ["half"] and "file" in loud[0]


def test_an_export_stands_in_the_same_table(root: Path, run: RunFolder, evaluate: Any) -> None:
    longclip("export", run.path, "--to", root / "export", cwd=root)
    said = evaluate(root / "export", "--suite", root / "suites" / "whole.yaml")
    (model,) = [path.parent for path in (root / "runs" / "models").glob("*/model.json")]
    about = read_json(model / "model.json")
    assert model.name == f"export-{about['weights'][:8]}" and about["context_length"] == 5
    assert about["source"] == str(root / "export") and "next: longclip collect models" in said
    record, once = read_json(model / "evaluations" / "whole" / "model.json"), record_of(run, "whole")
    assert record["samples"] is None and record["weights"] == about["weights"]
    for name, task in once["tasks"].items():
        assert record["tasks"][name]["metrics"] == pytest.approx(task["metrics"], abs=1e-5), name
    assert "there already" in evaluate("export", "--suite", root / "suites" / "whole.yaml", on="local")


def test_somebody_else_s_runs_are_read_and_not_touched(root: Path, run: RunFolder, evaluate: Any) -> None:
    file = suite(root, "theirs", f"only: {FOLDER}")
    out = root / "theirs"
    out.mkdir(mode=0o777)
    become = ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups"] if os.getuid() == 0 else []
    if become and shutil.which("setpriv") is None:
        pytest.skip("no setpriv (util-linux) to become another user with")
    version = [*become, sys.executable, "-m", "longclip.cli", "--version"]
    if subprocess.run(version, cwd=out, capture_output=True, env={**environment(), "HOME": str(out)}).returncode != 0:
        pytest.skip("this Python cannot be run by another user")
    for path in (root / "runs", *(root / "runs").rglob("*")):
        path.chmod(path.stat().st_mode & ~0o222 | 0o444)
    before = content(root / "runs")
    try:
        command = [*become, sys.executable, "-m", "longclip.cli", "evaluate", str(run.path), "--suite", str(file)]
        env = {**environment(), "HOME": str(out), "PYTHONDONTWRITEBYTECODE": "1"}
        done = subprocess.run(command, cwd=out, capture_output=True, text=True, env=env)
        assert done.returncode == 3 and "Permission denied" in done.stderr and "--out DIR" in done.stderr, done.stderr
        evaluate(run.path, "--suite", file, "--out", out)  # we could write there, and do not
        assert content(root / "runs") == before
        (record,) = (out / "small" / run.name / "evaluations" / "theirs").glob("*.json")
        assert read_json(record)["tasks"]["only"]["images"] == 4
        assert "there already" in evaluate(run.path, "--suite", file, "--out", out)
    finally:
        for path in (root / "runs", *(root / "runs").rglob("*")):
            path.chmod(path.stat().st_mode | 0o200)


@pytest.mark.parametrize(
    ("task", "more", "said"),
    [
        ("a: {kind: retrieval, data: ../test, windoes: [own]}", (), "broken.yaml:2: tasks.a.windoes: unknown key; did"),
        ("a: {kind: retrieval, data: ../test, windows: [own, 3]}", (), "tasks.a.windows: hold 3; valid is own, or a"),
        ("a: {kind: retrieval, data: ../test, strata: [9, 5]}", (), "tasks.a.strata: are [9, 5]; valid are bounds"),
        ("a: {kind: retrieval, data: ../test, text: '{'}", (), "tasks.a.text: is '{'"),
        ("a: {data: ../test}", (), "tasks.a.kind: missing or unknown; valid: retrieval, classification"),
        ("a: {kind: retrieval, data: ../nowhere}", (), "suite broken: a: no such folder"),
        ("a: {kind: retrieval, data: nowhere}", (), "dataset 'nowhere' is not in site profile"),
        ("a: {kind: retrieval, data: ../test, text: shrt}", (), "has no text 'shrt' (text)"),
        (f"a: {PAIRS}", ("--checkpoint", "newest"), "--checkpoint newest: valid is best, last, all, or a step"),
        (f"a: {PAIRS}", ("--checkpoint", "7"), "has no checkpoint step-00000007"),
        (f"a: {PAIRS}", ("--suite", "suites/broken.yaml"), "two suites are called 'broken'"),
        (f"a: {PAIRS}", ("ctx9",), "ctx9: no such run or sweep"),
        (f"a: {PAIRS}", ("--suite", "suites/none.yaml"), "no such suite: suites/none.yaml"),
        (f"a: {PAIRS}", ("--on", "moon"), "--on moon: valid is slurm, local or debug"),
    ],
)
def test_a_mistake_is_one_line_before_anything_begins(
    root: Path, run: RunFolder, evaluate: Any, task: str, more: tuple[str, ...], said: str
) -> None:
    file = suite(root, "broken", task)
    with pytest.raises(UserError) as caught:
        evaluate("small", "--suite", file, *more, on="slurm") if more[:1] != ("--on",) else evaluate(
            "small", "--suite", file, on=more[1]
        )
    assert said in caught.value.message, caught.value.message
    assert not list(run.evaluations.glob("broken/*"))


def test_a_run_without_checkpoints(root: Path, run: RunFolder, tmp_path: Path) -> None:
    bare = finished_run(tmp_path, experiment(77), {500: 0.2, 1000: 0.3})
    shutil.rmtree(bare.checkpoints)
    for which in ("all", "best"):
        with pytest.raises(UserError, match="has no checkpoint yet"):
            evaluation.plan(["tiny"], [read_suite(root / "suites" / "half.yaml")], which, Site(runs=tmp_path))


def test_a_hub_id_that_is_not_to_be_had(root: Path, evaluate: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(LongclipError, match=r"no such run or sweep.*as a hub id: some/model"):
        evaluate("some/model", "--suite", root / "suites" / "half.yaml")


def test_submit_checks_suites_before_it_queues(root: Path) -> None:
    def problem(*suites: str) -> str:
        loaded = load([root / "small" / "ctx5.yaml"], [f"evaluate.suites=[{', '.join(suites)}]", "train.lr=1e-3"])
        found = problems(plan(loaded, Site(runs=root / "never")))
        return found[0].message if found else ""

    assert problem(str(root / "suites" / "half.yaml")) == ""
    assert "evaluate.suites.0: no such suite" in problem(str(root / "nowhere.yaml"))
    broken = suite(root, "broken", "a: {kind: retrieval, data: ../nowhere}")
    half = str(root / "suites" / "half.yaml")
    assert "evaluate.suites.1: suite broken: a: no such folder" in problem(half, str(broken))
    assert "another suite is called 'half', too" in problem(half, half)
    suite(root, "broken", "a: {kind: retrieval}")
    said = longclip("check", root / "small", "--set", f"evaluate.suites=[{broken}]", cwd=root, code=2)
    assert "broken.yaml:2: tasks.a.data: missing" in said


def test_data_that_changed_are_not_scored_as_what_they_were(root: Path, run: RunFolder, evaluate: Any) -> None:
    file = suite(root, "moving", f"only: {FOLDER}")
    (unit,) = evaluation.plan(["ctx5"], [read_suite(file)], "best", Site(runs=root / "runs"))
    rows = (root / "figures" / "captions.csv").read_text()
    (root / "figures" / "captions.csv").write_text(rows + "0.png,w9\n")
    try:
        with pytest.raises(UserError, match=r"moving: only: .*figures has changed since"):
            evaluation_jobs.here(lambda: [unit])
        assert cached(run.evaluations, unit.spec["about"]["weights"], unit.suites[0].hash) is None
        evaluate("ctx5", "--suite", file)
        assert record_of(run, "moving", unit.spec["about"]["checkpoint"])["tasks"]["only"]["captions"] == 9
    finally:
        (root / "figures" / "captions.csv").write_text(rows)
