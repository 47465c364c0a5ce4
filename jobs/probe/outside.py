"""Metrics of other packages over a stream of routing records, in memory that does not grow with the tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from jobs.probe.accumulate import Means, RoutingTotals
from jobs.probe.metrics import Floats, in_range
from orchestrator.catalog.metrics import METRICS, MetricKind
from orchestrator.catalog.parameters import code_of
from orchestrator.catalog.uses import Uses
from orchestrator.errors import MoegridError

if TYPE_CHECKING:
    from jobs.moe.routing import Routing


class Outside:
    """The metrics that `asked` names with their parameters, for named token sets."""

    def __init__(self, asked: Uses) -> None:
        self._kinds = {name: METRICS.get(name) for name in asked}
        self._code = {name: code_of(METRICS, name, given) for name, given in asked.items()}
        self._means: dict[tuple[str, str], Means] = {}

    def observe(self, name: str, layer: int, layers: int, routing: Routing) -> None:
        """Add one record of the token set `name`, of one of its `layers`."""
        for metric, kind in self._kinds.items():
            if kind.reads == "tokens":
                values = self._code[metric](routing)
                if not isinstance(values, Tensor) or values.shape != routing.mask.shape:
                    raise _malformed(kind, values, "a tensor with one value a token of the routing")
                means = self._means.setdefault((name, metric), Means(layers))
                means.add(layer, values.detach()[routing.mask].double().cpu().numpy())

    def per_layer(self, name: str, totals: RoutingTotals) -> dict[str, Floats]:
        """Return the metrics of the token set `name` per layer; MetricOutOfRange when one leaves its range."""
        found: dict[str, Floats] = {}
        for metric, kind in self._kinds.items():
            if kind.reads == "tokens":
                found[metric] = self._means[name, metric].values(metric, kind.low, kind.high)
                continue
            values = np.asarray(self._code[metric](totals), dtype=np.float64)
            if values.shape != totals.tokens_L.shape:
                raise _malformed(kind, values, f"one value a layer [{len(totals.tokens_L)}]")
            found[metric] = np.array([in_range(metric, value, kind.low, kind.high) for value in values])
        return found


def _malformed(kind: MetricKind, values: object, wanted: str) -> MoegridError:
    shape = getattr(values, "shape", None)
    shown = repr(values) if shape is None else f"shape {list(shape)}"
    return MoegridError(
        f"metric {kind.name!r} is not what it is declared as",
        cause=f"{kind.code} returns {shown:.80}",
        hint=f"return {wanted}",
    )
