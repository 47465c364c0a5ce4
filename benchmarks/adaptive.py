"""What a number of seeds that the data choose does to intervals and verdicts: simulations with fixed random seeds.

    make bench            # or: .venv/bin/python benchmarks/adaptive.py [--runs 300]

Coverage: normal values, seeds added until the interval is narrow enough; the interval of every number of seeds is
looked at. The peers are the usual t interval, and the Student-t confidence sequence without a horizon (a normal mixture
over the effect, Wang and Ramdas, arXiv:2310.03722). Racing: twelve settings with effects of 0, 0.25, 0.5 and 1 standard
deviation of a seed, at most 20 seeds; the peer is 20 seeds for each, paired t tests and Holm's correction.
"""

from __future__ import annotations

import argparse
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

from orchestrator.grid.adaptive import Adaptive
from orchestrator.report import racing, sequential
from orchestrator.report.adaptive import seeds_asked_for
from orchestrator.report.statistics import compare, holm, summary, t_quantile

FIRST, MOST = 3, 20
EFFECTS = (0.0, 0.25, 0.5, 1.0)
SETTINGS = 12
NAMES = tuple(f"s{i}" for i in range(SETTINGS))
TRUE = {name: EFFECTS[i * len(EFFECTS) // SETTINGS] for i, name in enumerate(NAMES)}
FAMILIES = {
    "pairs": tuple((a, b) for i, a in enumerate(NAMES) for b in NAMES[i + 1 :]),
    "baseline": tuple((name, NAMES[0]) for name in NAMES[1:]),
}
MIXTURE = 1.0  # variance of the mixed effect, in squared deviations of a seed


@dataclass(frozen=True, slots=True)
class Raced:
    """One simulated race against 20 seeds for each setting; all but `hours` are shares or numbers of pairs."""

    hours: float
    agreeing: float
    resolved: float
    resolved_fixed: float
    false: float
    false_fixed: float


def usual(n: int, most: int) -> float:
    """Return half the usual t interval in standard errors."""
    return t_quantile(0.975, n - 1)


def mixed(n: int, most: int) -> float:
    """Return half the Student-t confidence sequence without a horizon, in standard errors."""
    growth = 1 + n * MIXTURE
    wanted = (20 * math.sqrt(growth)) ** (2 / n)
    rest = wanted / growth
    return math.sqrt((n - 1) * (wanted - 1) / (1 - rest)) if rest < 1 else math.inf


def coverage(multiplier: Callable[[int, int], float], runs: int) -> tuple[float, float, float]:
    """Return the shares of runs in which every interval, and the first narrow one, covers; and the seeds until it."""
    chance = random.Random(1)
    every, ended, seeds, halfwidth = 0, 0, 0, 0.7
    for _ in range(runs):
        values = [chance.gauss(0, 1) for _ in range(MOST)]
        right, last, enough = True, False, 0
        for n in range(FIRST, MOST + 1):
            found = summary(values[:n])
            half = multiplier(n, MOST) * (found.stderr or 0.0)
            right &= abs(found.mean) <= half
            if not enough and (half <= halfwidth or n == MOST):
                enough, last = n, abs(found.mean) <= half
        every += right
        ended += last
        seeds += enough
    return every / runs, ended / runs, seeds / runs


def stopped(runs: int) -> tuple[float, float]:
    """Return the coverage of the interval that an adaptive grid ends with, and the seeds it took."""
    chance, asked = random.Random(3), Adaptive("answer_bpb", 0.7, max_seeds=MOST)
    covered, seeds = 0, 0
    for _ in range(runs):
        values = [chance.gauss(0, 1) for _ in range(MOST)]
        n = seeds_asked_for(values, FIRST, asked, MOST)
        found = summary(values[:n], MOST)
        assert found.low is not None
        assert found.high is not None
        covered += found.low <= 0 <= found.high
        seeds += n
    return covered / runs, seeds / runs


def raced(chance: random.Random, family: str, shared: float) -> Raced:
    """Return one race; `shared` is the part of a seed's variance that all settings have in common."""
    common = [chance.gauss(0, math.sqrt(shared)) for _ in range(MOST)]
    values: dict[str, dict[int, float]] = {
        name: {s: TRUE[name] + common[s] + chance.gauss(0, math.sqrt(1 - shared)) for s in range(MOST)}
        for name in NAMES
    }
    pairs = FAMILIES[family]
    lanes = racing.race(values, dict.fromkeys(NAMES, FIRST), MOST, pairs, racing.TOLERANCES[family])
    ours = verdicts(values, {name: lane.seeds for name, lane in lanes.items()}, pairs, MOST)
    fixed = verdicts(values, dict.fromkeys(NAMES, MOST), pairs, 0)
    truth = [_sign(TRUE[a] - TRUE[b]) for a, b in pairs]
    count = len(pairs)
    return Raced(
        sum(lane.seeds for lane in lanes.values()) / (SETTINGS * MOST),
        sum(a == b for a, b in zip(ours, fixed, strict=True)) / count,
        sum(map(abs, ours)) / count,
        sum(map(abs, fixed)) / count,
        float(sum(v != 0 and v != t for v, t in zip(ours, truth, strict=True))),
        float(sum(v != 0 and v != t for v, t in zip(fixed, truth, strict=True))),
    )


def verdicts(
    values: dict[str, dict[int, float]], seeds: dict[str, int], pairs: Sequence[tuple[str, str]], most: int
) -> list[int]:
    """Return for each pair 1 or -1 where its difference is resolved, 0 where it is not."""
    found = []
    for a, b in pairs:
        shared = range(min(seeds[a], seeds[b]))
        one = compare({s: values[a][s] for s in shared}, {s: values[b][s] for s in shared}, most=most)
        assert one is not None
        found.append(one)
    adjusted = holm([1.0 if one.p is None else one.p for one in found])
    return [_sign(one.difference) if p < racing.ALPHA else 0 for one, p in zip(found, adjusted, strict=True)]


def races(runs: int, family: str, shared: float) -> Raced:
    """Return the means over some races."""
    chance = random.Random(1)
    found = [raced(chance, family, shared) for _ in range(runs)]
    return Raced(*(sum(getattr(one, f.name) for one in found) / runs for f in fields(Raced)))


def _sign(value: float) -> int:
    return (value > 0) - (value < 0)


def main() -> None:
    """Print the coverage of intervals and the verdicts of races."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=300, help="races of each kind; coverage takes ten times as many")
    runs = parser.parse_args().runs
    print(f"intervals of {FIRST} to {MOST} seeds; seeds are added until one is ±0.7 deviations:")
    for name, multiplier in (
        ("usual t interval", usual),
        ("Student-t sequence, no horizon", mixed),
        (f"ours, horizon {MOST}", sequential.multiplier),
    ):
        every, ended, seeds = coverage(multiplier, 10 * runs)
        print(f"  {name:32s} all cover {every:.1%}, the last one {ended:.1%}, {seeds:.1f} seeds")
    ended, seeds = stopped(10 * runs)
    print(f"  {'ours, in the rounds of a grid':32s} {'':16s} the last one {ended:.1%}, {seeds:.1f} seeds")
    print(f"races of {SETTINGS} settings, at most {MOST} seeds, against {MOST} seeds for each ({runs} races):")
    for family in FAMILIES:
        for shared in (0.0, 0.5):
            one = races(runs, family, shared)
            print(
                f"  {family:8s} {shared:.0%} of a seed's variance shared: {one.hours:.1%} of the hours, "
                f"{one.agreeing:.1%} equal verdicts, {one.resolved:.1%} resolved (fixed {one.resolved_fixed:.1%}), "
                f"{one.false:.3f} false a race (fixed {one.false_fixed:.3f})"
            )


if __name__ == "__main__":
    main()
