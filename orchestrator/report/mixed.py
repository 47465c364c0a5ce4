"""A linear mixed model with one random intercept a group, by restricted maximum likelihood (REML).

y = X beta + u[group] + e, u ~ N(0, ratio sigma^2), e ~ N(0, sigma^2) (Patterson and Thompson, Biometrika 58, 1971).
Given the ratio all else has a closed form, so that the likelihood is one of a single number. Intervals are t intervals
with the degrees of freedom of the residuals within groups; in a balanced design they are those of the analysis of
variance.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
RATIOS = np.concatenate([[0.0], np.geomspace(1e-4, 1e6, 61)])


@dataclass(frozen=True, slots=True)
class Fit:
    """Coefficients with their covariance; the deviations of groups and of the rest are in units of y."""

    coefficients: Array
    covariance: Array
    freedom: int
    deviation: float
    deviation_of_groups: float

    def stderr(self, weights: Sequence[float]) -> float:
        """Return the standard error of a weighted sum of the coefficients."""
        w = np.asarray(weights, dtype=np.float64)
        return math.sqrt(max(0.0, float(w @ self.covariance @ w)))


def fit(y: Array, x: Array, groups: Sequence[object]) -> Fit | None:
    """Return the fit of y [n] on the columns of x [n, p] with a random intercept a group; None without freedom left.

    The columns of x must be independent (`independent`).
    """
    members = [np.flatnonzero([g == group for g in groups]) for group in dict.fromkeys(groups)]
    count, columns = x.shape
    freedom = count - columns - (len(members) - 1)
    if freedom < 1:
        return None

    def solved(ratio: float) -> tuple[float, Array, Array, float]:
        """Return the restricted log-likelihood, beta, the inverse of X'V^-1 X, and sigma^2."""
        xx, xy, yy = x.T @ x, x.T @ y, float(y @ y)
        size = 0.0
        for rows in members:  # V^-1 of a group is I - ratio / (1 + ratio n) 1 1'
            share = ratio / (1 + ratio * len(rows))
            of_x, of_y = x[rows].sum(0), float(y[rows].sum())
            xx, xy, yy = xx - share * np.outer(of_x, of_x), xy - share * of_x * of_y, yy - share * of_y * of_y
            size += math.log1p(ratio * len(rows))
        inverse: Array = np.asarray(np.linalg.inv(xx), dtype=np.float64)
        beta = inverse @ xy
        left = max(float(yy) - float(xy @ beta), 1e-300)
        variance = left / (count - columns)
        likelihood = -0.5 * ((count - columns) * math.log(variance) + size + float(np.linalg.slogdet(xx)[1]))
        return likelihood, np.asarray(beta), np.asarray(inverse), variance

    best = max(RATIOS, key=lambda ratio: solved(float(ratio))[0]) if len(members) > 1 else 0.0
    ratio = _peak(lambda r: solved(r)[0], float(best)) if best > 0 else 0.0
    _, beta, inverse, variance = solved(ratio)
    return Fit(beta, inverse * variance, freedom, math.sqrt(variance), math.sqrt(ratio * variance))


def independent(columns: Sequence[Array]) -> list[int]:
    """Return which columns are no combination of those before them."""
    kept: list[int] = []
    basis: list[Array] = []
    for i, column in enumerate(columns):
        rest = column.astype(np.float64)
        for one in basis:
            rest = rest - (one @ rest) * one
        size = float(np.linalg.norm(rest))
        if size > 1e-9 * max(1.0, float(np.linalg.norm(column))):
            kept.append(i)
            basis.append(rest / size)
    return kept


def _peak(likelihood: Callable[[float], float], near: float) -> float:
    """Return where the likelihood is largest around one of `RATIOS`, by golden section over its logarithm."""
    golden = (math.sqrt(5) - 1) / 2
    low, high = math.log(near) - 0.5, math.log(near) + 0.5
    while high - low > 1e-9:
        a, b = high - golden * (high - low), low + golden * (high - low)
        low, high = (low, b) if likelihood(math.exp(a)) > likelihood(math.exp(b)) else (a, high)
    return math.exp((low + high) / 2)
