"""Weighted mixtures of corpora: what share of training each of them has."""

from __future__ import annotations

import math

from orchestrator.errors import did_you_mean
from orchestrator.files.problems import Mistake
from orchestrator.spec.cell import DataSpec

# A share is a whole number of windows in so many: an exact proportion that recurs.
ROUND = 10_000


def mixture_shares(data: DataSpec) -> dict[str, float]:
    """Return the share of each corpus with a weight above 0, in the order of their names; they add up to 1.

    Equal proportions are equal shares, so that weights of 7 and 3 are those of 0.7 and 0.3. Raises Mistake.
    """
    names = sorted(corpus.name for corpus in data.corpora)
    for name, weight in data.weights.items():
        if name not in names:
            raise Mistake(f"weight of {name!r}, which is no corpus", did_you_mean(name, names, "corpora"))
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 <= weight < math.inf:
            raise Mistake(f"weight of corpus {name!r} must be a number of at least 0, not {weight!r}")
    weights = {name: float(data.weights.get(name, 1.0)) for name in names}
    total = sum(weights.values())
    if not total:
        raise Mistake("every corpus has the weight 0", "give one of them a weight")
    least = 1 / ROUND
    for name, weight in weights.items():
        if 0 < weight / total < least:
            raise Mistake(f"corpus {name!r} has a share of {weight / total:.2g}", f"at least {least:g}, or 0 for none")
    return {name: round(weight / total, 9) for name, weight in weights.items() if weight}
