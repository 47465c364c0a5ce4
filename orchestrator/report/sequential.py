"""Intervals and tests that hold at every number of seeds up to a known most, however the data choose the number.

The alpha of a two-sided test is spent over the numbers of seeds (Lan and DeMets, Biometrika 70, 1983); its inversion is
a repeated confidence interval (Jennison and Turnbull, JRSS B 51, 1989), a confidence sequence up to the horizon: with
probability 95 % all of its intervals cover at once. Where no mean is there, the t statistics of growing prefixes of
normal values form a Markov chain that is free of their variance: the boundaries are those of its exact law, computed
on a grid. A test at the horizon is nearly the usual t test, which a sequence without a horizon (Lai, Annals of
Statistics 4, 1976; Wang and Ramdas, arXiv:2310.03722) is not: `benchmarks/adaptive.py` has both.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Spending = Callable[[float], float]

LEVEL = 0.95
MOST_SEEDS = 100
# Cells of the grid over the signed share of the mean in the values' size, finer towards its ends, where t is large.
CELLS, REACH = 401, 5.5
ANGLES = 4001
# The levels between which p values are interpolated. No p value is told smaller than the least.
LEVELS = np.geomspace(0.5, 1e-7, 60)


def even(share: float) -> float:
    """Return the spent share of alpha where intervals shall be narrow at every number of seeds."""
    return share


def late(share: float) -> float:
    """Return the spent share of alpha where most of it is kept for the horizon: its test then loses little power."""
    return 0.2 * share**2 + 0.8 * share**20


def multiplier(n: int, most: int, spending: Spending = even, level: float = LEVEL) -> float:
    """Return the t beyond which `n` of at most `most` values are significant: half an interval in standard errors.

    Infinite where nothing is spent yet. Raises ValueError for fewer than two values or more than `most`.
    """
    _check(n, most)
    edges = _boundaries(most, spending)[n]
    at = float(np.interp(-math.log(1 - level), -np.log(LEVELS), _stretched(edges)))
    share = math.tanh(at)
    return math.inf if share >= 1 - 1e-12 else math.sqrt(n - 1) * share / math.sqrt(1 - share * share)


def p_value(t: float, n: int, most: int, spending: Spending = even) -> float:
    """Return the p value of a t statistic of `n` of at most `most` values; it may be looked at at any `n`.

    The probability that the p value of any of them is at most p is at most p, where the mean is zero.
    """
    _check(n, most)
    size = abs(t) / math.hypot(t, math.sqrt(n - 1)) if math.isfinite(t) else 1.0
    edges = np.maximum.accumulate(_stretched(_boundaries(most, spending)[n]))
    return float(np.exp(np.interp(math.atanh(min(size, 1 - 1e-15)), edges, np.log(LEVELS), left=0.0)))


def _check(n: int, most: int) -> None:
    if not 2 <= n <= most <= MOST_SEEDS:
        raise ValueError(f"{n} of {most} values: at least 2, at most {MOST_SEEDS}")


def _stretched(shares: Array) -> Array:
    return np.arctanh(np.minimum(shares, 1 - 1e-15))


@lru_cache(maxsize=32)
def _boundaries(most: int, spending: Spending) -> Array:
    """Return [most + 1, levels]: the size of the mean's share at which n values are significant, 1 for never.

    The share is the sum of n values over the root of n times the sum of their squares: between -1 and 1, and
    t = sqrt(n - 1) share / sqrt(1 - share^2).
    """
    edges, half = _edges(), CELLS // 2
    # Two values: the angle of their mean's share is uniform.
    mass = np.tile(np.diff(np.arcsin(edges)) / math.pi, (len(LEVELS), 1))
    found = np.ones((most + 1, len(LEVELS)))
    for n in range(2, most + 1):
        if n > 2:
            mass = mass @ _step(n - 1)
        spent = LEVELS * (spending(n / most) - (spending((n - 1) / most) if n > 2 else 0.0))
        tails = (mass + mass[:, ::-1])[:, :half]  # of both signs, from the outermost cell inwards
        for level, (wanted, tail) in enumerate(zip(spent, tails, strict=True)):
            reached = np.cumsum(tail)
            k = int(np.searchsorted(reached, wanted))
            if k == half:  # all that is left
                found[n, level], mass[level] = 0.0, 0.0
                continue
            share = (wanted - (reached[k - 1] if k else 0.0)) / tail[k] if tail[k] > 0 else 0.0
            outer, inner = edges[CELLS - k], edges[CELLS - k - 1]
            found[n, level] = outer + (inner - outer) * share
            if k == 0:  # beyond the grid the chance falls with the angle's power n - 1
                found[n, level] = math.cos(math.acos(inner) * share ** (1 / (n - 1)))
            mass[level, :k] = mass[level, CELLS - k :] = 0.0
            mass[level, k] *= 1 - share
            mass[level, CELLS - k - 1] *= 1 - share
    return found


def _edges() -> Array:
    edges = np.tanh(np.linspace(-REACH, REACH, CELLS + 1))
    edges[0], edges[-1] = -1.0, 1.0
    return edges


@lru_cache(maxsize=MOST_SEEDS)
def _step(n: int) -> Array:
    """Return the chance that n values whose mean's share lies in a cell have one in another cell with a value more.

    The next value over the size of those before is the tangent of an angle with density cos^(n-1); the new share is
    (sqrt(n) share cos + sin) / sqrt(n + 1) of it.
    """
    places = np.linspace(-REACH, REACH, CELLS + 1)
    share = math.sqrt(n) * np.tanh((places[1:] + places[:-1]) / 2)[:, None]
    angles, below = _angles(n)
    size, top = np.sqrt(share * share + 1), np.arctan2(1.0, share)
    width = np.arccos(np.clip(_edges()[None] * math.sqrt(n + 1) / size, -1, 1))

    def under(angle: Array) -> Array:
        return np.interp(np.clip(angle, -math.pi / 2, math.pi / 2), angles, below)

    # The angles of a larger share surround `top`, and may go once around the circle.
    above = under(top + width) - under(top - width) + under(top + width - 2 * math.pi)
    return np.asarray(above[:, :-1] - above[:, 1:])


def _angles(n: int) -> tuple[Array, Array]:
    """Return angles and the distribution function there of the density cos^(n-1), by integration by parts."""
    angles = np.linspace(-math.pi / 2, math.pi / 2, ANGLES)
    cosine, sine, power = np.cos(angles), np.sin(angles), n - 1
    integral = angles.copy() if power % 2 == 0 else sine.copy()
    for j in range(2 + power % 2, power + 1, 2):
        integral = cosine ** (j - 1) * sine / j + (j - 1) / j * integral
    integral -= integral[0]
    return angles, np.asarray(integral / integral[-1])
