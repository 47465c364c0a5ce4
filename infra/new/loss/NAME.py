"""The loss NAME. In a grid: `plugins: [./NAME.py]`, and under `set:` `finetune.balance.losses: {NAME: 0.01}`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from moegrid.extend import LossKind

if TYPE_CHECKING:
    from moegrid.extend import Routing
    from torch import Tensor


@dataclass(frozen=True)
class Parameters:
    """What a grid may set of it: `{NAME: {coef: 0.01, power: 3}}`."""

    power: float = 2.0

    def __post_init__(self) -> None:
        if self.power < 1:
            raise ValueError(f"power must be at least 1, not {self.power:g}")


def loss(routing: Routing, parameters: Parameters) -> Tensor:
    """Return how uneven the mean probabilities P [N] of one layer's experts are: mean |N P_i - 1|^power."""
    share = routing.probabilities[routing.mask].mean(dim=0) * routing.num_ids
    return ((share - 1).abs() ** parameters.power).mean()


KIND = LossKind("NAME", code="NAME:loss", parameters=Parameters, description="mean |N P_i - 1|^power")
