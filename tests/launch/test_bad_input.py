"""A user's mistake costs one message and an exit code; nothing is queued and nothing is written."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.launch.small import environment, longclip, make_sweep


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_sweep(tmp_path_factory.mktemp("bad"), (4, 5))


def refuse(sweep: Path, *words: str | Path, code: int = 2) -> str:
    """The message of a submit that must fail before anything is queued."""
    runs = sweep.parent / "never"
    said = longclip("submit", sweep, "--on", "local", "--runs", runs, *words, cwd=sweep.parent, code=code)
    assert not runs.exists(), "a refused submit has written something"
    return said


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ("data.train=./nowhere", "data.train: no such folder"),
        ("data.train=longcap-1m", "data.train: dataset 'longcap-1m' is not in site profile 'default'"),
        ("data.text=long_caption", "has no text 'long_caption' (data.text)"),
        ("data.text='{txt} {mesh}'", "has no text 'mesh' (data.text) in its first 30 samples"),
        ("data.train=[{name: ./train}, {name: ./nowhere}]", "data.train.1: no such folder"),
        ("data.val=./small", "data.val: not indexed"),
        ("data.test=./train/s-01.tar", "train/s-01.tar is among the shards of data.train: it would be scored on what"),
        ("data.train=[{name: ./val}, {name: ./train}]", "val/s-00.tar is among the shards of data.train.0"),
        ("train.samples=5", "data.train: train: 5 samples are not one global batch of 24"),
        ("model.text.tokenizer=./small", "model.text.tokenizer: "),
        ("model.text.config.vocab_size=40", "model.text.config.vocab_size: is 40, but the tokenizer"),
        ("model.context_length=65", "the text tower has 64 positions"),
    ],
)
def test_refused(sweep: Path, setting: str, expected: str) -> None:
    assert expected in refuse(sweep / "ctx4.yaml" if "context" in setting else sweep, "--set", setting)


def test_shards_of_the_test_set_under_other_names_are_found_in_training(sweep: Path, tmp_path: Path) -> None:
    """By content; one without a sample, of which there may be any number alike, is none of them."""
    from longclip.data.index import index_folder
    from longclip.data.shards import write_shard
    from longclip.errors import LongclipError
    from longclip.experiment.load import load
    from longclip.launch.resolve import resolve
    from longclip.launch.site import find_site

    for name in ("train", "test"):
        shutil.copytree(sweep.parent / name, tmp_path / name)
        write_shard(tmp_path / name / "z-empty.tar", [])
    index_folder(tmp_path / "test")
    index_folder(tmp_path / "train")
    sets = [f"data.test={tmp_path / 'test'}", f"data.train={tmp_path / 'train'}"]
    site = find_site(None, tmp_path / "runs")

    def problems() -> list[LongclipError]:
        return resolve(load([sweep / "ctx4.yaml"], sets)[0].experiment, site).problems

    assert problems() == []
    shutil.copy(tmp_path / "test" / "s-00.tar", tmp_path / "train" / "t-00.tar")
    index_folder(tmp_path / "train")
    (problem,) = problems()
    same = f"data.test: {tmp_path}/test/s-00.tar is among the shards of data.train as {tmp_path}/train/t-00.tar"
    assert problem.message == f"{same}: it would be scored on what it was trained on" and problem.exit_code == 2
    assert problem.hint == "data.train: a pattern that leaves them out, as FOLDER/train-*.tar"


@pytest.mark.parametrize("text", ["{txt} ({year})", "year", "{year.of}{sizes}"])
def test_a_field_that_holds_no_text_is_no_part_of_one(text: str, tmp_path: Path) -> None:
    """A number would be left out of every caption, without a word."""
    from longclip.data.index import index_folder
    from longclip.data.shards import Sample, open_dataset, write_shard
    from longclip.data.text import Text
    from longclip.errors import UserError
    from longclip.launch.suites import check_text
    from tests.data.test_loader import picture

    fields = [{"year": None, "title": "A"}, {"year": 2010, "sizes": [1, 2], "year.of": "birth", "title": {"en": "B"}}]
    write_shard(tmp_path / "a.tar", [Sample(f"s{i}", picture(i), "text", f) for i, f in enumerate(fields)])
    index_folder(tmp_path)
    with pytest.raises(UserError) as caught:
        check_text(open_dataset(tmp_path), Text(text), "data.text")
    name, held = ("sizes", "[1, 2]") if "sizes" in text else ("year", "2010")
    assert caught.value.message == f"{tmp_path}: {name} (data.text) holds {held}, which is no text"
    assert caught.value.hint == "data.text: one of title, txt, year.of, or a template over them"
    check_text(open_dataset(tmp_path), Text("{title}: {txt}"), "data.text")


def test_empty_and_unreadable_shards(sweep: Path) -> None:
    empty = sweep.parent / "empty"
    empty.mkdir(exist_ok=True)
    said = longclip("data", "index", empty, cwd=sweep.parent, code=2)
    assert str(empty) in said and ".tar" in said
    (empty / "x.tar").write_bytes(b"this is no tar" * 100)
    assert "x.tar" in longclip("data", "index", empty, cwd=sweep.parent, code=2)


def test_index_that_does_not_match(sweep: Path, tmp_path: Path) -> None:
    shutil.copytree(sweep.parent / "train", tmp_path / "train")
    shard = next((tmp_path / "train").glob("*.tar"))
    shard.write_bytes(shard.read_bytes() + bytes(10240))
    assert "index does not match" in refuse(sweep, "--set", f"data.train={tmp_path / 'train'}")


def test_sample_without_text_is_left_out_by_name(tmp_path: Path) -> None:
    from longclip.data.shards import Sample, write_shard
    from tests.data.test_loader import picture

    write_shard(tmp_path / "a.tar", [Sample("good", picture(0), "text", {}), Sample("mute", picture(1), " ", {})])
    longclip("data", "index", tmp_path, cwd=tmp_path)
    (shard,) = json.loads((tmp_path / "index.json").read_text())["shards"]
    assert shard["samples"] == 1 and shard["skipped"][0]["key"] == "mute"


def test_no_slurm_here(sweep: Path) -> None:
    words = [sys.executable, "-m", "longclip.cli", "submit", str(sweep), "--runs", "never"]
    bare = {**environment(), "PATH": "/nonexistent"}
    done = subprocess.run(words, cwd=sweep.parent, capture_output=True, text=True, env=bare)
    assert done.returncode == 3
    assert "no Slurm on this machine" in done.stderr and "--on local" in done.stderr
    assert not (sweep.parent / "never").exists()


def test_unwritable_runs_folder(sweep: Path) -> None:
    said = longclip("submit", sweep, "--on", "local", "--runs", "/proc/runs", cwd=sweep.parent, code=3)
    assert "/proc/runs" in said and "cannot be written" in said


def test_folder_of_another_experiment(sweep: Path, tmp_path: Path) -> None:
    said = longclip("submit", sweep / "ctx4.yaml", "--dry-run", "--runs", tmp_path, cwd=sweep.parent, code=None)
    name = next(word for word in said.split() if word.startswith("ctx4-"))
    (tmp_path / "small" / name).mkdir(parents=True)
    other = {"uid": name[-8:], "identity": {"train.lr": 1.0}, "axes": {}}
    (tmp_path / "small" / name / "identity.json").write_text(json.dumps(other))
    said = longclip("submit", sweep / "ctx4.yaml", "--on", "local", "--runs", tmp_path, cwd=sweep.parent, code=2)
    assert "made by another experiment" in said and "train.lr" in said


def test_the_same_experiment_twice(sweep: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        text = (sweep / "ctx4.yaml").read_text().replace("_base.yaml", str(sweep / "_base.yaml"))
        (tmp_path / f"{name}.yaml").write_text(text.replace("name: ctx4", f"name: {name}"))
    assert "are the same experiment" in longclip("submit", tmp_path, "--on", "local", cwd=tmp_path, code=2)


@pytest.mark.parametrize(
    ("words", "code", "expected"),
    [
        (["status", "nothing"], 2, "no such run or sweep"),
        (["status"], 2, "no runs under"),
        (["logs", "x"], 2, "no such run or sweep"),
        (["submit", "small", "--on", "cloud"], 2, "--on cloud: valid is slurm, local or debug"),
        (["submit", "small", "--site", "mars"], 2, "no site profile 'mars'"),
        (["check", "absent"], 2, "absent: no such file or folder"),
        (["train", "small/_base.yaml"], 2, "start with _ are bases"),
    ],
)
def test_commands(sweep: Path, words: list[str], code: int, expected: str) -> None:
    assert expected in longclip(*words, cwd=sweep.parent, code=code)


def test_site_profile_mistakes(sweep: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("partitoin: gpu\n")
    said = longclip("submit", sweep, "--site", tmp_path / "mine.yaml", "--dry-run", cwd=sweep.parent, code=2)
    assert "mine.yaml:1: partitoin: unknown key; did you mean partition?" in said


def test_hub_id_that_cannot_be_reached(sweep: Path) -> None:
    """No network: the dry run says what stands in the way and goes on, the submit stops with the environment's code."""
    offline = {**environment(), "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(sweep.parent / "no-cache")}
    words = [sys.executable, "-m", "longclip.cli", "submit", str(sweep / "ctx4.yaml"), "--runs", "never"]
    words += ["--set", "model.text.tokenizer=nobody/nothing"]
    dry = subprocess.run([*words, "--dry-run"], cwd=sweep.parent, capture_output=True, text=True, env=offline)
    assert dry.returncode in (0, 3), dry.stderr  # 3 where a Slurm is installed that does not answer
    assert (
        "a submit would stop here: model.text.tokenizer: nobody/nothing: the model hub cannot be reached" in dry.stdout
    )
    real = subprocess.run([*words, "--on", "local"], cwd=sweep.parent, capture_output=True, text=True, env=offline)
    assert real.returncode == 3
    assert not (sweep.parent / "never").exists()


def test_nothing_heavy_is_imported(sweep: Path) -> None:
    """The front starts fast on a login node: no torch, no transformers, no deepspeed."""
    program = (
        "import sys\nfrom longclip import cli\nsys.argv = ['longclip'] + sys.argv[1:]\n"
        "try:\n    cli.main()\nexcept SystemExit:\n    pass\n"
        "heavy = {'torch', 'transformers', 'deepspeed', 'webdataset'} & set(sys.modules)\n"
        "assert not heavy, heavy\nprint('LIGHT')\n"
    )
    commands: list[list[str]] = [
        ["--help"],
        ["check", str(sweep)],
        ["submit", str(sweep), "--dry-run"],
        ["status", "--runs", str(sweep.parent / "none")],
        ["collect", "nothing"],
        ["doctor", "--runs", str(sweep.parent / "none")],
        ["site", "init", "--yes", "--out", str(sweep.parent / "site.yaml")],
        ["logs", "nothing"],
        ["show", "nothing"],
        ["diff", str(sweep / "ctx4.yaml"), str(sweep / "ctx5.yaml")],
    ]
    for words in commands:
        done = subprocess.run(
            [sys.executable, "-c", program, *words], cwd=sweep.parent, capture_output=True, text=True, env=environment()
        )
        assert "LIGHT" in done.stdout, (words, done.stdout, done.stderr)


def test_ids_do_not_depend_on_the_place(sweep: Path, tmp_path: Path) -> None:
    """The same files under another root are the same runs."""
    shutil.copytree(sweep.parent, tmp_path / "copy", ignore=lambda d, names: [n for n in names if n == "never"])
    here = longclip("submit", sweep, "--dry-run", cwd=sweep.parent, code=None)
    there = longclip("submit", tmp_path / "copy" / "small", "--dry-run", cwd=tmp_path, code=None)
    ids = [sorted(w for w in text.split() if w.startswith("ctx") and "-" in w) for text in (here, there)]
    assert ids[0] == ids[1] and len(ids[0]) >= 2
    assert os.path.basename(ids[0][0]) == ids[0][0]
