"""Intervals and tests of a number of seeds that the data choose: their law by simulation, and against closed forms."""

from __future__ import annotations

import numpy as np
import pytest

from orchestrator.report import sequential
from orchestrator.report.statistics import compare, summary, t_p_value


def t_statistics(values: np.ndarray) -> np.ndarray:
    """Return [runs, n]: the t statistic of the first n values, for n from 2 on."""
    n = np.arange(1, values.shape[1] + 1)
    mean = values.cumsum(1) / n
    variance = ((values**2).cumsum(1) - n * mean**2)[:, 1:] / (n[1:] - 1)
    return np.asarray(mean[:, 1:] / np.sqrt(variance / n[1:]))


@pytest.mark.parametrize("spending", [sequential.even, sequential.late])
@pytest.mark.parametrize("most", [5, 20])
def test_all_intervals_together_miss_in_five_of_a_hundred_cases(most: int, spending: sequential.Spending) -> None:
    found = np.abs(t_statistics(np.random.default_rng(0).normal(size=(40_000, most))))
    bounds = [sequential.multiplier(n, most, spending) for n in range(2, most + 1)]
    assert np.mean((found > bounds).any(1)) == pytest.approx(0.05, abs=0.003)
    strict = [sequential.multiplier(n, most, spending, 0.99) for n in range(2, most + 1)]
    assert np.mean((found > strict).any(1)) == pytest.approx(0.01, abs=0.002)


def test_the_variance_and_the_scale_do_not_matter_and_a_mean_is_found() -> None:
    values = 1e6 * (np.random.default_rng(1).normal(size=(2_000, 10)) + 2.0)
    found = np.abs(t_statistics(values))
    bounds = [sequential.multiplier(n, 10, sequential.late) for n in range(2, 11)]
    assert np.mean((found > bounds).any(1)) > 0.99


def test_with_two_values_at_most_it_is_the_usual_test() -> None:
    t = sequential.multiplier(2, 2)
    assert t_p_value(t, 1) == pytest.approx(0.05, rel=2e-3)
    assert sequential.p_value(3.0, 2, 2) == pytest.approx(t_p_value(3.0, 1), rel=2e-3)


def test_the_first_look_spends_what_it_may_and_the_last_one_is_nearly_the_usual_test() -> None:
    assert t_p_value(sequential.multiplier(2, 20), 1) == pytest.approx(0.05 * 2 / 20, rel=0.02)
    last = t_p_value(sequential.multiplier(20, 20, sequential.late), 19)
    assert 0.04 < last < 0.05
    assert sequential.multiplier(2, 100, sequential.late) > 1e5, "nothing to speak of is spent yet"


def test_p_values_belong_to_the_bounds_and_fall_with_t() -> None:
    for n in (3, 8, 20):
        bound = sequential.multiplier(n, 20, sequential.late)
        assert sequential.p_value(bound, n, 20, sequential.late) == pytest.approx(0.05, rel=1e-6)
        found = [sequential.p_value(t, n, 20, sequential.late) for t in (0.0, 1.0, bound, 2 * bound, 1e9)]
        assert found == sorted(found, reverse=True)
        assert found[0] == 1.0
    with pytest.raises(ValueError, match="at most 100"):
        sequential.p_value(1.0, 3, 101)


def test_summaries_and_comparisons_are_those_of_the_sequence() -> None:
    values = [1.0, 2.0, 4.0, 3.0]
    found, usual = summary(values, 12), summary(values)
    assert found.stderr == usual.stderr
    assert found.high == pytest.approx(2.5 + sequential.multiplier(4, 12) * (usual.stderr or 0.0))
    one = compare(dict(enumerate(values)), dict.fromkeys(range(4), 0.0), most=12)
    assert one is not None
    t = 2.5 / (usual.stderr or 0.0)
    assert one.p == pytest.approx(sequential.p_value(t, 4, 12, sequential.late))
    assert (one.low, one.high) == (found.low, found.high)
