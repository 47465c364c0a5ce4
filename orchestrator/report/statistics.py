"""Means over seeds, paired differences, and what the data can and cannot tell (two-sided, 95 %)."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TypeVar

K = TypeVar("K", bound=Hashable)

LEVEL = 0.95
RESAMPLES = 1000
MOST_SEEDS = 1000


@dataclass(frozen=True, slots=True)
class Summary:
    """Mean over seeds with its standard error and t interval; with one seed only the mean is known."""

    mean: float
    n: int
    stderr: float | None = None
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True, slots=True)
class Comparison:
    """A difference (one setting minus another) paired by seed, and by item where there are items.

    `p` is raw, `adjusted` after Holm's correction over the table. `needed` is about how many seeds would resolve the
    difference if it is what it seems (None: no number up to 1,000, or unknown with one seed).
    """

    difference: float
    seeds: int
    items: int = 0
    low: float | None = None
    high: float | None = None
    p: float | None = None
    adjusted: float | None = None
    needed: int | None = None
    stderr: float | None = None

    @property
    def resolved(self) -> bool:
        """Whether the data tell the difference from zero after correction."""
        return self.adjusted is not None and self.adjusted < 1 - LEVEL

    def verdict(self) -> str:
        """Return the sentence a reader should see."""
        if self.resolved:
            return "resolved"
        if self.seeds < 2:
            return "not resolved: one seed says nothing about the differences between seeds"
        if self.stderr == 0:
            return "not resolved: the seeds do not vary"
        if self.needed is None:
            return "not resolved; no practical number of seeds would do"
        return f"not resolved; about {self.needed} seeds would do"


def summary(values: Sequence[float], most: int = 0) -> Summary:
    """Return mean, standard error and interval of one value per seed; raises ValueError on none.

    Where the data chose the number of values, `most` is the one they might have chosen: the interval is then one of a
    sequence that covers at every number (`sequential`); 0 where the number was fixed.
    """
    n = len(values)
    if n == 0:
        raise ValueError("no value to summarise")
    mean = math.fsum(values) / n
    if n == 1:
        return Summary(mean, 1)
    stderr = _deviation(values) / math.sqrt(n)
    half = halfwidths(n, most) * stderr if stderr else 0.0
    return Summary(mean, n, stderr, mean - half, mean + half)


def halfwidths(n: int, most: int = 0, freedom: float = 0.0) -> float:
    """Return half the 95 % interval of `n` values in standard errors; `most` as in `summary`."""
    if not most:
        return t_quantile(0.5 + LEVEL / 2, freedom or n - 1)
    from orchestrator.report import sequential

    return sequential.multiplier(*_within(n, most))


def _within(n: int, most: int) -> tuple[int, int]:
    """Return both as a sequence has them: of more values than it goes to, as many as those (stores of before 100)."""
    from orchestrator.report.sequential import MOST_SEEDS as HORIZON

    return min(n, HORIZON), min(max(n, most), HORIZON)


def compare(
    ours: Mapping[K, float],
    theirs: Mapping[K, float],
    item_stderr: float | None = None,
    items: int = 0,
    *,
    most: int = 0,
) -> Comparison | None:
    """Return the paired difference over the seeds both have, None if they share none.

    The variance is the one between seeds plus, where items were scored, the one of the items (`item_stderr`, from
    `item_bootstrap`); Satterthwaite's degrees of freedom join them. Where the data chose the number of seeds, `most` is
    the one they might have chosen: interval and p value then hold at every number (`sequential`), those of the items
    counted as if they were seeds too, which is cautious.
    """
    shared = [seed for seed in ours if seed in theirs]
    if not shared:
        return None
    differences = [ours[seed] - theirs[seed] for seed in shared]
    n = len(differences)
    mean = math.fsum(differences) / n
    if n == 1:
        return Comparison(mean, 1, items)
    deviation = _deviation(differences)
    stderr, freedom = _joined(deviation, n, item_stderr, items)
    if stderr == 0:
        # Coarse scores can differ by the same amount in every seed: no noise was seen, so nothing can be tested.
        return Comparison(mean, n, items, mean, mean, 1.0 if mean == 0 else None, stderr=0.0)
    half = halfwidths(n, most, freedom) * stderr
    p = _p_value(mean / stderr, n, most) if most else t_p_value(mean / stderr, freedom)
    return Comparison(mean, n, items, mean - half, mean + half, p, None, None, stderr)


def _p_value(t: float, n: int, most: int) -> float:
    from orchestrator.report import sequential

    return sequential.p_value(t, *_within(n, most), sequential.late)


def correct(comparisons: Mapping[K, Comparison]) -> dict[K, Comparison]:
    """Return the comparisons of one table with Holm's correction, and the seeds each unresolved one would need."""
    tested = {key: c.p for key, c in comparisons.items() if c.p is not None}
    adjusted = dict(zip(tested, holm(list(tested.values())), strict=True))
    result: dict[K, Comparison] = {}
    for key, comparison in comparisons.items():
        corrected = replace(comparison, adjusted=adjusted.get(key))
        if not corrected.resolved and corrected.stderr and corrected.difference:
            deviation = corrected.stderr * math.sqrt(corrected.seeds)
            needed = seeds_needed(corrected.difference, deviation, (1 - LEVEL) / max(len(tested), 1))
            corrected = replace(corrected, needed=needed)
        result[key] = corrected
    return result


def holm(p_values: Sequence[float]) -> list[float]:
    """Return Holm's step-down adjusted p values, in the order given."""
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    adjusted = [0.0] * len(p_values)
    running = 0.0
    for rank, i in enumerate(order):
        running = max(running, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = running
    return adjusted


def seeds_needed(difference: float, deviation: float, alpha: float) -> int | None:
    """Return the least number of seeds at which a difference of this size would be resolved at level `alpha`."""

    def enough(n: int) -> bool:
        return abs(difference) > t_quantile(1 - alpha / 2, n - 1) * deviation / math.sqrt(n)

    return _least(enough)


def _least(enough: Callable[[int], bool]) -> int | None:
    """Return the least number of seeds from 2 on that is enough, None when 1,000 are not."""
    if not enough(MOST_SEEDS):
        return None
    few, many = 1, MOST_SEEDS
    while many - few > 1:
        middle = (few + many) // 2
        few, many = (few, middle) if enough(middle) else (middle, many)
    return many


def interval_seeds(values: Sequence[float], halfwidth: float, most: int) -> int | None:
    """Return the least number of seeds whose 95 % interval (`summary` with `most`) is `halfwidth` to either side.

    The deviation is that of `values`, so the number is their own where their interval is narrow enough; None where
    `most` are not enough.
    """
    if len(values) < 2:
        return None
    deviation = _deviation(values)
    for n in range(len(values), most + 1):
        if deviation == 0 or halfwidths(n, most) * deviation / math.sqrt(n) <= halfwidth:
            return n
    return None


def item_bootstrap(differences: Mapping[str, Sequence[float]], seed: int = 0) -> float | None:
    """Return the standard error of the mean over tasks of the mean item difference, by resampling items within tasks.

    `differences`: task -> item differences (already averaged over seeds), paired item by item.
    """
    import numpy as np

    generator = np.random.default_rng(seed)
    means = []
    for values in differences.values():
        column = np.asarray(values, dtype=np.float64)
        if len(column) < 2:
            return None
        drawn = generator.integers(0, len(column), (RESAMPLES, len(column)))
        means.append(column[drawn].mean(axis=1))
    if not means:
        return None
    return float(np.mean(means, axis=0).std(ddof=1))


def uninformative(mean: float, stderr: float | None, chance: float | None, n: int = 0) -> bool:
    """Return whether chance lies inside the 95 % interval of an accuracy, which then says nothing.

    With `n` items of one task it is Wilson's interval, which stays honest near 0 and 1; without, mean +- 1.96 s.e.
    """
    if stderr is None or chance is None:
        return False
    return abs(mean - chance) <= 1.96 * (math.sqrt(chance * (1 - chance) / n) if n else stderr)


def pearson(a: Sequence[float], b: Sequence[float]) -> float | None:
    """Return the correlation of two columns; None where one does not vary or there are fewer than three rows."""
    if len(a) < 3:
        return None
    mean_a, mean_b = math.fsum(a) / len(a), math.fsum(b) / len(b)
    product = math.fsum((x - mean_a) * (y - mean_b) for x, y in zip(a, b, strict=True))
    size = math.sqrt(math.fsum((x - mean_a) ** 2 for x in a) * math.fsum((y - mean_b) ** 2 for y in b))
    return None if size == 0 else max(-1.0, min(1.0, product / size))


def spikes(values: Sequence[float], window: int = 50, threshold: float = 6.0) -> tuple[int, float]:
    """Return how many values of a series are spikes, and the largest one's height over the running median.

    A spike exceeds the median of the up to `window` values before it (at least 10) by more than `threshold` robust
    standard deviations (1.4826 x median absolute deviation).
    """
    count, largest = 0, 0.0
    for i in range(10, len(values)):
        before = sorted(values[max(0, i - window) : i])
        median = before[len(before) // 2]
        spread = 1.4826 * sorted(abs(x - median) for x in before)[len(before) // 2]
        height = values[i] - median
        if not height <= max(threshold * spread, 1e-12):
            count, largest = count + 1, max(largest, height)
    return count, largest


@lru_cache(maxsize=4096)
def t_quantile(p: float, freedom: float) -> float:
    """Return the quantile of Student's t at probability 0.5 <= p < 1."""
    if p == 0.5:
        return 0.0
    low, high = 0.0, 1.0
    while 1 - t_p_value(high, freedom) / 2 < p:
        high *= 2
    while high - low > 1e-12 * high:
        middle = (low + high) / 2
        low, high = (middle, high) if 1 - t_p_value(middle, freedom) / 2 < p else (low, middle)
    return (low + high) / 2


def t_p_value(t: float, freedom: float) -> float:
    """Return the two-sided p value of Student's t."""
    return _incomplete_beta(freedom / 2, 0.5, freedom / (freedom + t * t))


def _deviation(values: Sequence[float]) -> float:
    mean = math.fsum(values) / len(values)
    return math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (len(values) - 1))


def _joined(deviation: float, seeds: int, item_stderr: float | None, items: int) -> tuple[float, float]:
    between = deviation**2 / seeds
    within = (item_stderr or 0.0) ** 2
    total = between + within
    if total == 0:
        return 0.0, seeds - 1.0
    freedom = total**2 / (between**2 / (seeds - 1) + (within**2 / (items - 1) if items > 1 else 0.0))
    return math.sqrt(total), freedom


def _incomplete_beta(a: float, b: float, x: float) -> float:
    """Return the regularised incomplete beta function by its continued fraction (Lentz)."""
    if x <= 0 or x >= 1:
        return 0.0 if x <= 0 else 1.0
    if x > (a + 1) / (a + b + 2):
        return 1.0 - _incomplete_beta(b, a, 1 - x)
    front = math.exp(math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x))
    tiny = 1e-300
    c, d = 1.0, 1.0 / max(abs(1 - (a + b) * x / (a + 1)), tiny)
    fraction = d
    for m in range(1, 300):
        for numerator in (
            m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m)),
            -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1)),
        ):
            d = 1.0 / (1 + numerator * d or tiny)
            c = 1 + numerator / c or tiny
            fraction *= c * d
        if abs(c * d - 1) < 1e-15:
            break
    return front * fraction / a
