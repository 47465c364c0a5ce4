"""Every routing metric as a pure function: NumPy arrays in, a float out, refused when it leaves its range.

Shapes: L layers, T tokens, k slots a token, N experts. An array of one layer may omit L. `indices` are the routed
experts of a token, best first; -1 is an empty slot. `mask` [T] or [L, T] is True where a token counts (padding
never does). A function whose name ends in `_L` returns one value per layer, the plain name returns their mean.
The accumulators in `jobs.probe.accumulate` give the same values from a stream of batches.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Numbers = NDArray[np.number]

# Rounding may carry a value this far over the edge of its range; it is then put back on the edge.
TOLERANCE = 1e-6


class MetricOutOfRange(ValueError):
    """A metric is not finite or lies outside the range its definition allows: a bug, never a result."""


def in_range(name: str, value: float, low: float = -math.inf, high: float = math.inf) -> float:
    """Return `value`, moved onto the edge if rounding put it just outside; raises MetricOutOfRange otherwise."""
    value = float(value)
    if not math.isfinite(value) or value < low - TOLERANCE or value > high + TOLERANCE:
        raise MetricOutOfRange(f"{name} = {value!r} is outside its range {low:g}..{high:g}")
    return min(max(value, low), high)


def _ranged(name: str, values_L: Floats, low: float = -math.inf, high: float = math.inf) -> Floats:
    return np.array([in_range(name, value, low, high) for value in values_L])


def entropy_bits(counts: ArrayLike) -> float:
    """Return the Shannon entropy of counts / sum(counts) in bits; raises ValueError when all are zero."""
    c = np.asarray(counts, dtype=np.float64)
    total = c.sum()
    if not total > 0 or (c < 0).any():
        raise ValueError("an entropy needs counts that are not negative and not all zero")
    p = c[c > 0] / total
    return float(max(0.0, -(p * np.log2(p)).sum()))


def as_layers(array: ArrayLike) -> Numbers:
    """Return `array` with a leading layer dimension: [T, x] becomes [1, T, x]."""
    a = np.asarray(array)
    if a.ndim == 2:
        a = a[None]
    if a.ndim != 3:
        raise ValueError(f"expected an array [L, T, x] or [T, x], got shape {a.shape}")
    return a


def masks(mask: ArrayLike | None, layers: int, tokens: int) -> NDArray[np.bool_]:
    """Return `mask` as booleans [L, T]; None counts every token."""
    if mask is None:
        return np.ones((layers, tokens), dtype=bool)
    return np.broadcast_to(np.asarray(mask, dtype=bool), (layers, tokens))


def checked_indices(indices_Tk: ArrayLike, num_experts: int, mask_T: ArrayLike | None = None) -> Ints:
    """Return the counted tokens' indices [t, k]; raises ValueError on an index outside -1..N-1."""
    indices = np.asarray(indices_Tk)
    if indices.size and indices.dtype.kind not in "iu":
        raise ValueError(f"expert indices are integers, not {indices.dtype}")
    if mask_T is not None:
        keep = np.asarray(mask_T, dtype=bool)
        if not keep.all():
            indices = indices[keep]
    if indices.size and (indices.min() < -1 or indices.max() >= num_experts):
        raise ValueError(f"expert index outside -1..{num_experts - 1}: {indices.min()}..{indices.max()}")
    return indices


def expert_counts(indices_Tk: ArrayLike, num_experts: int, mask_T: ArrayLike | None = None) -> Ints:
    """Return how many slots went to each expert, [N]; raises ValueError on an index outside -1..N-1."""
    indices = checked_indices(indices_Tk, num_experts, mask_T)
    return np.bincount(indices.ravel() + 1, minlength=num_experts + 1)[1:].astype(np.int64)


def pair_counts(indices_Tk: ArrayLike, num_experts: int, mask_T: ArrayLike | None = None) -> Ints:
    """Return N_ij [N, N]: tokens that selected both i and j; the diagonal counts the tokens that selected i."""
    indices = checked_indices(indices_Tk, num_experts, mask_T)
    pairs = np.zeros((num_experts, num_experts), dtype=np.int64)
    # A multi-hot product in float32 is exact up to 2^24 tokens and far faster than counting pairs one by one.
    for start in range(0, len(indices), 8192):
        part = indices[start : start + 8192]
        chosen_tN = np.zeros((len(part), num_experts + 1), dtype=np.float32)
        chosen_tN[np.arange(len(part))[:, None], part] = 1.0  # -1 lands in the last column, which is dropped
        chosen_tN = chosen_tN[:, :num_experts]
        pairs += (chosen_tN.T @ chosen_tN).astype(np.int64)
    return pairs


def collaboration_of_pairs(pairs_NN: ArrayLike) -> float:
    """Return one layer's collaboration in bits from N_ij [N, N] (diagonal ignored); 0 without any co-activation."""
    pairs = np.array(pairs_NN, dtype=np.float64)
    np.fill_diagonal(pairs, 0.0)
    active = pairs[pairs.sum(axis=1) > 0]
    if not len(active):
        return 0.0
    q = active / active.sum(axis=1, keepdims=True)
    per_expert = -(q * np.log2(np.where(q > 0, q, 1.0))).sum(axis=1)
    return in_range("collaboration", per_expert.mean(), 0.0, math.log2(max(len(pairs) - 1, 1)))


def load_balance_L(indices_LTk: ArrayLike, num_experts: int, mask: ArrayLike | None = None) -> Floats:
    """Return the entropy of the routed experts' counts per layer, bits in 0..log2 N (MoE-Bench section 4)."""
    indices = as_layers(indices_LTk)
    kept = masks(mask, *indices.shape[:2])
    values = [entropy_bits(expert_counts(i, num_experts, m)) for i, m in zip(indices, kept, strict=True)]
    return _ranged("load_balance", np.array(values), 0.0, math.log2(num_experts))


def load_balance(indices_LTk: ArrayLike, num_experts: int, mask: ArrayLike | None = None) -> float:
    """Return `load_balance_L`'s mean over layers."""
    return float(load_balance_L(indices_LTk, num_experts, mask).mean())


def collaboration_L(indices_LTk: ArrayLike, num_experts: int, mask: ArrayLike | None = None) -> Floats:
    """Return the entropy of each expert's partners, mean over experts with any, per layer, bits in 0..log2(N-1).

    q_ij = N_ij / sum over j != i of N_ij (MoE-Bench section 4); 0 where no token has two experts.
    """
    indices = as_layers(indices_LTk)
    kept = masks(mask, *indices.shape[:2])
    layers = zip(indices, kept, strict=True)
    return np.array([collaboration_of_pairs(pair_counts(i, num_experts, m)) for i, m in layers])


def collaboration(indices_LTk: ArrayLike, num_experts: int, mask: ArrayLike | None = None) -> float:
    """Return `collaboration_L`'s mean over layers."""
    return float(collaboration_L(indices_LTk, num_experts, mask).mean())


def expert_allocation_entropy_L(indices_LTk: ArrayLike, num_experts: int, mask: ArrayLike | None = None) -> Floats:
    """Return the entropy of the pooled selection counts / log2 N per layer, 0..1 (LibMoE section 5); 0 when N = 1."""
    scale = math.log2(num_experts) if num_experts > 1 else 1.0
    return _ranged("expert_allocation_entropy", load_balance_L(indices_LTk, num_experts, mask) / scale, 0.0, 1.0)


def expert_allocation_entropy(indices_LTk: ArrayLike, num_experts: int, mask: ArrayLike | None = None) -> float:
    """Return `expert_allocation_entropy_L`'s mean over layers."""
    return float(expert_allocation_entropy_L(indices_LTk, num_experts, mask).mean())


def weight_entropies(weights_Tk: ArrayLike, indices_Tk: ArrayLike | None = None) -> Floats:
    """Return each token's weight entropy / log2 k_t, [t], tokens without any weight left out; 0 where k_t = 1."""
    weights = np.asarray(weights_Tk, dtype=np.float64)
    real = np.ones(weights.shape, dtype=bool) if indices_Tk is None else np.asarray(indices_Tk) >= 0
    weights = np.where(real, weights, 0.0)
    if not np.isfinite(weights).all() or (weights < 0).any():
        raise ValueError("routing weights must be finite and not negative")
    total = weights.sum(axis=1)
    some = total > 0
    p = weights[some] / total[some, None]
    bits = -(p * np.log2(np.where(p > 0, p, 1.0))).sum(axis=1)
    slots = real[some].sum(axis=1)
    return np.where(slots > 1, bits / np.log2(np.maximum(slots, 2)), 0.0)


def expert_weight_entropy_L(
    weights_LTk: ArrayLike, indices_LTk: ArrayLike | None = None, mask: ArrayLike | None = None
) -> Floats:
    """Return the entropy of the k weights renormalised over the selected experts / log2 k, mean over tokens, 0..1.

    `indices_LTk` tells empty slots (-1), so that k is a token's own number of experts; without it every slot is real.
    """
    weights = as_layers(weights_LTk)
    indices = None if indices_LTk is None else as_layers(indices_LTk)
    kept = masks(mask, *weights.shape[:2])
    values = [
        weight_entropies(weights[i][kept[i]], None if indices is None else indices[i][kept[i]])
        for i in range(len(weights))
    ]
    return _ranged("expert_weight_entropy", np.array([_mean(v) for v in values]), 0.0, 1.0)


def expert_weight_entropy(
    weights_LTk: ArrayLike, indices_LTk: ArrayLike | None = None, mask: ArrayLike | None = None
) -> float:
    """Return `expert_weight_entropy_L`'s mean over layers."""
    return float(expert_weight_entropy_L(weights_LTk, indices_LTk, mask).mean())


def margins(scores_TN: ArrayLike) -> Floats:
    """Return each token's best score minus its second best, [T]; raises ValueError with fewer than two experts."""
    scores = np.asarray(scores_TN)
    if scores.shape[-1] < 2:
        raise ValueError("a margin needs at least two experts")
    top2 = np.partition(scores, scores.shape[-1] - 2, axis=-1)[..., -2:].astype(np.float64)
    return top2[..., 1] - top2[..., 0]


def router_margin_L(scores_LTN: ArrayLike, mask: ArrayLike | None = None) -> Floats:
    """Return the mean over tokens of top1 - top2 of the full scores per layer, >= 0.

    Comparable only between routers with the same score function (LibMoE appendix D).
    """
    scores = as_layers(scores_LTN)
    kept = masks(mask, *scores.shape[:2])
    values = [_mean(margins(s[m])) for s, m in zip(scores, kept, strict=True)]
    return _ranged("router_margin", np.array(values), 0.0)


def router_margin(scores_LTN: ArrayLike, mask: ArrayLike | None = None) -> float:
    """Return `router_margin_L`'s mean over layers."""
    return float(router_margin_L(scores_LTN, mask).mean())


def overlaps(first_Tk: ArrayLike, second_Tk: ArrayLike, top: int | None = None) -> Floats:
    """Return size(A and B) / max(size A, size B) of each token's two expert sets, [t]; two empty sets are left out."""
    a, b = _best(np.asarray(first_Tk), top), _best(np.asarray(second_Tk), top)
    if len(a) != len(b):
        raise ValueError(f"the same tokens are needed twice, got {len(a)} and {len(b)}")
    in_b = (a[:, :, None] == b[:, None, :]).any(axis=2)
    both = (_distinct(a) & in_b).sum(axis=1)
    larger = np.maximum(_distinct(a).sum(axis=1), _distinct(b).sum(axis=1))
    shares: Floats = np.divide(both[larger > 0], larger[larger > 0], dtype=np.float64)
    return shares


def router_saturation_L(
    indices_LTk: ArrayLike, final_LTk: ArrayLike, top: int | None = None, mask: ArrayLike | None = None
) -> Floats:
    """Return the mean over tokens of the overlap of a checkpoint's expert sets with the final one's per layer, 0..1.

    The overlap is size(E_t and E_T) / max(size E_t, size E_T); `top` = 1 compares best experts only, None all k.
    """
    first, final = as_layers(indices_LTk), as_layers(final_LTk)
    kept = masks(mask, *first.shape[:2])
    layers = zip(first, final, kept, strict=True)
    return _ranged("router_saturation", np.array([_mean(overlaps(a[m], b[m], top)) for a, b, m in layers]), 0.0, 1.0)


def router_saturation(
    indices_LTk: ArrayLike, final_LTk: ArrayLike, top: int | None = None, mask: ArrayLike | None = None
) -> float:
    """Return `router_saturation_L`'s mean over layers."""
    return float(router_saturation_L(indices_LTk, final_LTk, top, mask).mean())


def expert_change_rate(
    indices_LTk: ArrayLike, later_LTk: ArrayLike, top: int | None = None, mask: ArrayLike | None = None
) -> float:
    """Return 1 - the mean overlap of two checkpoints' expert sets, 0..1 (LibMoE section 5)."""
    return in_range("expert_change_rate", 1.0 - router_saturation(indices_LTk, later_LTk, top, mask), 0.0, 1.0)


def expert_changed_share(
    indices_LTk: ArrayLike, later_LTk: ArrayLike, top: int | None = None, mask: ArrayLike | None = None
) -> float:
    """Return the share of tokens whose expert set changed at all between two checkpoints, mean over layers, 0..1."""
    first, later = as_layers(indices_LTk), as_layers(later_LTk)
    kept = masks(mask, *first.shape[:2])
    shares = [_mean(overlaps(a[m], b[m], top) < 1.0) for a, b, m in zip(first, later, kept, strict=True)]
    return in_range("expert_changed_share", float(np.mean(shares)), 0.0, 1.0)


def coactivation_of_pairs(pairs_NN: ArrayLike) -> Floats:
    """Return N_ij / N_i [N, N] from `pair_counts`; rows of unused experts are 0."""
    pairs = np.asarray(pairs_NN, dtype=np.float64)
    uses = np.diagonal(pairs)[:, None]
    return np.divide(pairs, uses, out=np.zeros_like(pairs), where=uses > 0)


def expert_coactivation(indices_LTk: ArrayLike, num_experts: int, mask: ArrayLike | None = None) -> Floats:
    """Return N_ij / N_i [L, N, N]: the share of expert i's tokens that also selected j, 0..1; the diagonal is 1."""
    indices = as_layers(indices_LTk)
    kept = masks(mask, *indices.shape[:2])
    return np.stack([coactivation_of_pairs(pair_counts(i, num_experts, m)) for i, m in zip(indices, kept, strict=True)])


def cosine_matrix(vectors_NP: ArrayLike) -> Floats:
    """Return the pairwise cosines [N, N] of N flattened vectors; a zero vector has cosine 0 with every other."""
    v = np.asarray(vectors_NP)
    v = v.reshape(len(v), -1).astype(np.float64)
    norms = np.linalg.norm(v, axis=1, keepdims=True)
    v = np.divide(v, norms, out=np.zeros_like(v), where=norms > 0)
    return np.asarray(np.clip(v @ v.T, -1.0, 1.0))


def expert_similarity(vectors_NP: ArrayLike) -> float:
    """Return the mean pairwise cosine of one layer's expert weights [N, ...] (flattened), diagonal excluded, -1..1."""
    cosines = cosine_matrix(vectors_NP)
    n = len(cosines)
    if n < 2:
        raise ValueError("a similarity needs at least two experts")
    return in_range("expert_similarity", (cosines.sum() - np.trace(cosines)) / (n * (n - 1)), -1.0, 1.0)


def expert_output_similarity(outputs_NTD: ArrayLike) -> float:
    """Return the mean over tokens of the mean pairwise cosine of the experts' outputs on the same tokens, -1..1."""
    outputs = np.asarray(outputs_NTD)
    values = [expert_similarity(outputs[:, t]) for t in range(outputs.shape[1])]
    return in_range("expert_output_similarity", float(np.mean(values)), -1.0, 1.0)


def distribution_distance_L(first_LN: ArrayLike, second_LN: ArrayLike) -> Floats:
    """Return the L1 distance of two routing distributions per layer, 0..2; rows are normalised to sum 1."""
    a, b = np.asarray(first_LN, dtype=np.float64), np.asarray(second_LN, dtype=np.float64)
    a, b = a / a.sum(axis=-1, keepdims=True), b / b.sum(axis=-1, keepdims=True)
    return _ranged("routing_distance", np.abs(a - b).sum(axis=-1), 0.0, 2.0)


def routing_distance_L(
    scores_LTN: ArrayLike,
    shifted_LUN: ArrayLike,
    mask: ArrayLike | None = None,
    shifted_mask: ArrayLike | None = None,
) -> Floats:
    """Return the L1 distance between two data sets' mean routing distributions per layer, 0..2 (MoE-RBench Fig. 3)."""
    means = []
    for scores, kept in ((as_layers(scores_LTN), mask), (as_layers(shifted_LUN), shifted_mask)):
        rows = zip(scores, masks(kept, *scores.shape[:2]), strict=True)
        means.append(np.stack([s[m].mean(axis=0, dtype=np.float64) for s, m in rows]))
    return distribution_distance_L(means[0], means[1])


def routing_distance(
    scores_LTN: ArrayLike,
    shifted_LUN: ArrayLike,
    mask: ArrayLike | None = None,
    shifted_mask: ArrayLike | None = None,
) -> float:
    """Return `routing_distance_L`'s mean over layers."""
    return float(routing_distance_L(scores_LTN, shifted_LUN, mask, shifted_mask).mean())


def least_used(counts_LN: ArrayLike) -> Ints:
    """Return the least used expert of every layer [L], the lower index on a tie: what `capacity` removes."""
    return np.asarray(np.asarray(counts_LN).argmin(axis=-1), np.int64)


def capacity(base: float, pruned: float) -> float:
    """Return acc(base) - acc(least used expert of every MoE layer removed), -1..1 (MoE-Bench section 4)."""
    return in_range("capacity", _accuracy(base) - _accuracy(pruned), -1.0, 1.0)


def specialization(base: float, random: Sequence[float]) -> float:
    """Return acc(base) - the mean accuracy under random routings, one a routing seed, -1..1 (MoE-Bench section 4)."""
    return in_range("specialization", _accuracy(base) - float(np.mean([_accuracy(r) for r in random])), -1.0, 1.0)


def capacity_bpb(base: float, pruned: float) -> float:
    """Return answer_bpb(pruned) - answer_bpb(base): positive where the removal hurts."""
    return in_range("capacity_bpb", in_range("answer_bpb", pruned, 0.0) - in_range("answer_bpb", base, 0.0))


def specialization_bpb(base: float, random: Sequence[float]) -> float:
    """Return the mean answer_bpb under random routings - answer_bpb(base): positive where random routing hurts."""
    mean = float(np.mean([in_range("answer_bpb", r, 0.0) for r in random]))
    return in_range("specialization_bpb", mean - in_range("answer_bpb", base, 0.0))


def drop_top(base: float, dropped: float) -> float:
    """Return acc(best expert or experts dropped) - acc(base), -1..1: the accuracy change, negative where it hurts."""
    return in_range("drop_top", _accuracy(dropped) - _accuracy(base), -1.0, 1.0)


def init_std_balance(steps: ArrayLike, losses: ArrayLike, first: int = 1000) -> float:
    """Return the mean load-balance loss over the steps up to `first` (LibMoE section 5g), >= 0."""
    early = np.asarray(losses, dtype=np.float64)[np.asarray(steps) <= first]
    return in_range("init_std_balance", _mean(early), 0.0)


def _accuracy(value: float) -> float:
    return in_range("accuracy", value, 0.0, 1.0)


def _mean(values: ArrayLike) -> float:
    array = np.asarray(values, dtype=np.float64)
    if not array.size:
        raise ValueError("no token counts here: the mask or the routing is empty")
    return float(array.mean())


def _best(indices_Tk: Numbers, top: int | None) -> Numbers:
    if top is None:
        return indices_Tk
    order = np.argsort(indices_Tk < 0, axis=1, kind="stable")  # real slots first, best first
    return np.take_along_axis(indices_Tk, order, axis=1)[:, :top]


def _distinct(indices_Tk: Numbers) -> NDArray[np.bool_]:
    """Return which slots hold an expert that no earlier slot of the token holds: sets have no repeats."""
    repeated = np.zeros(indices_Tk.shape, dtype=bool)
    for slot in range(1, indices_Tk.shape[1]):
        repeated[:, slot] = (indices_Tk[:, :slot] == indices_Tk[:, slot, None]).any(axis=1)
    return (indices_Tk >= 0) & ~repeated
