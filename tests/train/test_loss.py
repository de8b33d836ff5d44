"""The loss in tiles is the loss computed whole: value and gradients, on any number of ranks, without bad samples."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.train.conftest import Groups

ROOT = Path(__file__).parents[2]
PAIRS = 24
KINDS = ("contrastive", "sigmoid")
SIZES = (1, 2, 3)
BAD = torch.Generator().manual_seed(3)
CASES: dict[str, dict[str, Any]] = {
    "tiles that do not divide": {"tile": 5, "scale": 14.0},
    "a tile each": {"tile": 1, "scale": 14.0},
    "one tile": {"scale": 14.0},
    "at the bound of the scale, pairs alike": {"tile": 7, "scale": 100.0, "alike": 1.0},
    "bad samples": {"tile": 5, "scale": 14.0, "valid": (torch.rand(PAIRS, generator=BAD) > 0.3).tolist()},
    "all of a rank bad": {"tile": 5, "scale": 14.0, "valid": [i < PAIRS // 3 for i in range(PAIRS)]},
    "one pair": {"scale": 14.0, "valid": [i == 9 for i in range(PAIRS)]},
    "no pair": {"scale": 14.0, "valid": [False] * PAIRS},
}


@pytest.fixture(scope="module")
def computed(tmp_path_factory: pytest.TempPathFactory) -> Groups:
    cases = {
        f"{kind}: {case}": {"pairs": PAIRS, "kind": kind, **settings}
        for kind in KINDS
        for case, settings in CASES.items()
    }
    cases |= {kind: {"pairs": 3000, "kind": kind, "scale": 30.0, "alike": 1.0} for kind in KINDS}
    folder = tmp_path_factory.mktemp("losses")
    (folder / "cases.json").write_text(json.dumps({"ranks": SIZES, "cases": cases}))
    command = [sys.executable, "-m", "tests.train.loss_worker", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-5000:]
    return {size: json.loads((folder / f"{size}.json").read_text()) for size in SIZES}


@pytest.mark.parametrize("ranks", SIZES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", CASES)
def test_tiles_equal_the_whole(computed: Groups, ranks: int, kind: str, case: str) -> None:
    got = computed[ranks][f"{kind}: {case}"]
    assert got["loss"] == pytest.approx(got["expected"], rel=1e-6, abs=1e-7)
    assert got["gradients"] < 1e-5


@pytest.mark.parametrize("ranks", SIZES)
@pytest.mark.parametrize("kind", KINDS)
def test_tiles_of_their_real_size(computed: Groups, ranks: int, kind: str) -> None:
    got = computed[ranks][kind]
    assert got["loss"] == pytest.approx(got["expected"], rel=1e-6)
    assert got["gradients"] < 1e-5
