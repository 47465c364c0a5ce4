"""Statistics against closed forms, simulation and, where it is installed, SciPy."""

from __future__ import annotations

import math
import random

import pytest

from orchestrator.report import statistics as s


@pytest.mark.parametrize(
    ("freedom", "quantile"), [(1, 12.7062), (2, 4.30265), (5, 2.57058), (30, 2.04227), (1e6, 1.95997)]
)
def test_t_quantiles_are_those_of_the_tables(freedom: float, quantile: float) -> None:
    assert s.t_quantile(0.975, freedom) == pytest.approx(quantile, rel=1e-5)


def test_t_distribution_agrees_with_scipy() -> None:
    stats = pytest.importorskip("scipy.stats")
    for freedom in (1, 1.5, 2, 3.7, 11, 200):
        for t in (0.01, 0.5, 1.0, 2.5, 12.0, 140.0):
            assert s.t_p_value(t, freedom) == pytest.approx(2 * stats.t.sf(t, freedom), rel=1e-9)


def test_summary_is_the_t_interval_of_the_seeds() -> None:
    found = s.summary([1.0, 2.0, 3.0])
    assert (found.mean, found.n) == (2.0, 3)
    assert found.stderr == pytest.approx(1 / math.sqrt(3))
    assert found.high == pytest.approx(2 + 4.30265 / math.sqrt(3), rel=1e-5)
    assert s.summary([5.0]) == s.Summary(5.0, 1)


def test_pairing_by_seed_resolves_what_the_noise_of_the_seeds_hides() -> None:
    chance = random.Random(0)
    noise = {seed: chance.gauss(0, 1.0) for seed in range(5)}
    ours = {seed: 2.0 + noise[seed] + 0.05 + chance.gauss(0, 0.005) for seed in noise}
    theirs = {seed: 2.0 + noise[seed] for seed in noise}
    found = s.compare(ours, theirs)
    assert found is not None
    assert found.p is not None
    assert found.p < 0.001
    assert s.compare({0: 1.0}, {1: 2.0}) is None


def compared(ours: dict[int, float], theirs: dict[int, float]) -> s.Comparison:
    found = s.compare(ours, theirs)
    assert found is not None
    return found


def test_one_seed_is_never_resolved() -> None:
    found = s.correct({"x": compared({0: 1.0}, {0: 5.0})})["x"]
    assert not found.resolved
    assert "one seed" in found.verdict()


def test_equal_differences_in_every_seed_are_no_proof() -> None:
    found = s.correct({"x": compared({0: 0.5, 1: 0.5}, {0: 0.25, 1: 0.25})})["x"]
    assert not found.resolved
    assert "do not vary" in found.verdict()


def test_items_widen_the_interval() -> None:
    ours, theirs = {0: 1.0, 1: 1.1, 2: 1.2}, {0: 0.9, 1: 1.01, 2: 1.1}
    by_seed, by_both = s.compare(ours, theirs), s.compare(ours, theirs, item_stderr=0.05, items=100)
    assert by_seed.stderr < by_both.stderr
    assert by_both.p > by_seed.p


def test_holm_steps_down() -> None:
    assert s.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert s.holm([0.5, 0.9]) == [1.0, 1.0]


def test_holm_keeps_the_family_error_below_five_per_cent() -> None:
    chance = random.Random(1)
    wrong = 0
    for _ in range(200):
        family = {}
        for setting in range(6):
            base = {seed: chance.gauss(0, 1) for seed in range(3)}
            family[setting] = compared({seed: v + chance.gauss(0, 1) for seed, v in base.items()}, base)
        wrong += any(c.resolved for c in s.correct(family).values())
    assert wrong / 200 < 0.08


def test_seeds_needed_would_do() -> None:
    needed = s.seeds_needed(0.1, 0.2, 0.05)
    assert needed is not None
    assert s.t_quantile(0.975, needed - 1) * 0.2 / math.sqrt(needed) < 0.1
    assert s.t_quantile(0.975, needed - 2) * 0.2 / math.sqrt(needed - 1) >= 0.1
    assert s.seeds_needed(1e-6, 1.0, 0.05) is None


def test_item_bootstrap_has_the_standard_error_of_a_mean() -> None:
    chance = random.Random(2)
    values = [chance.gauss(0, 1) for _ in range(500)]
    assert s.item_bootstrap({"a": values}) == pytest.approx(s.summary(values).stderr, rel=0.1)
    assert s.item_bootstrap({"a": values, "b": values}) < s.item_bootstrap({"a": values})


def test_chance_inside_the_interval_is_uninformative() -> None:
    assert s.uninformative(0.27, 0.02, 0.25)
    assert not s.uninformative(0.40, 0.02, 0.25)
    assert not s.uninformative(0.27, None, 0.25)
    assert s.uninformative(0.10, 0.067, 0.25, n=20)  # 2 of 20 right: the normal interval would end at 0.23
    assert not s.uninformative(0.08, 0.027, 0.25, n=100)


def test_pearson_and_spikes() -> None:
    assert s.pearson([1, 2, 3], [2, 4, 6]) == pytest.approx(1.0)
    assert s.pearson([1, 1, 1], [2, 4, 6]) is None
    series = [3.0 + 0.01 * math.sin(i) for i in range(200)]
    assert s.spikes(series) == (0, 0.0)
    series[120] += 2.0
    count, height = s.spikes(series)
    assert count == 1
    assert height == pytest.approx(2.0, abs=0.05)
