"""The metrics of `jobs.probe.metrics` over a stream of batches, in memory that does not grow with the tokens."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike

from jobs.probe.metrics import (
    Floats,
    Ints,
    coactivation_of_pairs,
    collaboration_of_pairs,
    entropy_bits,
    expert_counts,
    in_range,
    least_used,
    margins,
    pair_counts,
    weight_entropies,
)


class RoutingTotals:
    """Counts, pair counts and means of one set of tokens: O(L N^2) memory at any number of tokens.

    `num_ids` are the router's ids, where they are more than the physical experts (MoE++, TC-MoE).
    """

    def __init__(self, num_layers: int, num_experts: int, num_ids: int = 0) -> None:
        self.num_experts = num_experts
        self.counts_LN: Ints = np.zeros((num_layers, num_experts), dtype=np.int64)
        self.pairs_LNN: Ints = np.zeros((num_layers, num_experts, num_experts), dtype=np.int64)
        self.scores_LN: Floats = np.zeros((num_layers, num_ids or num_experts))
        self.tokens_L: Ints = np.zeros(num_layers, dtype=np.int64)
        self._margins = Means(num_layers)
        self._entropies = Means(num_layers)

    def update(
        self,
        layer: int,
        indices_Tk: ArrayLike,
        *,
        weights_Tk: ArrayLike | None = None,
        scores_TN: ArrayLike | None = None,
        mask_T: ArrayLike | None = None,
        ids_Tk: ArrayLike | None = None,
    ) -> None:
        """Add one batch of one layer; tokens where `mask_T` is False do not count.

        `indices_Tk` are physical experts, `ids_Tk` the router ids that `weights_Tk` belong to (default: the same).
        """
        indices = np.asarray(indices_Tk)
        keep = np.ones(len(indices), dtype=bool) if mask_T is None else np.asarray(mask_T, dtype=bool)
        indices = indices[keep]
        self.tokens_L[layer] += len(indices)
        self.counts_LN[layer] += expert_counts(indices, self.num_experts)
        self.pairs_LNN[layer] += pair_counts(indices, self.num_experts)
        if weights_Tk is not None:
            slots = indices if ids_Tk is None else np.asarray(ids_Tk)[keep]
            self._entropies.add(layer, weight_entropies(np.asarray(weights_Tk)[keep], slots))
        if scores_TN is not None:
            scores = np.asarray(scores_TN)[keep]
            self.scores_LN[layer] += scores.sum(axis=0, dtype=np.float64)
            if scores.shape[1] > 1:
                self._margins.add(layer, margins(scores))

    def load_balance_L(self) -> Floats:
        """Return the entropy of each layer's expert counts in bits, 0..log2 N."""
        high = math.log2(self.num_experts)
        return np.array([in_range("load_balance", entropy_bits(counts), 0.0, high) for counts in self.counts_LN])

    def collaboration_L(self) -> Floats:
        """Return each layer's mean partner entropy in bits, 0..log2(N-1)."""
        return np.array([collaboration_of_pairs(pairs) for pairs in self.pairs_LNN])

    def expert_allocation_entropy_L(self) -> Floats:
        """Return each layer's load balance as a share of log2 N, 0..1."""
        return self.load_balance_L() / (math.log2(self.num_experts) if self.num_experts > 1 else 1.0)

    def expert_weight_entropy_L(self) -> Floats:
        """Return each layer's mean weight entropy, 0..1."""
        return self._entropies.values("expert_weight_entropy", 0.0, 1.0)

    def router_margin_L(self) -> Floats:
        """Return each layer's mean of best minus second best score."""
        return self._margins.values("router_margin", 0.0, math.inf)

    def expert_coactivation(self) -> Floats:
        """Return N_ij / N_i, [L, N, N]."""
        return np.stack([coactivation_of_pairs(pairs) for pairs in self.pairs_LNN])

    def distribution_LN(self) -> Floats:
        """Return each layer's mean routing distribution, rows summing to 1: what `routing_distance` compares."""
        return np.asarray(self.scores_LN / self.scores_LN.sum(axis=1, keepdims=True))

    def least_used(self) -> Ints:
        """Return the least used expert of every layer, [L]."""
        return least_used(self.counts_LN)


class Means:
    """A mean per layer, kept as a sum and a number."""

    def __init__(self, num_layers: int) -> None:
        self.sums_L = np.zeros(num_layers)
        self.numbers_L = np.zeros(num_layers, dtype=np.int64)

    def add(self, layer: int, values_T: Floats) -> None:
        self.sums_L[layer] += values_T.sum(dtype=np.float64)
        self.numbers_L[layer] += len(values_T)

    def values(self, name: str, low: float, high: float) -> Floats:
        if not self.numbers_L.all():
            raise ValueError(f"{name}: no token was counted in layer {int(self.numbers_L.argmin())}")
        return np.array([in_range(name, v, low, high) for v in self.sums_L / self.numbers_L])
