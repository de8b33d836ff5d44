"""The page about a run, and what ``diff`` says of two."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from longclip.errors import UserError
from longclip.experiment.load import load
from longclip.launch.diff import Comparison, compare
from longclip.launch.plan import plan
from longclip.launch.show import facts, page
from longclip.launch.site import Site
from longclip.run.folder import RunFolder, read_json, write_json
from tests.helpers import add_attempt, end, experiment, make_run, save_checkpoint, save_test, train
from tests.launch.small import longclip, make_sweep


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    """Killed at 600 samples, continued at 400, finished at 1,000; best at 800."""
    run = make_run(tmp_path / "runs", experiment())
    first = add_attempt(run, 0)
    train(first, 0, 600, 60)
    save_checkpoint(run, 400)
    second = add_attempt(run, 1000, ranks=4)
    train(second, 400, 1000, 1060, val={800: 0.3})
    for samples in (800, 1000):
        save_checkpoint(run, samples)
    newest = run.checkpoints / "step-00000010" / "state.json"
    write_json(newest, {**read_json(newest), "best": {"checkpoint": "step-00000008", "value": 0.3, "samples": 800}})
    (run.checkpoints / "step-00000004" / "pinned").touch()
    (run.checkpoints / "step-00000008" / "weights.safetensors").write_bytes(bytes(3 * 2**20))
    (run.checkpoints / "step-00000006").mkdir()
    (run.checkpoints / "step-00000006").rename(run.checkpoints / "broken-step-00000006")
    save_test(run, 0.3, 0.4, 800)
    write_json(run.path / "mlflow.json", {"run_id": "f00d", "uri": "http://mlflow:5000", "samples": 1000})
    end(second, "finished", 1000, 1200)
    return run


def drawn(run: RunFolder) -> str:
    text = io.StringIO()
    Console(file=text, width=300).print(page(facts(run), run.experiment_file.read_text()))
    return text.getvalue()


def test_suites_are_shown_with_their_convention(run: RunFolder) -> None:
    metrics = {"i2t_recall_at_1": 0.25, "t2i_recall_at_1": 0.5}
    task = {"kind": "retrieval", "images": 40, "captions": 80, "convention": "open_clip", "metrics": metrics}
    record = {"suite": "long", "checkpoint": "step-00000008", "tasks": {"captions": task}}
    (run.evaluations / "long").mkdir()
    write_json(run.evaluations / "long" / "step-00000008.json", record)
    line = (
        "long/captions at step-00000008: n = 40 images, 80 captions, open_clip's convention: an image's first caption"
    )
    assert line in drawn(run) and "R@1 i2t 25.0 t2i 50.0" in drawn(run)
    assert facts(run)["suites"] == [record]


def test_lineage(run: RunFolder) -> None:
    first, second = facts(run)["attempts"]
    assert (first["from"], first["to"], first["verdict"], first["job"]) == (0, 600, None, "101")
    assert first["seconds"] == pytest.approx(60 + 5 * 10), "until its last point"
    assert (second["from"], second["to"], second["verdict"], second["ranks"]) == (400, 1000, "finished", 4)
    assert second["seconds"] == pytest.approx(200) and second["nodes"] == ["n1", "n2"] and second["code"] == "c0dec0de"


def test_checkpoints(run: RunFolder) -> None:
    kept = {c["name"]: c for c in facts(run)["checkpoints"]}
    marks = {name: [m for m in ("latest", "best", "pinned", "broken") if c[m]] for name, c in kept.items()}
    assert marks == {
        "step-00000004": ["pinned"],
        "broken-step-00000006": ["broken"],
        "step-00000008": ["best"],
        "step-00000010": ["latest"],
    }
    assert 3 * 2**20 < kept["step-00000008"]["bytes"] < 3.1 * 2**20


def test_one_page(run: RunFolder) -> None:
    text = " ".join(drawn(run).split())
    for word in (
        f"tiny/{run.name}",
        "finished, 1,000/1,000 samples",
        "f00d at http://mlflow:5000",
        "2 x cuda",
        "c0dec0de (9f31c02)",
        "step-00000008 800 3.0 MiB best",
        "i2t_recall_at_1 0.3000",
        "/data/tokenizer",
        "context_length: 77",
        "next: longclip collect tiny",
    ):
        assert word in text, (word, text)


def test_a_run_that_has_nothing_yet(tmp_path: Path) -> None:
    text = drawn(make_run(tmp_path, experiment()))
    assert (
        "waiting, 0/1,000 samples: not queued yet" in text and "not synced yet" in text and "context_length: 77" in text
    )


def test_brackets_and_torn_records(run: RunFolder) -> None:
    third = add_attempt(run, 2000)
    end(third, "crashed", 1000, 2100, "[/__w/pytorch/pair.cc:553] closed by peer [red]")
    (run.path / "mlflow.json").write_text('{"run_id": "f0')
    (run.checkpoints / "latest").write_text("")
    (run.checkpoints / "step-00000010" / "state.json").write_text('{"step": 1')
    text = drawn(run)
    assert "[/__w/pytorch/pair.cc:553] closed by peer [red]" in text and f"longclip retry {run.name}" in text


def test_as_typed(run: RunFolder) -> None:
    said = longclip("show", "ctx77", "--runs", run.path.parents[1], cwd=run.path)
    assert max(map(len, said.splitlines())) < 250 and "step-00000010" in said
    told: dict[str, Any] = json.loads(longclip("show", run.path, "--json", cwd=run.path))
    assert told["uid"] == run.uid and told["experiment"]["model"]["context_length"] == 77
    assert told["pins"]["data.train"]["reference"] == "tiny-train" and told["pins"]["data.train"]["content"] == "0" * 64
    assert told["next"] == "longclip collect tiny"


# ---- diff --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_sweep(tmp_path_factory.mktemp("diff"), (4, 5))


@pytest.fixture
def made(sweep: Path, tmp_path: Path) -> RunFolder:
    """The run of ctx4.yaml, as submit would make it."""
    (one,) = plan(load([sweep / "ctx4.yaml"]), Site(runs=tmp_path / "runs"))
    one.run.create(one.experiment, one.identity, {})
    return one.run


def edited(sweep: Path, text: str, base: str | None = None) -> Path:
    """ctx4.yaml with more in it, beside it."""
    file = sweep / "edited.yaml"
    file.write_text(f"extends: {base or '_base.yaml'}\nname: ctx4\n{text}")
    return file


def diff(a: Path, b: Path) -> Comparison:
    return compare(str(a), str(b), Site())


def test_a_run_and_its_file(sweep: Path, made: RunFolder) -> None:
    found = diff(made.path, sweep / "ctx4.yaml")
    assert not found.identity and not found.rest and not found.notes
    assert next(found.lines()) == "same run: nothing that decides the weights differs"


def test_what_decides_the_weights_and_what_does_not(sweep: Path, made: RunFolder) -> None:
    file = edited(sweep, "model: {context_length: 9}\ntrain: {lr: 1e-3}\nengine: {zero_stage: 3}")
    found = diff(made.path, file)
    assert found.identity == {"model.context_length": (4, 9), "train.lr": (2e-3, 1e-3)}
    assert found.rest == {"engine.zero_stage": (2, 3)}
    lines = list(found.lines())
    assert lines[0] == "different runs: 2 keys decide the weights"
    assert "  train.lr: 0.002 -> 0.001" in lines and "  engine.zero_stage: 2 -> 3" in lines
    assert lines.index("  train.lr: 0.002 -> 0.001") < lines.index("  engine.zero_stage: 2 -> 3")


def test_a_default_is_shown_by_its_value(sweep: Path) -> None:
    found = diff(sweep / "ctx4.yaml", edited(sweep, "model: {context_length: 4}\ntrain: {weight_decay: 0.1}"))
    assert found.identity == {"train.weight_decay": (0.2, 0.1)}
    assert next(found.lines()) == "different runs: 1 key decides the weights"


def test_data_counts_by_content(sweep: Path, made: RunFolder, tmp_path: Path) -> None:
    """The same shards elsewhere make the same run; other shards under a path make another one."""
    shutil.copytree(sweep.parent / "train", tmp_path / "train")
    found = diff(made.path, edited(sweep, f"model: {{context_length: 4}}\ndata: {{train: {tmp_path}/train}}"))
    assert not found.identity and list(found.rest) == ["data.train"]
    found = diff(made.path, edited(sweep, "model: {context_length: 4}\ndata: {train: ../val}"))
    assert list(found.identity) == ["data.train"]
    assert all("content" in str(value) for value in found.identity["data.train"])


def test_content_that_is_not_here_is_compared_by_name_and_said(sweep: Path, made: RunFolder) -> None:
    found = diff(made.path, edited(sweep, "model: {context_length: 4}\ndata: {train: longcap-1m}"))
    assert list(found.identity) == ["data.train"]
    (note,) = found.notes
    assert note.startswith("data.train: compared by name only: dataset 'longcap-1m' is not in site profile")
    assert f"! {note}" in list(found.lines())


def test_neither_run_nor_file(sweep: Path, made: RunFolder) -> None:
    with pytest.raises(UserError, match="no such run"):
        diff(made.path, sweep / "absent.yaml")
    with pytest.raises(UserError, match="is a sweep of 2 experiments"):
        diff(made.path, edited(sweep, "sweep: {grid: {model.context_length: [4, 5]}}"))
    other = make_run(made.path.parents[1], experiment(), "small")
    with pytest.raises(UserError, match=f"is 2 runs: .*{other.name}"):
        diff(made.path, made.path.parent)


def test_diff_as_typed(sweep: Path, made: RunFolder) -> None:
    words = ("diff", "ctx4", "small/ctx5.yaml", "--runs", made.path.parents[1])
    said = longclip(*words, cwd=sweep.parent)
    assert said.startswith("different runs: 1 key decides the weights\n") and "model.context_length: 4 -> 5" in said
    told = json.loads(longclip(*words, "--json", cwd=sweep.parent))
    assert told["same_run"] is False and told["identity"] == {"model.context_length": [4, 5]}
    assert told["rest"] == {"name": ["ctx4", "ctx5"]}
