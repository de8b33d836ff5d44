"""A run that was interrupted goes on as if it had not been, at any ZeRO stage and on any number of ranks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from longclip.errors import LongclipError
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


def named(across: tuple[tuple[int, int], tuple[int, int]]) -> str:
    (old_ranks, old_stage), (ranks, stage) = across
    return f"{old_ranks} ranks zero{old_stage} to {ranks} ranks zero{stage}"


@pytest.fixture(scope="module")
def continued(run_ranks: Callable[[Groups], Groups], trained: Groups, checkpoints: Path) -> Groups:
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
    for how in ("full", "fence"):
        groups[2][how] = {"do": "failing_save", "stage": 3, "how": how, "folder": str(checkpoints / how)}
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


@pytest.mark.parametrize(
    ("how", "told"), [("full", "SiteError: no room left"), ("fence", "LongclipError: superseded by attempt 2")]
)
def test_a_save_that_fails_on_rank_0_fails_on_all(continued: Groups, checkpoints: Path, how: str, told: str) -> None:
    for caught in continued[2][how]["caught"]:
        assert caught.startswith(told)
    assert sorted(path.name for path in (checkpoints / how).iterdir()) == ["latest", "step-00000001"]
    assert checkpoint.latest(checkpoints / how) == checkpoints / how / "step-00000001"


# -- the folder, without DeepSpeed


def publish(folder: Path, step: int, fence: Callable[[], None] | None = None) -> Path:
    name = f"step-{step:08d}"
    aside = folder / f".{name}.1.tmp"
    aside.mkdir()
    kinds = (checkpoint.WEIGHTS, *checkpoint.MOMENTS)
    tensors = {"w": torch.full((3,), float(step))}
    files = {f"{kind}.safetensors": checkpoint._write_tensors(aside, kind, tensors) for kind in kinds}
    return checkpoint._publish(aside, folder / name, {"step": step}, files, fence)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("harm", [truncate, flip_a_bit, Path.unlink])
@pytest.mark.parametrize("file", ["weights.safetensors", "exp_avg_sq.safetensors", "state.json", "manifest.json"])
def test_a_broken_checkpoint_is_set_aside(tmp_path: Path, harm: Callable[[Path], None], file: str) -> None:
    publish(tmp_path, 10)
    newest = publish(tmp_path, 20)
    assert checkpoint.latest(tmp_path) == newest
    harm(newest / file)
    for _ in range(2):
        assert checkpoint.latest(tmp_path) == tmp_path / "step-00000010"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["broken-step-00000020", "latest", "step-00000010"]


def test_nothing_to_continue_from(tmp_path: Path) -> None:
    assert checkpoint.latest(tmp_path) is None
    truncate(publish(tmp_path, 10) / "state.json")
    assert checkpoint.latest(tmp_path) is None


def test_what_was_not_published_is_not_continued_from(tmp_path: Path) -> None:
    """A fence that falls between the rename and the moving of ``latest``; then the same step saved by another."""
    asked = []

    def fence() -> None:
        asked.append(None)
        if len(asked) == 2:
            raise LongclipError("superseded")

    publish(tmp_path, 10)
    with pytest.raises(LongclipError, match="superseded"):
        publish(tmp_path, 20, fence)
    assert (tmp_path / "step-00000020").is_dir()
    assert checkpoint.latest(tmp_path) == tmp_path / "step-00000010"
    assert checkpoint.latest(publish(tmp_path, 20).parent) == tmp_path / "step-00000020"


def test_an_unreadable_latest_is_not_the_same_as_none(tmp_path: Path) -> None:
    publish(tmp_path, 10)
    (tmp_path / "latest").write_text("{")
    with pytest.raises(LongclipError, match="is not what was written"):
        checkpoint.latest(tmp_path)


def test_retain(tmp_path: Path) -> None:
    for step in (10, 20, 30, 40):
        publish(tmp_path, step)
    (tmp_path / ".step-00000050.77.tmp").mkdir()
    (tmp_path / "broken-step-00000005").mkdir()
    checkpoint.retain(tmp_path, last=2, best="step-00000010")
    kept = ["broken-step-00000005", "latest", "step-00000010", "step-00000030", "step-00000040"]
    assert sorted(path.name for path in tmp_path.iterdir()) == kept
    checkpoint.retain(tmp_path, last=1, best=None)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["broken-step-00000005", "latest", "step-00000040"]
