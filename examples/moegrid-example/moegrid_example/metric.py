"""A metric: a value for each token of one layer and batch, on nodes."""

from __future__ import annotations

from moegrid.extend import Routing
from torch import Tensor

from moegrid_example.declarations import SureTokens


def sure_tokens(routing: Routing, parameters: SureTokens) -> Tensor:
    """Return for each token [T] whether its best expert has more than `threshold` of the probability."""
    return (routing.probabilities.max(dim=-1).values > parameters.threshold).float()
