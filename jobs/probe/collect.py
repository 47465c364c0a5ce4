"""How a model routes named token sets: metrics, and arrays for figures.

Everything is streamed: memory depends on layers and experts, never on the number of tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from jobs.probe.accumulate import RoutingTotals
from jobs.probe.metrics import Floats, distribution_distance_L, in_range
from jobs.probe.outside import Outside
from jobs.probe.sets import TokenBatch, routings_of
from orchestrator.catalog.uses import Uses

if TYPE_CHECKING:
    from jobs.models.backbones import CausalLM
    from jobs.moe.routing import Routing

HELDOUT = "heldout"
SAMPLE_TOKENS = 4096


class Collector:
    """Sums up the routing records of named token sets; `asked` are metrics of other packages."""

    def __init__(self, sample: int = 0, asked: Uses = MappingProxyType({})) -> None:
        self.totals: dict[str, RoutingTotals] = {}
        self._outside = Outside(asked)
        self.null_slots: dict[str, list[int]] = {}
        self._sample = sample
        self._samples: list[NDArray[np.int16]] = []

    def observe(self, name: str, routings: Sequence[Routing]) -> None:
        """Add the records of one forward pass, one a layer; padding does not count."""
        first = routings[0]
        if name not in self.totals:
            self.totals[name] = RoutingTotals(len(routings), first.num_experts, first.num_ids)
            self.null_slots[name] = [0, 0]
        totals = self.totals[name]
        left = self._sample - (len(self._samples[0]) if self._samples else 0) if name == HELDOUT else 0
        rows: list[NDArray[np.int16]] = []
        for layer, routing in enumerate(routings):
            experts = _numpy(routing.expert_indices())
            ids = experts if routing.physical is None else _numpy(routing.indices)
            mask = _numpy(routing.mask)
            self._outside.observe(name, layer, len(routings), routing)
            totals.update(
                layer,
                experts,
                weights_Tk=_numpy(routing.weights.float()),
                scores_TN=_numpy(routing.scores.float()),
                mask_T=mask if routing.padded else None,
                ids_Tk=ids,
            )
            if routing.null is not None:
                start, stop = routing.null
                real = ids[ids >= 0]
                self.null_slots[name][0] += int(((real >= start) & (real < stop)).sum())
                self.null_slots[name][1] += real.size
            if left > 0:
                rows.append(experts[mask][:left].astype(np.int16))
        if rows:
            old = self._samples
            self._samples = [_joined(*pair) for pair in zip(old, rows, strict=True)] if old else rows

    def metrics(self) -> dict[str, float]:
        """Return every set's metrics, means over layers: plain names for `heldout`, `<set>/<name>` for the others."""
        found: dict[str, float] = {}
        for name, totals in self.totals.items():
            prefix = "" if name == HELDOUT else f"{name}/"
            for metric, values in self.per_layer(name).items():
                found[f"{prefix}{metric}"] = float(np.mean(values))
            if name != HELDOUT and HELDOUT in self.totals:
                distance = distribution_distance_L(self.totals[HELDOUT].distribution_LN(), totals.distribution_LN())
                found[f"{prefix}routing_distance"] = float(distance.mean())
            nulls, slots = self.null_slots[name]
            if slots:
                found[f"{prefix}null_share"] = in_range("null_share", nulls / slots, 0.0, 1.0)
        return found

    def per_layer(self, name: str) -> dict[str, Floats]:
        """Return the metrics of one set per layer."""
        totals = self.totals[name]
        found = {
            "probe_load_balance": totals.load_balance_L(),
            "probe_collaboration": totals.collaboration_L(),
            "expert_allocation_entropy": totals.expert_allocation_entropy_L(),
            "expert_weight_entropy": totals.expert_weight_entropy_L(),
        }
        if totals.scores_LN.shape[1] > 1:
            found["router_margin"] = totals.router_margin_L()
        return found | self._outside.per_layer(name, totals)

    def arrays(self) -> dict[str, NDArray[Any]]:
        """Return the arrays of `probe.npz` that come from routing records."""
        found: dict[str, NDArray[Any]] = {}
        for name, totals in self.totals.items():
            found[f"{name}.counts"] = totals.counts_LN
            found[f"{name}.pairs"] = totals.pairs_LNN
            found[f"{name}.scores"] = totals.distribution_LN()
            for metric, values in self.per_layer(name).items():
                found[f"{name}.{metric}"] = values
        if self._samples:
            found["sample"] = np.stack(self._samples)
        return found


@torch.inference_mode()
def probe(
    model: CausalLM,
    sets: Mapping[str, Iterable[TokenBatch]],
    sample: int = SAMPLE_TOKENS,
    asked: Uses = MappingProxyType({}),
) -> Collector:
    """Return what `model` does with every token set; one forward pass a batch, without the head."""
    collector = Collector(sample, asked)
    for name, batches in sets.items():
        for batch in batches:
            collector.observe(name, routings_of(model, batch))
    return collector


def _joined(first_TK: NDArray[np.int16], more_TK: NDArray[np.int16]) -> NDArray[np.int16]:
    """Return the tokens of both, the narrower one's missing slots empty (expert choice varies them)."""
    slots = max(first_TK.shape[1], more_TK.shape[1])
    wide = [np.pad(a, ((0, 0), (0, slots - a.shape[1])), constant_values=-1) for a in (first_TK, more_TK)]
    return np.concatenate(wide)


def _numpy(tensor: Tensor) -> NDArray[Any]:
    array: NDArray[Any] = tensor.detach().cpu().numpy()
    return array
