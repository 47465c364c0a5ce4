"""A loss: a function of one layer's routing record, on nodes."""

from __future__ import annotations

from moegrid.extend import Routing
from torch import Tensor

from moegrid_example.declarations import Evenness


def evenness(routing: Routing, parameters: Evenness) -> Tensor:
    """Return how uneven the mean probabilities P [N] of one layer's experts are: mean |N P_i - 1|^power."""
    share = routing.probabilities[routing.mask].mean(dim=0) * routing.num_ids
    return ((share - 1).abs() ** parameters.power).mean()
