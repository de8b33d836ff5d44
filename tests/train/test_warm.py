"""A 77 run continued as a 512 arm: its weights are the child's first, and short text is seen as it was."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from longclip.errors import LongclipError, UserError
from longclip.experiment.schema import Init, Model
from longclip.model.clip import DualEncoder, build
from longclip.model.packing import pack
from longclip.model.window import position_table, stretch
from longclip.run import lineage
from longclip.run.folder import read_json
from longclip.train.warm import load, start
from tests.helpers import add_attempt, end, experiment, finished_run, make_run, save_checkpoint
from tests.launch.small import longclip, make_sweep, the_run
from tests.model.test_packing import MODERNBERT, VIT
from tests.model.test_window import BERT, CLIP_77


def model(text: dict[str, Any], window: int, **tower: Any) -> Model:
    towers = {"image": {"config": VIT}, "text": {"config": text, "tokenizer": "x", **tower}}
    return Model.model_validate({"context_length": window, "embed_dim": 24, **towers})


def weights_of(made: DualEncoder) -> dict[str, torch.Tensor]:
    return {name: parameter.detach() for name, parameter in made.named_parameters()}


def test_short_text_is_seen_as_the_parent_saw_it() -> None:
    parent = build(model(CLIP_77, 77), seed=1).eval()
    asked = model(CLIP_77, 512, positions="stretch")
    child = build(asked, seed=2).eval()
    load(child, weights_of(parent), asked, "run:x")
    text, pixels = pack([[5, 6, 7], list(range(3, 23))]), torch.randn(2, 3, 16, 16)
    for ours, theirs in zip(child(pixels, text), parent(pixels, text), strict=True):
        assert torch.equal(ours, theirs)
    assert torch.equal(
        position_table(child.text.trunk).weight, stretch(position_table(parent.text.trunk).weight, 512, 20)
    )


def test_rotary_towers_take_the_weights_as_they_are() -> None:
    parent, asked = build(model(MODERNBERT, 77), seed=1), model(MODERNBERT, 512)
    child = build(asked, seed=2)
    load(child, weights_of(parent), asked, "run:x")
    theirs = weights_of(parent)
    assert all(torch.equal(p, theirs[name]) for name, p in child.named_parameters())


@pytest.mark.parametrize(
    ("parent", "child", "message"),
    [
        (model(CLIP_77, 77), model({**CLIP_77, "max_position_embeddings": 512}, 512), "has 77 text positions, this mo"),
        (model(BERT, 77), model(CLIP_77, 77), "of another model"),
        (
            model(CLIP_77, 77),
            model({**CLIP_77, "vocab_size": 71}, 77),
            r"token_embedding.weight \[70, 32\] there, \[71",
        ),
        (model(CLIP_77, 512, positions="stretch"), model(CLIP_77, 77), r"\[512, 32\] there, \[77, 32\] here"),
    ],
)
def test_what_does_not_fit_is_named(parent: Model, child: Model, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load(build(child, seed=0), weights_of(build(parent, seed=0)), child, "run:x")


# ---- which weights are meant -------------------------------------------------------------------------------------


def _with_weights(run: Any, samples: int, best: int) -> None:
    for at in (best, samples):
        save_checkpoint(run, at)
        folder = run.checkpoints / f"step-{at // 100:08d}"
        state = {**read_json(folder / "state.json"), "best": {"checkpoint": f"step-{best // 100:08d}"}}
        (folder / "state.json").write_text(json.dumps(state))
        save_file({"w": torch.full((2,), float(at))}, folder / "weights.safetensors")


def test_the_last_weights_or_the_best(tmp_path: Path) -> None:
    run = finished_run(tmp_path, experiment(77, 1000), {500: 0.9, 1000: 0.1})
    for folder in run.checkpoints.glob("step-*"):
        folder.joinpath("state.json").unlink()
        folder.rmdir()
    _with_weights(run, 1000, 500)
    for reference, samples in (("run:ctx77", 1000), ("run:ctx77@best", 500)):
        folder, record = lineage.origin(run.path, reference)
        assert record["samples"] == samples and record["context_length"] == 77 and record["run"] == run.name
        assert load_file(folder / "weights.safetensors")["w"][0] == samples
    assert lineage.pin_of_run(run.identity(), "run:ctx77") != lineage.pin_of_run(run.identity(), "run:ctx77@best")


def test_a_run_that_has_not_finished_is_not_begun_from(tmp_path: Path) -> None:
    run = make_run(tmp_path, experiment())
    with pytest.raises(LongclipError, match="has not finished"):
        lineage.origin(run.path, "run:ctx77")
    end(add_attempt(run, 0), "crashed", 100, 60)
    with pytest.raises(LongclipError, match="has not finished"):
        lineage.origin(run.path, "run:ctx77")


class Alone:
    """A single process, which has nobody to tell."""

    rank = 0

    def tell(self, value: Any) -> Any:
        return value


def test_a_second_attempt_begins_with_the_weights_of_the_first_or_not_at_all(tmp_path: Path) -> None:
    """The parent's checkpoint may have become another while no checkpoint of the child's own stood."""
    spec = model(BERT, 77).model_copy(update={"init": Init.model_validate({"from": "run:ctx77"})})
    parent = finished_run(tmp_path, experiment(77, 1000), {1000: 0.9})
    weights = parent.checkpoints / "step-00000010" / "weights.safetensors"
    save_file(weights_of(build(spec, seed=1)), weights)
    child = make_run(tmp_path, experiment(77, 1000, "child").model_copy(update={"model": spec}))
    assert spec.init is not None
    begin = partial(start, spec=spec, init=spec.init, folder=parent.path, run=child, ranks=Alone())  # type: ignore[arg-type]
    begin(build(spec, seed=2))
    first = (child.path / "origin.json").read_text()
    again = build(spec, seed=3)
    begin(again)
    theirs = load_file(weights)
    assert all(torch.equal(weight, theirs[name]) for name, weight in weights_of(again).items())
    save_file(weights_of(build(spec, seed=4)), weights)
    other = build(spec, seed=5)
    before = {name: weight.clone() for name, weight in weights_of(other).items()}
    with pytest.raises(UserError, match="are not the weights that this run began with") as caught:
        begin(other)
    assert read_json(child.path / "origin.json")["sha256"][:12] in str(caught.value)
    assert all(torch.equal(weight, before[name]) for name, weight in weights_of(other).items())
    assert (child.path / "origin.json").read_text() == first


# ---- the whole way -----------------------------------------------------------------------------------------------

PARENT = """\
extends: _base.yaml
name: ctx77
model:
  context_length: 77
  text:
    config: {model_type: clip_text_model, max_position_embeddings: 77}
    pool: last
train: {samples: 240}
"""
CHILD = """\
extends: parent.yaml
name: ctx512
model: {context_length: 512, text: {positions: stretch}, init: {from: "run:ctx77@best"}}
train: {samples: 24, lr: 1.0e-12}
"""


def test_a_sweep_is_retried_in_which_a_parent_s_name_comes_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from longclip import cli, submission
    from longclip.experiment.load import load as read
    from longclip.launch.plan import plan
    from longclip.launch.site import find_site

    sweep = make_sweep(tmp_path, ())
    (sweep / "parent.yaml").write_text(PARENT)
    (sweep / "child.yaml").write_text(CHILD.replace("name: ctx512", "name: adapted"))
    asked = read([sweep / "child.yaml", sweep / "parent.yaml"])
    for one in plan(asked, find_site(None, tmp_path / "runs")):
        one.run.create(one.experiment, one.identity, dict(one.axes))
    carried: list[str] = []
    monkeypatch.setattr(submission, "carry_out", lambda plans, *_: carried.extend(p.run.label for p in plans))
    done = CliRunner().invoke(cli.app, ["retry", "small", "--runs", str(tmp_path / "runs")])
    assert done.exit_code == 0, done.output
    assert carried == ["ctx77", "adapted"]


@pytest.mark.slow
def test_a_77_run_continued_as_a_512_arm(tmp_path: Path) -> None:
    """One submit of both, the child named first: it begins when its parent has finished, with its weights."""
    sweep = make_sweep(tmp_path, ())
    (sweep / "parent.yaml").write_text(PARENT)
    (sweep / "child.yaml").write_text(CHILD)
    runs = tmp_path / "runs"
    one = ("--set", "slurm.tasks_per_node=1", "--set", "checkpoint.every=3 steps", "--runs", runs)
    said = longclip("submit", sweep / "child.yaml", "--dry-run", *one, cwd=tmp_path, code=None)
    assert "ctx77: no such run or sweep" in said
    longclip("submit", sweep / "child.yaml", sweep / "parent.yaml", "--on", "local", *one, cwd=tmp_path)
    parent, child = the_run(runs, "ctx77"), the_run(runs, "ctx512")
    record = read_json(child.path / "origin.json")
    assert record["run"] == parent.name
    theirs = load_file(parent.checkpoints / record["checkpoint"] / "weights.safetensors")
    ours = load_file(child.checkpoints / "step-00000001" / "weights.safetensors")
    for name, weight in theirs.items():
        expected = stretch(weight, 512, 20) if "position_embedding" in name and "text" in name else weight
        torch.testing.assert_close(ours[name], expected, atol=1e-8, rtol=0)
    shown = longclip("show", "ctx512", "--runs", runs, cwd=tmp_path)
    assert f"began with  {parent.name} {record['checkpoint']}" in " ".join(shown.split("\n"))
    assert child.identity()["model.init.from"] == lineage.pin_of_run(parent.identity(), "run:ctx77@best")
    assert "nothing to queue" in longclip("submit", sweep / "child.yaml", "--on", "local", *one, cwd=tmp_path)
    shutil.rmtree(max(parent.checkpoints.glob("step-*")))  # as prune does with what is not the best
    late = ("--set", "name=late", "--set", "model.init={from: run:ctx77}", *one)
    said = longclip("submit", sweep / "child.yaml", "--on", "local", *late, cwd=tmp_path, code=2)
    assert "model.init.from" in said and "is gone" in said and f"run:{parent.name}@best" in said, said


def test_runs_that_begin_from_each_other_are_refused(tmp_path: Path) -> None:
    sweep = make_sweep(tmp_path, ())
    (sweep / "parent.yaml").write_text(PARENT.replace("pool: last", "pool: last\n  init: {from: run:ctx512}"))
    (sweep / "child.yaml").write_text(CHILD)
    said = longclip("submit", sweep, "--dry-run", "--runs", tmp_path / "runs", cwd=tmp_path, code=2)
    assert "none of these can begin" in said
