"""A run that was interrupted goes on as if it had not been, at any ZeRO stage and on any number of ranks."""

from __future__ import annotations

from collections.abc import Callable
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest
import torch

from longclip.run.checkpoints import latest, verify
from longclip.train import checkpoint
from tests.train.conftest import SAVED, STAGES, Groups
from tests.train.two_towers import TwoTowers

SAME = [(2, f"zero{stage}") for stage in STAGES] + [(4, f"zero{stage}") for stage in STAGES]
SAME += [(2, f"bf16 zero{stage}") for stage in (1, 2, 3)]
ACROSS = [  # (ranks, stage) that saved -> (ranks, stage) that continue
    ((2, 1), (2, 0)),
    ((2, 1), (2, 3)),
    ((2, 3), (2, 2)),
    ((2, 0), (2, 3)),
    ((2, 2), (2, 1)),
    ((2, 1), (1, 1)),
    ((2, 3), (1, 3)),
    ((2, 2), (3, 2)),
    ((2, 3), (3, 3)),
    ((2, 0), (3, 1)),
    ((2, 1), (4, 1)),
    ((2, 3), (4, 3)),
    ((4, 2), (2, 2)),
    ((4, 3), (2, 3)),
    ((4, 3), (1, 0)),
]
EVERY = [((2, old), (2, new)) for old, new in permutations(STAGES, 2)]
EVERY += [((old, stage), (new, stage)) for stage in (1, 3) for old, new in permutations((1, 2, 3, 4), 2)]


def named(across: tuple[tuple[int, int], tuple[int, int]]) -> str:
    (old_ranks, old_stage), (ranks, stage) = across
    return f"{old_ranks} ranks zero{old_stage} to {ranks} ranks zero{stage}"


@pytest.fixture(scope="module")
def continued(run_ranks: Callable[[Groups], Groups], trained: Groups, checkpoints: Path, tmpfs: Path | None) -> Groups:
    """Steps 10 to 19 of ``trained``, in new processes, from its checkpoints; saves that fail."""
    groups: Groups = {size: {} for size in (1, 2, 3, 4)}
    for ranks, label in SAME:
        bf16, zero = label.startswith("bf16"), int(label[-1])
        job = {"do": "train", "stage": zero, "last": 20, "restore": str(checkpoints / f"{ranks}-{label}" / SAVED)}
        groups[ranks][f"same {label}"] = job | ({"precision": "bf16"} if bf16 else {})
    for across in ACROSS:
        (old_ranks, old_stage), (ranks, stage) = across
        source = checkpoints / f"{old_ranks}-zero{old_stage}" / SAVED
        groups[ranks][named(across)] = {"do": "train", "stage": stage, "last": 20, "restore": str(source)}
    groups[2]["fence"] = {"do": "superseded_save", "stage": 3, "folder": str(checkpoints / "fence")}
    if tmpfs:
        groups[2]["full"] = {"do": "save_on_full_disk", "stage": 3, "folder": str(tmpfs / "ranks")}
    groups[2]["other"] = {"do": "other_model", "stage": 3, "restore": str(checkpoints / "2-zero3" / SAVED)}
    return run_ranks(groups)


@pytest.mark.parametrize(("ranks", "label"), SAME)
def test_same_ranks_and_stage_continue_bit_by_bit(continued: Groups, trained: Groups, ranks: int, label: str) -> None:
    run, whole = continued[ranks][f"same {label}"], trained[ranks][label]
    assert run["losses"] == whole["losses"][10:20]
    assert run["norms"] == whole["norms"][10:20]


@pytest.mark.parametrize("across", ACROSS, ids=named)
def test_other_ranks_and_stages_continue(
    continued: Groups, trained: Groups, across: tuple[tuple[int, int], tuple[int, int]]
) -> None:
    (old_ranks, old_stage), (ranks, _) = across
    run, whole = continued[ranks][named(across)], trained[old_ranks][f"zero{old_stage}"]
    assert run["losses"] == pytest.approx(whole["losses"][10:20], rel=1e-5)
    assert run["norms"] == pytest.approx(whole["norms"][10:20], rel=1e-5)


@pytest.mark.slow
def test_every_pair_continues(run_ranks: Callable[[Groups], Groups], trained: Groups, checkpoints: Path) -> None:
    three: dict[str, dict[str, Any]] = {
        f"zero{s}": {"do": "train", "stage": s, "save_at": 10, "folder": str(checkpoints / f"3-zero{s}")}
        for s in (1, 3)
    }
    whole = {**trained, 3: run_ranks({3: three})[3]}
    groups: Groups = {size: {} for size in (1, 2, 3, 4)}
    for across in EVERY:
        (old_ranks, old_stage), (ranks, stage) = across
        source = checkpoints / f"{old_ranks}-zero{old_stage}" / SAVED
        groups[ranks][named(across)] = {"do": "train", "stage": stage, "last": 20, "restore": str(source)}
    runs = run_ranks(groups)
    for across in EVERY:
        (old_ranks, old_stage), (ranks, _) = across
        run, uninterrupted = runs[ranks][named(across)], whole[old_ranks][f"zero{old_stage}"]
        assert run["losses"] == pytest.approx(uninterrupted["losses"][10:20], rel=1e-5), named(across)
        assert run["norms"] == pytest.approx(uninterrupted["norms"][10:20], rel=1e-5), named(across)


def test_weights_are_read_without_an_engine(trained: Groups, checkpoints: Path) -> None:
    weights = checkpoint.load_weights(checkpoints / "2-zero3" / SAVED)
    model = TwoTowers()
    model.load_state_dict(weights)
    assert {weight.dtype for weight in weights.values()} == {torch.float32}
    across = checkpoint.load_weights(checkpoints / "4-zero1" / SAVED)
    for name, weight in weights.items():
        torch.testing.assert_close(across[name], weight, rtol=1e-3, atol=1e-5)


def test_another_model_is_refused_by_name(continued: Groups) -> None:
    error = continued[2]["other"]["error"]
    assert "is of another model, 5 parameters differ: image.0.bias: (21,) here, (19,) there" in error


def test_a_superseded_save_stops_all_ranks(continued: Groups, checkpoints: Path) -> None:
    folder = checkpoints / "fence"
    assert continued[2]["fence"]["caught"] == ["LongclipError: superseded by attempt 2"] * 2
    assert sorted(path.name for path in folder.iterdir()) == ["latest", "step-00000001"]
    assert latest(folder) == folder / "step-00000001"


def test_a_full_disk_stops_all_ranks_and_harms_nothing(continued: Groups, small_disk: Path) -> None:
    folder = small_disk / "ranks"
    for caught in continued[2]["full"]["caught"]:
        assert caught.startswith(f"NoSpace: no room left: {folder}: No space left on device")
    # Then room was made, and the same engine saved the same step.
    assert sorted(path.name for path in folder.iterdir()) == ["latest", "step-00000001", "step-00000002"]
    assert continued[2]["full"]["left"] == ["latest", "step-00000001"]
    verify(folder / "step-00000001")
    assert latest(folder) == folder / "step-00000002"
