"""Merging, sweeping and identity: what an experiment is, wherever its words stand."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic_core import PydanticCustomError

from longclip.errors import ExperimentError
from longclip.experiment.durations import parse_time
from longclip.experiment.identity import differences, hash_folder, identity, references, uid
from longclip.experiment.load import load
from longclip.experiment.schema import Experiment
from longclip.experiment.sweep import short_name
from tests.experiment.test_broken import GOOD

ROOT = Path(__file__).parents[2]
PINS = {"data.train": "t" * 64, "data.val": "v" * 64, "model.text.tokenizer": "k" * 64}


def one(folder: Path, text: str = GOOD, overrides: list[str] | None = None) -> Experiment:
    (folder / "one.yaml").write_text(text)
    return load([folder / "one.yaml"], overrides)[0].experiment


def test_extends_merges_deeply_and_paths_stay_with_their_file(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "_base.yaml").write_text(GOOD)
    (tmp_path / "arm.yaml").write_text(
        "extends: base/_base.yaml\nname: arm\ntrain: {seed: 3}\ndata: {val: ./elsewhere}\n"
    )
    loaded = load([tmp_path / "arm.yaml"])[0]
    assert loaded.sweep == tmp_path.name
    assert loaded.experiment.train.seed == 3
    assert loaded.experiment.train.lr == 5e-4
    assert loaded.experiment.data.train == str(tmp_path / "base" / "train")
    assert loaded.experiment.data.val == str(tmp_path / "elsewhere")


def test_grid_is_named_by_what_varies(tmp_path: Path) -> None:
    (tmp_path / "g.yaml").write_text(
        GOOD.replace("name: good\n", "")
        + "sweep: {grid: {model.context_length: [77, 512], train.lr: [3e-4, 0.001], train.seed: [0, 1]}}\n"
    )
    loaded = load([tmp_path / "g.yaml"])
    assert [one.experiment.name for one in loaded][:3] == ["ctx77_lr3e-4_s0", "ctx77_lr3e-4_s1", "ctx77_lr1e-3_s0"]
    assert len({one.experiment.name for one in loaded}) == 8
    assert loaded[-1].axes == {"model.context_length": 512, "train.lr": 0.001, "train.seed": 1}
    assert loaded[-1].experiment.model.context_length == 512


def points(folder: Path, sweep: str) -> dict[str, dict[str, object]]:
    """Axes by name, of a file with this sweep."""
    (folder / "g.yaml").write_text(GOOD.replace("name: good\n", "") + f"sweep: {sweep}\n")
    return {one.experiment.name: one.axes for one in load([folder / "g.yaml"])}


def test_zip_goes_side_by_side(tmp_path: Path) -> None:
    found = points(tmp_path, "{zip: {train.lr: [3e-4, 1e-3], train.global_batch: [16, 32]}}")
    assert found == {
        "lr3e-4_b16": {"train.lr": 3e-4, "train.global_batch": 16},
        "lr1e-3_b32": {"train.lr": 1e-3, "train.global_batch": 32},
    }


def test_a_list_gives_points_one_by_one_and_names_show_what_varies(tmp_path: Path) -> None:
    found = points(
        tmp_path,
        "{list: [{train.seed: 1, train.lr: 1e-3, train.eps: 1e-6}, {train.lr: 1e-3, train.seed: 2, train.eps: 1e-6}]}",
    )
    assert list(found) == ["s1", "s2"]
    assert found["s2"] == {"train.seed": 2, "train.lr": 1e-3, "train.eps": 1e-6}
    assert list(points(tmp_path, "{list: [{train.seed: 1, train.lr: 1e-3}]}")) == ["s1_lr1e-3"]


def test_grid_and_zip_and_list_combine(tmp_path: Path) -> None:
    sweep = (
        "{grid: {model.context_length: [77, 512]}, zip: {train.lr: [3e-4, 1e-3], train.warmup_steps: [1, 2]}, "
        "list: [{train.seed: 0}, {train.seed: 5}]}"
    )
    found = points(tmp_path, sweep)
    assert len(found) == 8
    assert list(found)[:3] == [
        "ctx77_lr3e-4_warmup_steps1_s0",
        "ctx77_lr3e-4_warmup_steps1_s5",
        "ctx77_lr1e-3_warmup_steps2_s0",
    ]
    (tmp_path / "g.yaml").write_text(GOOD.replace("name: good\n", "") + f"sweep: {sweep}\n")
    last = load([tmp_path / "g.yaml"])[-1].experiment
    assert (last.model.context_length, last.train.lr, last.train.warmup_steps, last.train.seed) == (512, 1e-3, 2, 5)


@pytest.mark.parametrize(
    ("sweep", "said"),
    [
        (
            "{zip: {train.lr: [1e-3, 2e-3], train.seed: [0]}}",
            "g.yaml:17: sweep.zip.train.seed: has 1 values, train.lr has 2",
        ),
        ("{zip: {train.lr: 1e-3}}", "g.yaml:17: sweep.zip.train.lr: is a list of at least one value"),
        ("{zip: 3}", "g.yaml:17: sweep.zip: is a mapping of dotted keys"),
        ("{list: {train.lr: 1e-3}}", "g.yaml:17: sweep.list: is a list of points"),
        ("{list: [{train.seed: 1}, 3]}", "g.yaml:17: sweep.list.1: is a mapping"),
        (
            "{list: [{train.seed: 1}, {train.lr: 1e-3}]}",
            "g.yaml:17: sweep.list.1: every point gives the same keys; train.lr, train.seed",
        ),
        (
            "\n  grid: {train.seed: [1]}\n  list:\n  - {train.seed: 1}",
            "g.yaml:20: sweep.list.0.train.seed: train.seed is also in sweep.grid",
        ),
        ("{grid: {train.seed: [1, 1]}}", "g.yaml:17: sweep: twice: train.seed 1"),
        ("\n  list:\n  - {train.seed: 1}\n  - {train.sede: 1}", "g.yaml:20: sweep.list.1: every point"),
        ("\n  list:\n  - {train.sede: 1}", "g.yaml:19: train.sede: unknown key; did you mean seed?"),
        ("{grdi: {train.seed: [1]}}", "g.yaml:17: sweep: valid is 'grid: "),
        ("[]", "g.yaml:17: sweep: valid is 'grid: "),
    ],
)
def test_mistakes_in_a_sweep(sweep: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(ExperimentError) as caught:
        points(tmp_path, sweep)
    assert len(caught.value.mistakes) == 1
    assert said in str(caught.value)


def test_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHARDS", "/big/disk")
    assert one(tmp_path, GOOD.replace("./train", "'${env:SHARDS}/train-*.tar'")).data.train == "/big/disk/train-*.tar"


def test_a_variable_may_hold_a_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEED", "7")
    monkeypatch.setenv("TOKENIZER_DIR", "/tok")
    text = GOOD.replace("lr: 5e-4", "lr: 5e-4\n  seed: ${env:SEED}").replace("./tok", "${env:TOKENIZER_DIR}")
    experiment = one(tmp_path, text)
    assert experiment.train.seed == 7 and experiment.model.text.tokenizer == "/tok"


def test_times_and_numbers_are_read_as_typed(tmp_path: Path) -> None:
    """YAML 1.1 would read 12:00:00 as 43200 and 5e-4 as a string."""
    assert one(tmp_path, GOOD + "  time: 12:00:00\n").slurm.time == "12:00:00"
    assert one(tmp_path, overrides=["slurm.time=1-00:00:00", "train.lr=3e-4"]).train.lr == 3e-4
    assert one(tmp_path, overrides=["train.samples=1_000_000"]).train.samples == 1_000_000


@pytest.mark.parametrize(
    ("written", "seed"), [("010", 10), ("08", 8), ("+012", 12), ("1_000", 1000), ("!!int 0x1f", 31)]
)
def test_zeros_in_front_are_decimal(written: str, seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """YAML 1.1 has them octal: a seed of 010 would train with 8."""
    assert one(tmp_path, overrides=[f"train.seed={written}"]).train.seed == seed
    monkeypatch.setenv("SEED", written)
    if "!" not in written:
        assert one(tmp_path, overrides=["train.seed=${env:SEED}"]).train.seed == seed


@pytest.mark.parametrize(
    ("setting", "key", "varied"),
    [
        ("train.seed=7", "train.seed", "train.seed"),
        ("train={seed: 7}", "train.seed", "train.seed"),
        ("data.text.p_long=0.5", "data.text.p_long", "data.text"),
    ],
)
def test_a_setting_that_the_sweep_would_replace(
    setting: str, key: str, varied: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    file = Path("g.yaml")
    file.write_text(GOOD.replace("name: good\n", "") + "sweep: {grid: {train.seed: [0, 1], data.text: [txt, long]}}\n")
    with pytest.raises(ExperimentError) as caught:
        load([file], [setting])
    assert str(caught.value) == (
        f"--set: {key}: {varied} varies in the sweep (g.yaml:17), whose values would replace it; "
        f"--set 'sweep={{grid: {{{varied}: [...]}}}}' replaces the whole sweep, --set sweep=null leaves it out"
    )
    loaded = load([file], ["sweep={grid: {train.seed: [7]}}"])
    assert [one.experiment.train.seed for one in loaded] == [7]
    assert len(load([file], ["train.lr=1e-3"])) == 4, "a key beside the sweep's"
    (alone,) = load([file], ["sweep=null", "train.seed=7"])
    assert alone.experiment.train.seed == 7


@pytest.mark.parametrize(("said", "meant"), [("./parent", "parent"), ("../runs/p-0@best", "../runs/p-0@best")])
def test_weights_in_a_folder_beside_the_file(said: str, meant: str, tmp_path: Path) -> None:
    begun = one(tmp_path, GOOD.replace("model:\n", f"model:\n  init: {{from: {said}}}\n", 1)).model.init
    assert begun is not None and begun.source == os.path.normpath(tmp_path / meant)
    named = one(tmp_path, GOOD.replace("model:\n", "model:\n  init: {from: run:ctx77}\n", 1)).model.init
    assert named is not None and named.source == "run:ctx77"


def test_paths_in_a_sweep_are_paths(tmp_path: Path) -> None:
    (tmp_path / "g.yaml").write_text(GOOD + "sweep: {grid: {data.train: [./a, ./b]}}\n")
    assert [one.experiment.data.train for one in load([tmp_path / "g.yaml"])] == [str(tmp_path / x) for x in "ab"]


@given(st.floats(min_value=1e-7, max_value=10, allow_nan=False))
def test_short_names_of_rates_read_back(value: float) -> None:
    rounded = float(f"{value:.3g}")
    assert float(short_name("train.lr", rounded).removeprefix("lr")) == pytest.approx(rounded, rel=1e-5)


@pytest.mark.parametrize(
    ("text", "minutes"),
    [
        ("30", 30),
        ("24:00", 24),
        ("04:00:00", 240),
        ("1-12", 2160),
        ("1-00:30", 1470),
        ("2-01:00:30", 2941),
        ("0:30", 1),
    ],
)
def test_times_are_those_of_sbatch(text: str, minutes: int) -> None:
    assert parse_time(text) == minutes


def test_bad_time() -> None:
    with pytest.raises(PydanticCustomError):
        parse_time("1h")


# ---- identity ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [
        "engine.zero_stage=3",
        "engine.loader_workers=7",
        "engine.activation_checkpointing=true",
        "engine.bad_limit=0.5",
        "data.shuffle_sentences=false",
        "evaluate.every=10 steps",
        "checkpoint.every=1 min",
        "slurm.tasks_per_node=4",
        "slurm.time='1-00'",
        "track.experiment=other",
        "data.test=./test",
        "data.train=/elsewhere/same-content",
        "train.seed=0",  # the default, said aloud
    ],
)
def test_these_continue_the_run(change: str, tmp_path: Path) -> None:
    before, after = one(tmp_path), one(tmp_path, overrides=[change])
    assert uid(identity(before, PINS)) == uid(identity(after, PINS))


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ("train.lr=3e-4", "train.lr"),
        ("train.global_batch=32", "train.global_batch"),
        ("train.seed=1", "train.seed"),
        ("train.samples=2000", "train.samples"),
        ("model.context_length=154", "model.context_length"),
        ("model.text.pool=cls", "model.text.pool"),
        ("data.text=long_caption", "data.text"),
        ("data.text='{txt} {title}'", "data.text"),
        ("data.shuffle_sentences=true", "data.shuffle_sentences"),
    ],
)
def test_these_make_another_run_and_name_the_key(change: str, key: str, tmp_path: Path) -> None:
    before, after = (identity(e, PINS) for e in (one(tmp_path), one(tmp_path, overrides=[change])))
    assert uid(before) != uid(after)
    assert list(differences(before, after)) == [key]


SOURCES = "[{name: biomedica, weight: 3}, {name: ./own}]"


def test_several_sources(tmp_path: Path) -> None:
    """Paths among them are relative to the file that says them; each is a reference, and their shares are identity."""
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "_base.yaml").write_text(GOOD.replace("train: ./train", f"train: {SOURCES}"))
    experiment = one(tmp_path, "extends: base/_base.yaml\n")
    assert references(experiment) == {
        "data.train.0": "biomedica",
        "data.train.1": str(tmp_path / "base" / "own"),
        "data.val": str(tmp_path / "base" / "val"),
        "model.text.tokenizer": str(tmp_path / "base" / "tok"),
    }
    pins = {**PINS, "data.train.0": "a" * 64, "data.train.1": "b" * 64}
    facts = identity(experiment, pins)
    assert {k: v for k, v in facts.items() if k.startswith("data.train")} == {
        "data.train.0": "a" * 64,
        "data.train.0.share": 0.75,
        "data.train.1": "b" * 64,
        "data.train.1.share": 0.25,
    }
    doubled = one(tmp_path, overrides=["data.train=[{name: elsewhere, weight: 6}, {name: x, weight: 2}]"])
    assert uid(identity(doubled, pins)) == uid(facts)
    other = one(tmp_path, overrides=["data.train=[{name: elsewhere}, {name: x}]"])
    assert list(differences(identity(other, pins), facts)) == ["data.train.0.share", "data.train.1.share"]


def test_a_list_of_one_source_is_that_source(tmp_path: Path) -> None:
    listed = one(tmp_path, overrides=["data.train=[{name: ./train, weight: 7}]"])
    assert uid(identity(listed, PINS)) == uid(identity(one(tmp_path), PINS))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("data.train=[]", "data.train: names 0 datasets; valid are 1 to 16"),
        ("data.train=5", "data.train: is 5; "),
        ("data.train=[{name: a, wieght: 2}]", "data.train.0.wieght: unknown key; did you mean weight?"),
        ("data.train=[{weight: 2}]", "data.train.0.name: missing"),
        ("data.train=[{name: a, weight: 0}]", "data.train.0.weight: is 0; input should be greater than 0"),
        ("data.train=[{name: a}, {name: a}]", "data.train.1.name: 'a' is given twice"),
        ("data.train=[{name: a}, {name: b, weight: 1e-6}]", "data.train.1.weight: is 1e-06 of 1; below 0.0001"),
        ("data.text='{txt} {'", "data.text: is '{txt} {': "),
        ("data.text='{txt:>3}'", "data.text: is '{txt:>3}': between braces stands the name of a field"),
        ("data.text={short: txt, long: '{}'}", "data.text.long: is '{}': "),
        ("data.text={short: txt}", "data.text.long: missing"),
        ("data.text={short: txt, long: a, p_lnog: 1}", "data.text.p_lnog: unknown key; did you mean p_long?"),
        (
            "data.text={short: txt, long: a, p_long: 2}",
            "data.text.p_long: is 2; input should be less than or equal to 1",
        ),
        ("data.shuffle_sentences=1", "data.shuffle_sentences: is 1; "),
    ],
)
def test_mistakes_about_data_are_one_line(change: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(ExperimentError) as caught:
        one(tmp_path, overrides=[change])
    assert len(caught.value.mistakes) == 1
    assert said in str(caught.value)


def test_other_content_is_another_run(tmp_path: Path) -> None:
    experiment = one(tmp_path)
    assert references(experiment).keys() == PINS.keys()
    other = identity(experiment, {**PINS, "data.train": "x" * 64})
    assert differences(identity(experiment, PINS), other) == {"data.train": ("t" * 64, "x" * 64)}


def test_golden_ids() -> None:
    """Ids of the experiments that we ship, at fixed content: a new field must leave them as they are.

    If this fails, runs that people have under way would start from zero. Change the file only with a new experiment.
    """
    golden = json.loads((Path(__file__).parent / "golden_ids.json").read_text())
    found = {}
    for folder in ("demo", "longcap"):
        for loaded in load([ROOT / "experiments" / folder]):
            pins = {key: f"content of {key}" for key in references(loaded.experiment)}
            found[f"{folder}/{loaded.experiment.name}"] = uid(identity(loaded.experiment, pins))
    assert found == golden


def test_folder_hash_is_of_content(tmp_path: Path) -> None:
    a, b = tmp_path / "a", tmp_path / "b"
    for folder in (a, b):
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        (folder / "model.safetensors").write_bytes(b"weights")
    (b / "README.md").write_text("not a weight")
    assert hash_folder(a) == hash_folder(b)
    (b / "model.safetensors").write_bytes(b"Weights")
    assert hash_folder(a) != hash_folder(b)
