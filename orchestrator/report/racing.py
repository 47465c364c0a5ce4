"""Racing: seeds go to the settings whose differences they can still decide, the others get no more.

Round by round every setting that still runs gets further seeds. A pair of settings is decided when its difference is
resolved (`sequential`, at any number of seeds, Holm over the pairs), or when it will hardly be resolved with all seeds
either: its predictive probability (Choi, Smith and Becker, Controlled Clinical Trials 6, 1985) is that of Student's t
with the present mean and deviation, under a flat prior. A setting stops when the sum of these probabilities that is
given up stays within a tolerance. A setting one of whose seeds failed for good leaves the race with its pairs: going on
without that seed would flatter it, and waiting for it would hold up the others. The rule only chooses who runs; whether
a resolved difference is one does not hang on it.
"""

from __future__ import annotations

import math
import random
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from orchestrator.report import sequential
from orchestrator.report.statistics import holm, t_p_value

ALPHA = 1 - sequential.LEVEL
# The share of the pairs' verdicts that may be given up, as they are predicted (benchmarks/adaptive.py shows what comes
# of it). Few pairs, each with the baseline, leave less to give up than all pairs of settings.
TOLERANCES = {"baseline": 0.1, "pairs": 0.25}
FEWEST = 3  # a deviation from two seeds says nothing
# What settings may differ by before anything is measured, in deviations of a seed; and how many futures are drawn.
PRIOR, FUTURES = 0.5, 24

Values = Mapping[int, float | None]  # seed -> value, None: not measured; in the order in which seeds are given
Pair = tuple[str, str]
Failed = Mapping[str, Collection[int]]  # setting -> its seeds that failed for good
NONE_FAILED: Failed = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class Lane:
    """How many seeds one setting has in the race, and whether it waits for results, has stopped, or has left it."""

    seeds: int
    state: str  # "waiting", "decided", "limit" or "failed"


def race(
    settings: Mapping[str, Values],
    first: Mapping[str, int],
    most: int,
    pairs: Sequence[Pair],
    tolerance: float,
    failed: Failed = NONE_FAILED,
) -> dict[str, Lane]:
    """Return how many seeds each setting has, by the results alone; a run that was killed comes to the same.

    `first` are the seeds that each begins with, `most` those that it may have. A setting of no pair keeps its first.
    """
    limits = {name: min(most, len(values)) for name, values in settings.items()}
    paired = {name for pair in pairs for name in pair}
    now = {name: min(max(first[name], FEWEST * (name in paired)), limits[name]) for name in settings}
    running = {name for name in settings if name in paired}
    while True:
        late = {name for name, count in now.items() if None in list(settings[name].values())[:count]}
        gone = {name for name in late if _failed_in(settings[name], now[name], failed.get(name, ()))}
        running -= gone
        if late & running or not running:
            break
        left = [pair for pair in pairs if gone.isdisjoint(pair)]
        running = _going_on(settings, now, running, left, most, tolerance)
        running = {name for name in running if now[name] < limits[name]}
        if not running:
            break
        for name in running:
            now[name] = min(limits[name], now[name] + max(1, now[name] // 4))
    lanes = {}
    for name, count in now.items():
        state = "waiting" if name in late or name in running else "limit" if count == limits[name] else "decided"
        lanes[name] = Lane(count, "failed" if name in gone else state)
    return lanes


def expected(
    settings: Mapping[str, Values],
    first: Mapping[str, int],
    most: int,
    pairs: Sequence[Pair],
    tolerance: float,
    failed: Failed = NONE_FAILED,
) -> float:
    """Return the cells that the race may be expected to take, by drawing what is not measured yet."""
    chance = random.Random(0)
    measured = {name: [v for v in values.values() if v is not None] for name, values in settings.items()}
    several = [values for values in measured.values() if len(values) > 1]
    squares = sum((v - sum(values) / len(values)) ** 2 for values in several for v in values)
    deviation = math.sqrt(squares / sum(len(values) - 1 for values in several)) if several else 1.0
    middle = sum(sum(v) for v in measured.values()) / max(1, sum(map(len, measured.values())))
    total = 0
    for _ in range(FUTURES):
        drawn: dict[str, Values] = {}
        for name, values in settings.items():
            own = measured[name]
            mean = sum(own) / len(own) if own else middle
            mean += chance.gauss(0, deviation * (1 / math.sqrt(len(own)) if own else PRIOR))
            lost = failed.get(name, ())
            drawn[name] = {
                seed: chance.gauss(mean, deviation) if value is None and seed not in lost else value
                for seed, value in values.items()
            }
        total += sum(lane.seeds for lane in race(drawn, first, most, pairs, tolerance, failed).values())
    return total / FUTURES


def _failed_in(values: Values, count: int, failed: Collection[int]) -> bool:
    """Return whether one of the first seeds is not measured because it failed for good."""
    return any(value is None and seed in failed for seed, value in list(values.items())[:count])


def _going_on(
    settings: Mapping[str, Values],
    now: Mapping[str, int],
    running: set[str],
    pairs: Sequence[Pair],
    most: int,
    tolerance: float,
) -> set[str]:
    """Return the settings that get more seeds."""
    looks = [_look(settings[a], settings[b], now[a], now[b], most) for a, b in pairs]
    adjusted = holm([look.p for look in looks])
    resolved = sum(p < ALPHA for p in adjusted)
    alpha = ALPHA / max(1, len(pairs) - resolved)
    threshold = sequential.multiplier(most, most, sequential.late, 1 - alpha)
    given_up = 0.0
    open_pairs: dict[Pair, float] = {}
    for pair, look, p in zip(pairs, looks, adjusted, strict=True):
        if p < ALPHA:
            continue
        chance = look.chance(threshold, most)
        if running.issuperset(pair):
            open_pairs[pair] = chance
        else:
            given_up += chance
    left = set(running)
    while left:
        costs = {name: sum(c for pair, c in open_pairs.items() if name in pair) for name in sorted(left)}
        cheapest = min(costs, key=lambda name: costs[name])
        if given_up + costs[cheapest] > tolerance * len(pairs):
            break
        given_up += costs[cheapest]
        left.remove(cheapest)
        open_pairs = {pair: chance for pair, chance in open_pairs.items() if cheapest not in pair}
    return left if len(left) > 1 else set()


@dataclass(frozen=True, slots=True)
class _Look:
    """The difference of two settings over the seeds both have: its mean, deviation, number and p value."""

    mean: float
    deviation: float
    n: int
    p: float

    def chance(self, threshold: float, most: int) -> float:
        """Return how likely the difference is resolved with `most` seeds: that their t is above `threshold`."""
        left = most - self.n
        if self.n < 2 or left <= 0 or not self.deviation:
            return 0.0
        scale = self.deviation * math.sqrt(left / (most * self.n))
        t = (threshold * self.deviation / math.sqrt(most) - abs(self.mean)) / scale
        tail = t_p_value(t, self.n - 1) / 2
        return tail if t > 0 else 1 - tail


def _look(ours: Values, theirs: Values, our_seeds: int, their_seeds: int, most: int) -> _Look:
    others = dict(list(theirs.items())[:their_seeds])
    differences = [
        value - other
        for seed, value in list(ours.items())[:our_seeds]
        if value is not None and (other := others.get(seed)) is not None
    ]
    n = len(differences)
    if n < 2:
        return _Look(0.0, 0.0, n, 1.0)
    mean = math.fsum(differences) / n
    deviation = math.sqrt(math.fsum((d - mean) ** 2 for d in differences) / (n - 1))
    if not deviation:  # no noise was seen: nothing can be tested
        return _Look(mean, 0.0, n, 1.0)
    t = mean / deviation * math.sqrt(n)
    return _Look(mean, deviation, n, sequential.p_value(t, n, most, sequential.late))
