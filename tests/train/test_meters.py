"""The meters of a run that was trained on two ranks, and the clock behind them."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

from longclip.model.shape import shape_of
from longclip.run.journal import effective
from longclip.train.meters import PARTS, Clock
from tests.launch.small import longclip, make_sweep, the_run


@pytest.fixture(scope="module")
def points(tmp_path_factory: pytest.TempPathFactory) -> list[Mapping[str, float]]:
    """Of 30 steps at stage 2; evaluated after 20, which is not to be seen in the times."""
    root = tmp_path_factory.mktemp("work")
    sets = ("train.samples=720", "evaluate.every=15 steps")
    words = [word for s in sets for word in ("--set", s)]
    longclip("submit", make_sweep(root, (9,)), "--on", "local", *words, cwd=root)
    run = the_run(root / "runs", "ctx9")
    found = [point.metrics for point in effective(run) if "time/step" in point.metrics]
    assert len(found) == 3
    return found


def test_the_parts_add_up_to_the_step(points: list[Mapping[str, float]]) -> None:
    for metrics in points:
        parts = {part: metrics[f"time/{part}"] for part in PARTS}
        assert all(value > 0 for value in parts.values()), parts
        assert sum(parts.values()) == pytest.approx(metrics["time/step"], rel=0.05)
        assert metrics["data/wait_share"] == pytest.approx(parts["data"] / metrics["time/step"], rel=1e-6)


def test_flops_are_those_of_the_real_tokens(points: list[Mapping[str, float]], tmp_path: Path) -> None:
    """By hand from the shape of tests/launch/small.py and the tokens that were counted. CPUs have no known peak."""
    from longclip.experiment.load import load

    (one,) = load([make_sweep(tmp_path, (9,))])
    model = one.experiment.model
    shape = shape_of(model, model.image.config or {}, model.text.config or {})
    for metrics in points:
        tokens = metrics["speed/tokens_per_second"] / metrics["speed/samples_per_second"]
        assert tokens == pytest.approx(9 * (1 - metrics["text/padding_avoided"]))
        below, above = (shape.step_flops([n], 1) for n in (int(tokens), int(tokens) + 1))
        per_pair = 2 * metrics["speed/model_tflops_per_rank"] * 1e12 / metrics["speed/samples_per_second"]
        assert below < per_pair < above
        assert "speed/share_of_peak" not in metrics


def test_time_belongs_to_the_part_that_is_on() -> None:
    """An exchange inside of the backward pass is not the backward pass; an error changes nothing about that."""
    clock = Clock(torch.device("cpu"))

    def fail() -> None:
        time.sleep(0.03)
        raise ValueError

    def backward() -> None:
        time.sleep(0.05)
        clock.during("exchange", time.sleep)(0.1)
        with pytest.raises(ValueError):
            clock.during("exchange", fail)()
        time.sleep(0.02)

    begun = time.perf_counter()
    clock.during("backward", backward, then="exchange")()
    assert clock.part == "exchange"
    spent = clock.seconds()
    assert spent["backward"] >= 0.07 and spent["exchange"] >= 0.13 and spent["optimizer"] == 0.0
    assert sum(spent.values()) <= time.perf_counter() - begun + 0.01
    clock.reset()
    assert clock.part == "other" and sum(clock.seconds().values()) < 0.05
