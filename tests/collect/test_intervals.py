"""Intervals against the definitions they come from, against resampling spelt out, and against planted truth."""

from __future__ import annotations

import importlib.util
import json
import math
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longclip.collect.intervals import Z, difference, hits, mean_share, share, unpaired

BENCH = Path(__file__).parents[2] / "tools" / "bench" / "coverage.py"


@settings(deadline=None)
@given(st.integers(0, 200), st.integers(200, 5000))
def test_wilsons_bounds_are_where_the_score_test_just_rejects(hit: int, queries: int) -> None:
    found = share(hit / queries, queries)
    for bound in (found.low, found.high):
        if 1e-9 < bound < 1 - 1e-9 and not math.isclose(bound, found.value):
            assert abs(found.value - bound) == pytest.approx(Z * math.sqrt(bound * (1 - bound) / queries), rel=1e-6)
    assert 0 <= found.low <= found.value <= found.high <= 1
    assert found.high - found.low > 1e-4, "also where all queries hit, or none"


def test_newcombes_own_example() -> None:
    """56/70 against 48/80: 0.2000, method 10 gives 0.0524 to 0.3339 (Statistics in Medicine 17, 1998, table II)."""
    found = unpaired(share(48 / 80, 80), share(56 / 70, 70))
    assert (found.value, found.low, found.high) == pytest.approx((0.2, 0.0524, 0.3339), abs=5e-5)


@pytest.mark.parametrize("seeds", [1, 3])
def test_a_paired_difference_is_that_of_queries_drawn_one_by_one(seeds: int) -> None:
    rng = np.random.default_rng(5)
    hard = rng.random(500)
    a = np.array([hard + 0.1 * rng.random(500) < 0.6 for _ in range(seeds)])
    b = np.array([hard + 0.1 * rng.random(500) < 0.65 for _ in range(seeds + 1)])
    found = difference(a, b)
    each = np.concatenate([b.mean(axis=0) - a.mean(axis=0), [-1 / seeds, 1 / seeds]])
    means = [rng.choice(each, len(each)).mean() for _ in range(20_000)]
    assert found.value == pytest.approx(b.mean() - a.mean())
    assert (found.low, found.high) == pytest.approx(tuple(np.quantile(means, [0.025, 0.975])), abs=1.5e-3)
    assert found.is_clear
    assert difference(a, b) == found, "the same runs give the same table"
    turned = difference(b, a)
    assert turned.value == -found.value and turned.low == pytest.approx(-found.high, abs=1.5e-3)


def test_the_mean_over_seeds_is_that_of_queries_drawn_one_by_one() -> None:
    rng = np.random.default_rng(6)
    hard = rng.random(400)
    a = np.array([hard + 0.2 * rng.random(400) < 0.5 for _ in range(3)])
    found = mean_share(a)
    each = np.concatenate([a.mean(axis=0), [0.0, 0.0, 1.0, 1.0]])
    means = [rng.choice(each, len(each)).mean() for _ in range(20_000)]
    assert found.value == pytest.approx(a.mean())
    assert (found.low, found.high) == pytest.approx(tuple(np.quantile(means, [0.025, 0.975])), abs=2e-3)
    assert mean_share(a[:1]) == share(float(a[0].mean()), 400)


def test_where_nothing_differs_there_is_still_doubt() -> None:
    same = np.ones((2, 300), dtype=bool)
    found = difference(same, same)
    assert found.value == 0 and found.low < 0 < found.high and not found.is_clear
    assert mean_share(same).low < 0.999


def test_what_cannot_be_compared() -> None:
    with pytest.raises(ValueError, match="300 queries and 200"):
        difference(np.ones((1, 300)), np.ones((1, 200)))
    with pytest.raises(ValueError, match="no queries"):
        mean_share(np.ones((2, 0)))
    assert list(hits([0, 1, 4, 5], 5)) == [True, True, True, False]


# ---- planted truth -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    spec = importlib.util.spec_from_file_location("coverage_bench", BENCH)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def within(count: float, trials: int) -> bool:
    """Whether a coverage of 93 to 97 % explains it: a count that either would give once in 2,000 times at most."""

    def tail(p: float, least: int, most: int) -> float:
        return sum(
            math.exp(
                math.lgamma(trials + 1)
                - math.lgamma(k + 1)
                - math.lgamma(trials - k + 1)
                + k * math.log(p)
                + (trials - k) * math.log(1 - p)
            )
            for k in range(least, most + 1)
        )

    held = round(count * trials)
    return tail(0.93, 0, held) > 5e-4 and tail(0.97, held, trials) > 5e-4


def test_intervals_hold_the_truth(bench: ModuleType) -> None:
    """300 pairs drawn anew. All 2,000 trials, also at 1,000 pairs: tools/bench/coverage.py."""
    trials = 150
    for name, row in bench.coverage(bench.gaussian, 300, trials).items():
        if "unpaired" not in name:
            assert within(row["held"], trials), (name, row)
    assert not within(0.83, trials) and not within(0.6, trials), "the bounds would see a wrong interval"


def test_pairing_finds_three_points_where_two_intervals_do_not(bench: ModuleType) -> None:
    rng = np.random.default_rng(1)
    trials = [bench.asked(bench.gaussian(rng, 1000)) for _ in range(20)]
    paired, apart = ([t[f"i2t R@1, B - A, {how}"] for t in trials] for how in ("paired", "unpaired"))
    assert np.mean([one.value for one in paired]) == pytest.approx(0.03, abs=0.005)
    assert sum(one.is_clear for one in paired) >= 15
    assert sum(one.is_clear for one in apart) <= 5


@pytest.mark.slow
def test_two_thousand_trials(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, str(BENCH), "--json"], capture_output=True, text=True, check=True)
    print(done.stdout)
    for kind, found in json.loads(done.stdout).items():
        for name, row in found.items() if kind.startswith("gaussian") else ():
            assert "unpaired" in name or 0.93 <= row["held"] <= 0.97, (kind, name, row)
    found = json.loads(done.stdout)["gaussian 1000"]["i2t R@1, B - A, paired"]
    assert found["clear"] > 0.9
