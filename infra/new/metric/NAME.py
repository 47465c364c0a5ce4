"""The metric NAME. In a grid: `plugins: [./NAME.py]`, suite `probe`, and under `set:` `evaluate.metrics: [NAME]`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from moegrid.extend import MetricKind

if TYPE_CHECKING:
    from moegrid.extend import Routing
    from torch import Tensor


@dataclass(frozen=True)
class Parameters:
    """What a grid may set of it: `{NAME: {threshold: 0.9}}`."""

    threshold: float = 0.5


def metric(routing: Routing, parameters: Parameters) -> Tensor:
    """Return for each token [T] whether its best expert has more than `threshold` of the probability."""
    return (routing.probabilities.max(dim=-1).values > parameters.threshold).float()


KIND = MetricKind(
    "NAME",
    code="NAME:metric",
    parameters=Parameters,
    low=0.0,
    high=1.0,
    better=0,  # 1: higher is better, -1: lower is
    description="share of tokens whose router is sure",
)
