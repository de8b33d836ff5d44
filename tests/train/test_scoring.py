"""What is scored in the end: the best checkpoint's weights, read only where the engine holds others."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from longclip.run.folder import RunFolder
from longclip.train import checkpoint, scoring
from longclip.train.ranks import Ranks
from tests.train.conftest import STAGES, Groups

ALONE = Ranks(0, 1, 0, torch.device("cpu"))


@pytest.mark.parametrize(("best", "read"), [("step-00000010", []), ("step-00000008", ["step-00000008"])])
def test_what_the_engine_holds_is_not_read_again(
    best: str, read: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, restored = RunFolder(tmp_path), []
    (run.checkpoints / best).mkdir(parents=True)
    (run.checkpoints / best / "weights.safetensors").touch()
    monkeypatch.setattr(checkpoint, "restore", lambda engine, path, ranks: restored.append(path.name))
    monkeypatch.setattr(Ranks, "agree", lambda self, flag: flag)
    experiment = SimpleNamespace(
        data=SimpleNamespace(test=None), evaluate=SimpleNamespace(batch=1), train=SimpleNamespace(precision="fp32")
    )
    job: Any = SimpleNamespace(run=run, experiment=experiment, suites=["one"], beat=lambda samples: None)
    state = {"step": 10, "samples": 1000, "best": {"checkpoint": best, "samples": 0}}
    val: Any = SimpleNamespace(tokenizer=None, pixels=None)
    assert not scoring.score_best(job, SimpleNamespace(module=None), state, val, ALONE, lambda: True)
    assert restored == read


def test_it_is_what_would_be_read(run_ranks: Callable[[Groups], Groups], tmp_path: Path) -> None:
    """At every stage and precision, to the last bit."""
    cases = [
        (stage, precision) for stage in STAGES for precision in ("fp32", "bf16") if (stage, precision) != (0, "bf16")
    ]
    jobs = {
        f"{stage} {precision}": {
            "do": "held",
            "stage": stage,
            "precision": precision,
            "folder": str(tmp_path / f"{stage}-{precision}"),
        }
        for stage, precision in cases
    }
    assert {label: found["same"] for label, found in run_ranks({2: jobs})[2].items()} == dict.fromkeys(jobs, True)
