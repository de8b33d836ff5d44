"""Two passes, activation checkpointing, sigmoid loss, offload, frozen layers: what plain torch does. CPU, fp32.

The step is the training loop's own, on a real dual encoder with packed text; the reference pads.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch

from longclip.train.cached import deal
from tests.data.test_loader import make_shards, make_tokenizer
from tests.train.conftest import STAGES, Groups
from tests.train.small_clip import BATCH, CLIP, part, plain_training

Curves = tuple[list[float], list[float]]
plain = functools.cache(plain_training)


def case(stage: int, micro: int | None, checkpointing: bool) -> str:
    return (
        f"zero{stage}, {'direct' if micro is None else 'two passes'}, checkpointing {'on' if checkpointing else 'off'}"
    )


def jobs(ranks: int, stages: Any, passes: Any, checkpointings: Any) -> dict[str, dict[str, Any]]:
    found = {}
    for stage in stages:
        for two in passes:
            for checkpointing in checkpointings:
                micro = BATCH // ranks // 3 if two else None
                job = {"do": "clip", "stage": stage, "checkpointing": checkpointing}
                found[case(stage, micro, checkpointing)] = job | ({"micro": micro} if micro else {})
    return found


FAST = {
    1: {},
    2: jobs(2, (0, 3), (True,), (True,)) | jobs(2, (1, 2), (True,), (False,)) | jobs(2, (3,), (False,), (True,)),
    3: {},
    4: jobs(4, (2,), (True,), (True,)),
}
FREEZE = {"image": "all", "text": 1}
CONTINUED: dict[str, dict[str, Any]] = {
    "offload zero2": {"stage": 2, "offload": True},
    "offload zero3, two passes": {"stage": 3, "offload": True, "micro": 4},
    "frozen zero0": {"stage": 0, "freeze": FREEZE},
    "frozen zero1, two passes": {"stage": 1, "freeze": FREEZE, "micro": 4},
    "frozen zero3": {"stage": 3, "freeze": FREEZE},
}
FULL = {ranks: jobs(ranks, STAGES, (False, True), (False, True)) for ranks in (1, 2, 4)}


def test_the_comparison_is_worth_something() -> None:
    losses, norms = plain()
    assert losses[-1] != pytest.approx(losses[0], rel=0.01)
    assert min(norms) < CLIP < max(norms)


@pytest.fixture(scope="module")
def fast(run_ranks: Callable[[Groups], Groups], tmp_path_factory: pytest.TempPathFactory) -> Groups:
    groups = {ranks: dict(cases) for ranks, cases in FAST.items()}
    folder = tmp_path_factory.mktemp("small")
    make_tokenizer(folder / "tokenizer")
    data = make_shards(folder / "val", [23], spoil=("00-005",))
    groups[3]["score"] = {
        "do": "score",
        "stage": 3,
        "batch": 4,
        "first": [23, 17, 2],
        "data": str(data.folder),
        "tokenizer": str(folder / "tokenizer"),
    }
    for ranks in (1, 2):
        groups[ranks]["dropout"] = {"do": "dropout", "stage": 1 + ranks, "micro": 4}
    groups[1] |= {
        "kept direct": {"do": "memory", "stage": 0},
        "kept in four": {"do": "memory", "stage": 0, "micro": 6},
        "kept with checkpointing": {"do": "memory", "stage": 0, "checkpointing": True},
        "in bf16": {"do": "in_bf16", "stage": 1, "precision": "bf16"},
    }
    groups[2] |= {
        "sigmoid": {"do": "clip", "stage": 1, "loss": "sigmoid"},
        "sigmoid, two passes": {"do": "clip", "stage": 3, "loss": "sigmoid", "micro": 4},
    }
    for label, job in CONTINUED.items():
        saved = folder / label
        groups[2][label] = {"do": "clip", **job, "save_at": 3, "folder": str(saved)}
        groups[2][f"{label}, continued"] = {"do": "clip", **job, "restore": str(saved / "step-00000003")}
    for stage in (1, 2, 3):
        groups[2][f"bf16 zero{stage}"] = {"do": "clip", "stage": stage, "precision": "bf16", "micro": 4}
    return run_ranks(groups)


def same(run: dict[str, Any], curves: Curves) -> None:
    assert run["losses"] == pytest.approx(curves[0], rel=1e-5)
    assert run["norms"] == pytest.approx(curves[1], rel=1e-5)


@pytest.mark.parametrize(("ranks", "label"), [(ranks, label) for ranks, cases in FAST.items() for label in cases])
def test_equals_plain_torch(fast: Groups, ranks: int, label: str) -> None:
    same(fast[ranks][label], plain())


@pytest.mark.slow
def test_every_combination_equals_plain_torch(run_ranks: Callable[[Groups], Groups]) -> None:
    for runs in run_ranks(FULL).values():
        for run in runs.values():
            same(run, plain())


@pytest.mark.slow
def test_compiled_layers_equal_plain_torch(run_ranks: Callable[[Groups], Groups]) -> None:
    """Stages 0 to 2, direct and in two passes; and dropout, replayed."""
    runs = jobs(2, (0, 1, 2), (False, True), (False,))
    dropout = {"do": "dropout", "stage": 2, "micro": 4}
    done = run_ranks({2: {label: {**job, "compile": True} for label, job in {**runs, "dropout": dropout}.items()}})[2]
    for label in runs:
        same(done[label], plain())
    assert done["dropout"]["loss"] == pytest.approx(done["dropout"]["expected"], rel=1e-5)
    assert done["dropout"]["gradients"] < 1e-4


@pytest.mark.parametrize("ranks", [1, 2])
def test_dropout_is_replayed(fast: Groups, ranks: int) -> None:
    got = fast[ranks]["dropout"]
    assert got["loss"] == pytest.approx(got["expected"], rel=1e-5)
    assert got["gradients"] < 1e-4


def test_micro_batches_and_checkpointing_save_memory(fast: Groups) -> None:
    direct = fast[1]["kept direct"]["bytes"]
    assert fast[1]["kept in four"]["bytes"] < direct / 3
    assert fast[1]["kept with checkpointing"]["bytes"] < direct / 2


@pytest.mark.parametrize("label", ["sigmoid", "sigmoid, two passes"])
def test_sigmoid_equals_plain_torch(fast: Groups, label: str) -> None:
    same(fast[2][label], plain(loss="sigmoid"))


@pytest.mark.parametrize("label", CONTINUED)
def test_offloaded_and_frozen_continue_bit_by_bit(fast: Groups, label: str) -> None:
    whole, rest = fast[2][label], fast[2][f"{label}, continued"]
    same(whole, frozen() if "freeze" in CONTINUED[label] else plain())
    assert rest == {curve: values[3:] for curve, values in whole.items()}


@functools.cache
def frozen() -> Curves:
    return plain_training(freeze=FREEZE)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_two_passes_in_bf16_are_near(fast: Groups, stage: int) -> None:
    run = fast[2][f"bf16 zero{stage}"]
    losses, norms = (
        max(abs(got / want - 1) for got, want in zip(run[curve], fp32, strict=True))
        for curve, fp32 in zip(("losses", "norms"), plain(), strict=True)
    )
    print(f"bf16 in three micro-batches at ZeRO {stage}, deviation from fp32: loss {losses:.1%}, norm {norms:.1%}")
    assert losses < 0.03
    assert norms < 0.1


def test_evaluate_s_bf16_is_deepspeed_s(fast: Groups) -> None:
    """Bit for bit, or a checkpoint scored afterwards has other figures than in the job that trained it."""
    assert fast[1]["in bf16"]["by"] == [0.0, 0.0]


def test_a_validation_set_that_does_not_divide(fast: Groups) -> None:
    """At ZeRO 3 on three ranks, one of which has nothing in the last round, or nothing at all."""
    got = fast[3]["score"]
    for scores, expected in zip(got["scores"], got["expected"], strict=True):
        assert {key: scores[key] for key in expected} == pytest.approx(expected)
    assert [scores["pairs"] for scores in got["scores"]] == [22, 16, 2]


def test_the_towers_run_apart_as_well(fast: Groups) -> None:
    """A suite's figures on the same ranks, before and after the towers ran together: those of one model alone."""
    got = fast[3]["score"]
    for facts in got["apart"]:
        assert facts.pop("metrics") == pytest.approx(got["alone"]["metrics"])
        assert facts == {key: value for key, value in got["alone"].items() if key != "metrics"}
    assert got["alone"]["pairs"] == 22


def test_pairs_are_dealt_evenly() -> None:
    whole = part(0, 0, 1)
    places, micros = deal(whole, 4)
    assert sorted(places.tolist()) == list(range(BATCH))
    tokens = [len(micro.text.ids_T) for micro in micros]
    assert sum(tokens) == whole.tokens
    assert max(tokens) - min(tokens) <= max(whole.text.lengths)
    assert torch.equal(torch.cat([micro.pixels for micro in micros]), whole.pixels[places])
