"""DeepSpeed at any ZeRO stage on any number of ranks does what a plain torch loop does. CPU, fp32.

Gradient norms are compared as well as losses: Adam divides a wrong factor of the gradient out again.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from longclip.errors import SiteError, UserError
from longclip.train import engine
from longclip.train import ranks as processes
from longclip.train.ranks import COLLECTIVE_TIMEOUT
from longclip.train.watch import LONGEST_LIMIT
from tests.train.conftest import STAGES, Groups
from tests.train.two_towers import CLIP, LR, STEPS, WARMUP, experiment, plain_training

Curves = tuple[list[float], ...]


@pytest.fixture(scope="module")
def plain() -> Curves:
    return plain_training()


def test_the_comparison_is_worth_something(plain: Curves) -> None:
    losses, norms, scales = plain
    assert sum(losses[-4:]) < 0.8 * sum(losses[:4])
    assert min(norms) < CLIP < max(norms)
    assert sum(norm > CLIP for norm in norms) in range(5, STEPS - 5)
    assert max(scales) < 50


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("stage", STAGES)
def test_equals_plain_torch(trained: Groups, plain: Curves, ranks: int, stage: int) -> None:
    run = trained[ranks][f"zero{stage}"]
    assert run["losses"] == pytest.approx(plain[0], rel=1e-5)
    assert run["norms"] == pytest.approx(plain[1], rel=1e-5)


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("stage", STAGES)
def test_the_scale_is_held_at_its_bound_and_comes_back(trained: Groups, ranks: int, stage: int) -> None:
    losses, norms, scales = plain_training(near_bound=True)
    assert scales[4:8] == pytest.approx([100] * 4) and scales[-1] < 98
    run = trained[ranks][f"bound zero{stage}"]
    assert run["scales"] == pytest.approx(scales, rel=1e-5)
    assert run["losses"] == pytest.approx(losses, rel=1e-5)
    assert run["norms"] == pytest.approx(norms, rel=1e-5)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_bf16_is_near(trained: Groups, plain: Curves, stage: int) -> None:
    """How near, README.md says (Conventions of the numbers)."""
    run = trained[2][f"bf16 zero{stage}"]
    losses, norms = (
        max(abs(a / b - 1) for a, b in zip(run[name], fp32, strict=True))
        for name, fp32 in zip(("losses", "norms"), plain, strict=False)
    )
    print(f"bf16 at ZeRO {stage}, largest deviation from fp32 in {STEPS} steps: loss {losses:.1%}, norm {norms:.1%}")
    assert losses < 0.03
    assert norms < 0.03


def test_a_wrongly_scaled_gather_shows(trained: Groups, plain: Curves) -> None:
    norms = trained[2]["wrong"]["norms"]
    assert abs(norms[0] / plain[1][0] - 1) > 1e-3
    assert norms != pytest.approx(plain[1], rel=1e-3)


@pytest.mark.parametrize("stage", STAGES)
def test_a_diverged_step_shows_in_the_norm(trained: Groups, stage: int) -> None:
    assert trained[1][f"diverge zero{stage}"] == {"finite": False}


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_masked_samples_are_as_if_absent(trained: Groups, ranks: int) -> None:
    losses, norms, _ = plain_training(masked=True)
    assert trained[ranks]["masked"]["losses"] == pytest.approx(losses, rel=1e-5)
    assert trained[ranks]["masked"]["norms"] == pytest.approx(norms, rel=1e-5)


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_ranks_agree(trained: Groups, ranks: int) -> None:
    said = trained[ranks]["talk"]
    assert said["sums"] == [ranks, sum(rank + 0.5 for rank in range(ranks))]
    assert said["any"] == [True, False]
    assert said["told"] == {"from": 0}


@pytest.mark.parametrize("stage", STAGES)
def test_no_collective_gives_up_before_the_watch(trained: Groups, stage: int) -> None:
    """The engine's group is DeepSpeed's own, not the one that ranks.py starts with."""
    seconds = trained[2][f"timeouts zero{stage}"]
    assert "the engine's" in seconds
    assert set(seconds.values()) == {COLLECTIVE_TIMEOUT.total_seconds()}
    assert COLLECTIVE_TIMEOUT.total_seconds() > LONGEST_LIMIT


ALONE = """
import torch
from tests.train.two_towers import TwoTowers, batch, experiment
from longclip.train import engine, loss, ranks
for _ in range(2):
    me = ranks.start()
    assert (me.rank, me.size, me.device.type) == (0, 1, "cpu")
    running = engine.start(TwoTowers(), experiment(1), me)
    running.backward(loss.contrastive_loss(*running(*batch(0)), me))
    print(engine.step(running))
    ranks.stop()
"""


def test_a_single_process_needs_no_launcher_and_no_compiler(plain: Curves, tmp_path: Path) -> None:
    env = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    env |= {"PYTHONPATH": str(Path(__file__).parents[2]), "TORCH_EXTENSIONS_DIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", ALONE], env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert [float(line) for line in done.stdout.split()] == pytest.approx([plain[1][0]] * 2, rel=1e-5)
    assert list(tmp_path.iterdir()) == []


def test_learning_rate() -> None:
    train = experiment(1).train
    rates = [engine.learning_rate(train, step, STEPS) for step in range(STEPS + 1)]
    assert rates[:WARMUP] == pytest.approx([LR / 3, LR * 2 / 3, LR])
    assert rates[WARMUP] == pytest.approx(LR)
    assert rates == sorted(rates[:WARMUP]) + sorted(rates[WARMUP:], reverse=True)
    assert rates[-1] == pytest.approx(0, abs=1e-12)
    constant = train.model_copy(update={"schedule": "constant", "warmup_steps": 0})
    assert {engine.learning_rate(constant, step, STEPS) for step in range(STEPS)} == {LR}


def test_configuration() -> None:
    asked = experiment(2)
    more = {"zero_optimization": {"reduce_bucket_size": 1000}, "steps_per_print": 5}
    asked = asked.model_copy(update={"engine": asked.engine.model_copy(update={"deepspeed": more})})
    config = engine.deepspeed_config(asked, 4)
    assert config["train_batch_size"] == 24
    assert config["train_micro_batch_size_per_gpu"] == 6
    assert config["gradient_accumulation_steps"] == 1
    assert config["gradient_clipping"] == CLIP
    assert config["zero_optimization"] == {"stage": 2, "reduce_bucket_size": 1000}
    assert config["steps_per_print"] == 5
    in_three = asked.model_copy(update={"engine": asked.engine.model_copy(update={"micro_batch": 2})})
    config = engine.deepspeed_config(in_three, 4)
    assert (config["train_micro_batch_size_per_gpu"], config["gradient_accumulation_steps"]) == (2, 3)
    with pytest.raises(UserError, match=r"engine\.micro_batch is 2, which does not divide the 3 pairs"):
        engine.deepspeed_config(in_three, 8)
    with pytest.raises(UserError, match="24, which does not divide among 5 ranks"):
        engine.deepspeed_config(asked, 5)


FIRST_OF_TWO = """
from datetime import timedelta
from longclip.train import ranks
ranks.MEETING_TIMEOUT = timedelta(seconds=3)
ranks.start()
"""


def test_a_rank_that_never_comes_is_not_waited_for_as_long_as_for_a_collective() -> None:
    env = os.environ | {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    env |= {"MASTER_PORT": "0", "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", FIRST_OF_TWO], env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and "1/2 clients joined" in done.stderr, done.stderr


def test_a_node_that_sees_no_gpu_is_named_and_not_waited_for() -> None:
    """On all ranks: there gloo would be waited for, and NCCL elsewhere."""
    store = dist.HashStore()  # type: ignore[attr-defined]
    store.set("longclip/device/0", "cuda n1")
    for other, kind in ((0, "cuda"), (1, "cpu")):
        store.set("longclip/device/1", "cpu n2")
        with pytest.raises(SiteError, match="no GPU is to be seen on"):
            processes._same_device(store, other, 2, torch.device(kind))
