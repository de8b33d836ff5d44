"""longclip estimate, and the columns of submit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from longclip.data.index import index_folder
from longclip.data.tokens import waste
from longclip.experiment.load import load
from longclip.experiment.schema import Experiment
from longclip.launch.forecast import columns, of_plan, unfit
from longclip.launch.plan import Plan
from longclip.launch.resolve import Resolved
from longclip.launch.site import Site
from longclip.model.shape import shape_of
from longclip.run.folder import RunFolder
from longclip.train.estimate import Estimate, estimate, published
from longclip.train.gpus import GPUS, Gpu, named, of_site, shown_as
from tests.helpers import START, add_attempt, experiment, make_run
from tests.launch.small import longclip, make_sweep

ROOT = Path(__file__).parents[2]
DATA = Path(os.environ.get("LONGCLIP_TEST_DATA", ROOT.parent / "shared" / "data")) / "openstax"


def paper(window: int = 512, **train: object) -> Experiment:
    (one,) = [x for x in load([ROOT / "experiments" / "longcap"]) if x.experiment.model.context_length == window]
    return one.experiment.model_copy(update={"train": one.experiment.train.model_copy(update=train)})


def guess(asked: Experiment, ranks: int = 4, gpu: str = "h100-80g", **other: object) -> Estimate:
    model = asked.model
    shape = shape_of(model, model.image.config or {}, model.text.config or {})
    return estimate(asked, shape, published(), ranks, named(gpu), **other)  # type: ignore[arg-type]


def test_the_published_waste_and_mean_come_back() -> None:
    lengths = published().lengths
    assert waste(lengths, 77) == pytest.approx(0.55, abs=0.005)
    assert waste(lengths, 512) == pytest.approx(0.022, abs=0.001)
    assert sum(lengths) / len(lengths) == pytest.approx(131, abs=1)


def test_the_paper_s_model() -> None:
    """Checkpoints of 5.4 GB; per pair, 512 tokens cost about a tenth more than 77, for only real tokens are paid."""
    long, short = guess(paper(512)), guess(paper(77))
    assert sum(long.parameters.values()) == 454_160_129
    assert long.checkpoint_bytes == 12 * 454_160_129
    assert 1.05 < long.flops / short.flops < 1.15
    # by hand: 2 FLOPs a weight and token of all layers, three passes; attention and heads are a few percent more
    layers = 6 * (24 * 12 * 1024**2 * 257 + 22 * (4 * 768**2 + 3 * 768 * 1152) * long.tokens)
    assert layers < long.flops < 1.1 * layers


def test_hours_follow_from_flops_peak_and_utilisation() -> None:
    """With checkpointing the towers' forward is computed twice; the heads' is not, which are a drop in it."""
    one = guess(paper(), utilisation=0.5, samples=10**6)
    assert one.samples_per_second == pytest.approx(4 * 989.4e12 * 0.5 / (one.flops * 4 / 3), rel=1e-4)
    assert one.rank_hours == pytest.approx(4 * 10**6 / one.samples_per_second / 3600)


def test_the_cheapest_that_fits_is_taken() -> None:
    """What a smaller GPU cannot hold at once is run in smaller parts, and where nothing fits it says so."""
    roomy, tight = guess(paper(), ranks=4), guess(paper(), ranks=4, gpu="v100-16g")
    assert (roomy.fits, roomy.stage, roomy.micro_batch) == (True, 1, 1024)
    assert tight.fits and tight.micro_batch < 1024 and 1024 % tight.micro_batch == 0
    assert tight.memory.peak < 16 * 2**30 < roomy.memory.peak
    large = paper()
    text = large.model.text.model_copy(update={"config": {**(large.model.text.config or {}), "hidden_size": 12288}})
    too_large = large.model_copy(update={"model": large.model.model_copy(update={"text": text})})
    assert guess(too_large, ranks=1, gpu="v100-16g").fits is False


def test_gpus_by_the_names_that_slurm_and_torch_have_for_them() -> None:
    assert of_site("h200") is GPUS["h200"] and of_site("A100-80G") is GPUS["a100-80g"]
    assert of_site("gpu") is None and of_site(None) is None
    assert of_site("h100") is GPUS["h100-pcie"] and of_site("a100") is GPUS["a100-40g"]  # the least that it may be
    assert shown_as("NVIDIA H100 80GB HBM3") is GPUS["h100-80g"] and shown_as("NVIDIA H100") is None
    assert GPUS["v100-32g"].peak("bf16") is None and GPUS["v100-32g"].peak("fp32") is not None


def test_the_command_on_the_paper_s_four_windows(tmp_path: Path) -> None:
    words = ("estimate", ROOT / "experiments" / "longcap", "--gpu", "h100-80g", "--gpus", "1,4")
    said = longclip(*words, cwd=tmp_path)
    assert said.startswith("parameters 454,160,129 (image trunk 303,179,776, ")
    assert sum(line.startswith("ctx") and " tokens of " not in line for line in said.splitlines()) >= 8
    assert "tokens of captions: published distribution" in said and "hours are those of a million pairs" in said
    found = json.loads(longclip(*words, "--json", cwd=tmp_path))
    assert [(e["window"], e["ranks"]) for e in found] == [(w, r) for w in (77, 154, 256, 512) for r in (1, 4)]
    assert all(e["fits"] for e in found)


@pytest.mark.parametrize("words", ["--gpus 1 4 8 16", "--gpus 1,4,8,16", "--gpus 1,4 8 16"])
def test_numbers_of_gpus_are_written_with_spaces_or_commas(words: str, tmp_path: Path) -> None:
    file = ROOT / "experiments" / "longcap" / "ctx77.yaml"
    for order in ((file, *words.split()), (*words.split(), file)):
        found = json.loads(longclip("estimate", *order, "--json", cwd=tmp_path))
        assert [(e["name"], e["ranks"]) for e in found] == [("ctx77", ranks) for ranks in (1, 4, 8, 16)]
    assert "no experiment file is named" in longclip("estimate", *words.split(), "2", cwd=tmp_path, code=2)


def test_memory_is_split_into_its_parts_at_every_stage(tmp_path: Path) -> None:
    """One line a stage, and one of what is taken where that is a smaller micro batch; no line above 120 columns."""
    file = ROOT / "experiments" / "longcap" / "ctx512.yaml"
    words = ("estimate", file, "--gpu", "h100-80g", "--gpus", "1", "4")
    lines = longclip(*words, cwd=tmp_path).splitlines()
    head = next(i for i, line in enumerate(lines) if "gradients" in line and "optimizer" in line)
    names = ("weights", "gradients", "optimizer", "its step", "activations", "loss", "other", "peak")
    assert all(name in lines[head] for name in names)
    split = lines[head + 1 : head + 8]
    assert [line.split()[1:4] for line in split] == [
        *(["1", "4096", str(stage)] for stage in (1, 2, 3)),
        ["1", "1024", "1"],
        *(["4", "1024", str(stage)] for stage in (1, 2, 3)),
    ]
    assert [line.rstrip().endswith("taken") for line in split] == [False, False, False, True, True, False, False]
    assert max(len(line.rstrip()) for line in lines[1 : head + 8]) <= 120
    one, four = json.loads(longclip(*words, "--json", cwd=tmp_path))
    assert four["by_stage"]["1"] == four["memory"]
    parts = four["by_stage"]["3"]
    shown = [f"{parts[name] / 2**30:.1f}" for name in ("weights", "gradients", "optimizer", "step", "activations")]
    assert split[6].split()[4:9] == shown and split[6].split()[-1] == f"{parts['peak'] / 2**30:.1f}"
    assert one["by_stage"]["1"]["peak"] > one["memory"]["peak"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--gpu", "h100"), "--gpu h100: not known; known: v100-16g, "),
        (("--gpus", "3"), "--gpus 3: a batch of 4096 does not divide among them"),
        (("--gpus", "one"), "--gpus one: valid is a number, or several: 1 4 16"),
        (("--gpus", "4", "0"), "--gpus 4 0: valid is a number, or several: 1 4 16"),
    ],
)
def test_mistakes(words: tuple[str, ...], said: str, tmp_path: Path) -> None:
    assert said in longclip("estimate", ROOT / "experiments" / "longcap", *words, cwd=tmp_path, code=2)


def test_token_lengths_are_measured_on_indexed_shards(tmp_path: Path) -> None:
    sweep = make_sweep(tmp_path, (4, 9))
    said = longclip("estimate", sweep, "--json", cwd=tmp_path)
    narrow, wide = json.loads(said)
    assert narrow["tokens"] <= 4 < wide["tokens"] <= 9
    assert narrow["samples"] == 1440 and narrow["hours"] is None
    assert "96 of 96 training captions" in longclip("estimate", sweep, cwd=tmp_path)


@pytest.mark.skipif(not DATA.is_dir(), reason=f"no real shards at {DATA} (LONGCLIP_TEST_DATA names others)")
def test_real_captions(tmp_path: Path) -> None:
    index_folder(DATA, tmp_path / "index", workers=2)
    sweep = make_sweep(tmp_path, (64,))
    words = ("estimate", sweep, "--set", f"data.train={tmp_path / 'index'}", "--json")
    (one,) = json.loads(longclip(*words, cwd=tmp_path))
    assert 55 < one["tokens"] <= 64  # their median is above 100


def test_no_torch(tmp_path: Path) -> None:
    """On a login node: not estimate, and not what submit shows."""
    sweep = make_sweep(tmp_path, (9,))
    lines = (
        "import sys; sys.modules.update(torch=None, transformers=None, deepspeed=None)",  # importing them raises
        "from longclip.cli import app",
        f"app(['estimate', {str(sweep)!r}], standalone_mode=False)",
        f"app(['submit', {str(sweep)!r}, '--dry-run'], standalone_mode=False)",
    )
    done = subprocess.run([sys.executable, "-c", "\n".join(lines)], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and "rank-h" in done.stdout, done


# ---- submit's columns --------------------------------------------------------------------------------------------


def plan_of(run: RunFolder, asked: Experiment, action: str, samples: int | None = 1000) -> Plan:
    return Plan(asked, {}, Resolved(samples=samples), {}, run, action, "")


def test_a_run_that_has_trained_is_measured_not_estimated(tmp_path: Path) -> None:
    """600 pairs are left at 20 pairs/s on two ranks: a minute of two."""
    from longclip.run.journal import Journal

    asked = experiment().model_copy(update={"slurm": experiment().slurm.model_copy(update={"tasks_per_node": 2})})
    run = make_run(tmp_path, asked)
    attempt = add_attempt(run, 0)
    attempt.begin(0)
    journal = Journal(attempt.journal)
    for step in range(1, 5):
        journal.write(step, 100 * step, {"speed/samples_per_second": 20.0}, START + 5 * step)
    journal.close()
    assert shown(plan_of(run, asked, "resume"), Site())[0] == f"{600 / 20 * 2 / 3600:.2g}"
    assert shown(plan_of(run, asked, "left alone"), Site()) == ("0", "0")
    on_eight = asked.model_copy(update={"slurm": asked.slurm.model_copy(update={"tasks_per_node": 8})})
    assert shown(plan_of(run, on_eight, "resume"), Site())[0] == f"{600 / 20 * 2 / 3600:.2g}", "two were measured"

    more = add_attempt(run, 100, ranks=8)
    more.begin(400)
    journal = Journal(more.journal)
    for step in range(5, 9):
        journal.write(step, 100 * step, {"speed/samples_per_second": 40.0}, START + 100 + 5 * step)
    journal.close()
    both = (20 / 2 + 40 / 8) / 2  # of one rank: the median lies between four points of each
    assert shown(plan_of(run, asked, "resume"), Site())[0] == f"{200 / both / 3600:.2g}"


def test_a_new_run_is_estimated_where_its_gpu_is_known(tmp_path: Path) -> None:
    asked, run = paper(), RunFolder(tmp_path / "longcap" / "ctx512-00000000")
    hours, disk = shown(plan_of(run, asked, "new", 20 * 10**6), Site(gpu_type="h200"))
    assert 5 < float(hours) < 30 and disk == "22 GB"
    assert shown(plan_of(run, asked, "new", 20 * 10**6), Site())[0] == "?"
    assert shown(plan_of(run, asked, "new", None), Site(gpu_type="h200"))[0] == "?"


def test_submit_says_what_does_not_fit_by_the_estimate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four GPUs hold 1,024 pairs each; one does not hold 4,096, and what is smaller than the model's states nothing."""
    run = RunFolder(tmp_path / "longcap" / "ctx512-00000000")

    def said(gpu_type: str | None, gpus: int, **engine: object) -> str | None:
        asked = paper()
        parts = {"slurm": {"gpus_per_node": gpus}, "engine": engine}
        changed = {name: getattr(asked, name).model_copy(update=update) for name, update in parts.items()}
        plan, site = plan_of(run, asked.model_copy(update=changed), "new"), Site(gpu_type=gpu_type)
        return unfit(plan, of_plan(plan, site), site)

    assert said("h100-80g", 4) is None and said(None, 1) is None
    needs = said("h100-80g", 1)
    assert needs is not None and "4096 pairs at once at ZeRO 1 need " in needs
    assert needs.endswith(", h100-80g has 79: zero_stage 1 with micro_batch 1024 fits (longclip estimate)")
    assert said("h100-80g", 1, micro_batch=1024) is None
    monkeypatch.setitem(GPUS, "tiny", Gpu("tiny", 4.0, 1e12, 1e12, ()))
    assert (said("tiny", 1) or "").endswith(", tiny has 4: nothing fits (longclip estimate)")


def test_an_offload_to_none_is_none() -> None:
    def states(device: str) -> int:
        zero = {"zero_optimization": {"offload_optimizer": {"device": device}}}
        asked = paper()
        return guess(
            asked.model_copy(update={"engine": asked.engine.model_copy(update={"deepspeed": zero})})
        ).memory.optimizer

    assert states("cpu") == 0 and states("none") == guess(paper()).memory.optimizer > 0


def test_a_micro_batch_is_never_more_than_a_rank_s_share() -> None:
    """On more GPUs than the file asks for; one that does not divide the share is refused in training."""
    asked = paper()
    asked = asked.model_copy(update={"engine": asked.engine.model_copy(update={"micro_batch": 1024})})
    sizes = {ranks: guess(asked, ranks, "h200").micro_batch for ranks in (4, 16, 64)}
    assert sizes == {4: 1024, 16: 256, 64: 64}
    assert guess(asked, 16, "h200").memory == guess(paper(), 16, "h200").memory


def shown(plan: Plan, site: Site) -> tuple[str, str]:
    return columns(plan, of_plan(plan, site))
