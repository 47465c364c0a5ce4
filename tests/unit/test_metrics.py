"""Routing metrics: closed-form values, independent recomputation, ranges, and streams equal to whole arrays."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from jobs.probe import metrics as m
from jobs.probe.accumulate import RoutingTotals


def routings(layers: int = 3, tokens: int = 400, top_k: int = 4, experts: int = 16, seed: int = 0):
    rng = np.random.default_rng(seed)
    scores = rng.dirichlet(np.linspace(0.2, 2.0, experts), size=(layers, tokens))
    indices = np.argsort(-scores, axis=-1)[..., :top_k]
    return scores, indices, np.take_along_axis(scores, indices, axis=-1)


def test_uniform_load_over_four_experts_is_two_bits() -> None:
    assert m.load_balance(np.arange(400).reshape(1, 100, 4) % 4, 4) == 2.0
    assert m.load_balance(np.zeros((2, 50, 1), dtype=int), 4) == 0.0


def test_load_balance_averages_layers_and_keeps_unused_experts_out_of_the_entropy() -> None:
    indices = np.stack([np.arange(64)[:, None] % 2, np.arange(64)[:, None] % 8])
    assert m.load_balance(indices, 8) == pytest.approx((1.0 + 3.0) / 2)


def test_collaboration_bounds() -> None:
    assert m.collaboration(np.arange(100)[None, :, None] % 8, 8) == 0.0  # k = 1
    pairs = np.array(list(itertools.permutations(range(8), 2)))
    assert m.collaboration(pairs, 8) == pytest.approx(math.log2(7))
    fixed = np.array([[0, 1], [2, 3]] * 10)
    assert m.collaboration(fixed, 8) == 0.0  # every expert has one partner; unused experts do not enter the mean


def test_collaboration_matches_a_direct_recomputation() -> None:
    _, indices, _ = routings()
    experts, layers = 16, []
    for layer in indices:
        together = np.zeros((experts, experts))
        for token in layer:
            for i, j in itertools.permutations(token, 2):
                together[i, j] += 1
        values = []
        for i in range(experts):
            if together[i].sum():
                q = together[i][together[i] > 0] / together[i].sum()
                values.append(-(q * np.log2(q)).sum())
        layers.append(np.mean(values))
    assert m.collaboration(indices, experts) == pytest.approx(np.mean(layers), abs=1e-12)


def by_hand(indices: np.ndarray, experts: int) -> dict[str, float]:
    """Return metrics of one layer [T, k] as a reader of the definitions would compute them, token by token."""
    counts, together = [0] * experts, [[0] * experts for _ in range(experts)]
    for token in indices.tolist():
        chosen = [e for e in token if e >= 0]
        for e in chosen:
            counts[e] += 1
        for i, j in itertools.permutations(chosen, 2):
            together[i][j] += 1
    total = sum(counts)
    entropy = -sum(c / total * math.log2(c / total) for c in counts if c)
    partners = []
    for row in together:
        if sum(row):
            partners.append(-sum(n / sum(row) * math.log2(n / sum(row)) for n in row if n))
    coactivation = [[n / c if c else 0.0 for n in row] for row, c in zip(together, counts, strict=True)]
    return {"entropy": entropy, "collaboration": sum(partners) / len(partners), "first": coactivation[0][1]}


def test_metrics_equal_a_token_by_token_recomputation_with_empty_slots() -> None:
    rng = np.random.default_rng(7)
    layers = np.stack([np.argsort(rng.random((200, 8)), axis=1)[:, :3] for _ in range(2)])
    layers[:, rng.random(200) < 0.3, 2] = -1  # tokens with two experts
    layers[0, :10] = -1  # tokens with none
    expected = [by_hand(layer, 8) for layer in layers]
    assert m.load_balance(layers, 8) == pytest.approx(np.mean([e["entropy"] for e in expected]), abs=1e-12)
    assert m.collaboration(layers, 8) == pytest.approx(np.mean([e["collaboration"] for e in expected]), abs=1e-12)
    assert m.expert_coactivation(layers, 8)[:, 0, 1] == pytest.approx([e["first"] for e in expected], abs=1e-12)
    later = np.roll(layers, 1, axis=1)
    overlap = []
    for first, second in zip(layers.reshape(-1, 3).tolist(), later.reshape(-1, 3).tolist(), strict=True):
        a, b = {e for e in first if e >= 0}, {e for e in second if e >= 0}
        overlap.append(None if not a and not b else len(a & b) / max(len(a), len(b)))
    per_layer = [np.mean([v for v in overlap[i * 200 : (i + 1) * 200] if v is not None]) for i in range(2)]
    assert m.router_saturation(layers, later) == pytest.approx(np.mean(per_layer), abs=1e-12)
    assert m.router_saturation(layers, layers) == 1.0


def test_masked_tokens_and_empty_slots_never_count() -> None:
    _, indices, weights = routings()
    mask = np.random.default_rng(1).random(400) < 0.5
    assert m.load_balance(indices, 16, mask) == m.load_balance(indices[:, mask], 16)
    assert m.collaboration(indices, 16, mask) == m.collaboration(indices[:, mask], 16)
    padded = np.concatenate([indices, np.full((3, 400, 2), -1)], axis=2)
    wider = np.concatenate([weights, np.zeros((3, 400, 2))], axis=2)
    assert m.load_balance(padded, 16) == m.load_balance(indices, 16)
    assert m.collaboration(padded, 16) == m.collaboration(indices, 16)
    assert m.expert_weight_entropy(wider, padded) == pytest.approx(m.expert_weight_entropy(weights), abs=1e-12)
    assert m.router_saturation(padded, indices) == 1.0


def test_weight_entropy_is_one_for_equal_weights_and_zero_for_one_expert() -> None:
    assert m.expert_weight_entropy(np.full((1, 9, 4), 0.1)) == pytest.approx(1.0)
    assert m.expert_weight_entropy(np.full((1, 9, 1), 0.7)) == 0.0
    assert m.expert_weight_entropy(np.array([[[0.5, 0.0]]])) == 0.0


def test_margin_is_the_gap_between_the_two_best_scores() -> None:
    scores, _, _ = routings()
    ordered = np.sort(scores, axis=-1)
    assert m.router_margin(scores) == pytest.approx((ordered[..., -1] - ordered[..., -2]).mean())


def test_saturation_and_change_rate() -> None:
    _, indices, _ = routings()
    assert m.router_saturation(indices, indices) == 1.0
    assert m.router_saturation(indices, indices[..., ::-1]) == 1.0  # sets, not sequences
    assert m.expert_change_rate(indices, indices) == 0.0
    a, b = np.array([[0, 1], [0, 1]]), np.array([[0, 2], [2, 3]])
    assert m.router_saturation(a, b) == 0.25
    assert m.router_saturation(a, b, top=1) == 0.5
    assert m.expert_change_rate(a, b) == 0.75
    assert m.expert_changed_share(a, np.array([[1, 0], [0, 3]])) == 0.5
    # Expert choice: sets of different sizes are measured against the larger one.
    assert m.router_saturation(np.array([[0, -1, -1]]), np.array([[0, 1, 2]])) == pytest.approx(1 / 3)


def test_coactivation_is_the_share_of_an_experts_tokens() -> None:
    matrix = m.expert_coactivation(np.array([[0, 1], [0, 2], [0, 1], [3, 1]]), 5)[0]
    assert matrix[0, 1] == pytest.approx(2 / 3)
    assert matrix[1, 3] == pytest.approx(1 / 3)
    assert matrix[4].sum() == 0


def test_similarity_excludes_the_diagonal() -> None:
    assert m.expert_similarity(np.eye(4)) == 0.0
    assert m.expert_similarity(np.ones((3, 2, 5))) == pytest.approx(1.0)
    assert m.expert_output_similarity(np.stack([np.ones((6, 3)), -np.ones((6, 3))])) == pytest.approx(-1.0)


def test_routing_distance_lies_between_zero_and_two() -> None:
    scores, _, _ = routings()
    assert m.routing_distance(scores, scores[:, ::-1]) == pytest.approx(0.0, abs=1e-12)
    left, right = np.tile([1.0, 0.0], (1, 5, 1)), np.tile([0.0, 1.0], (1, 7, 1))
    assert m.routing_distance(left, right) == 2.0


def test_interventions_have_the_sign_of_their_definition() -> None:
    assert m.capacity(0.5, 0.4) == pytest.approx(0.1)
    assert m.specialization(0.5, [0.2, 0.4]) == pytest.approx(0.2)
    assert m.capacity_bpb(1.0, 1.2) == pytest.approx(0.2)
    assert m.specialization_bpb(1.0, [1.2, 1.4]) == pytest.approx(0.3)
    assert m.drop_top(0.5, 0.3) == pytest.approx(-0.2)
    assert m.least_used([[3, 1, 1], [0, 5, 0]]).tolist() == [1, 0]


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        (lambda: m.in_range("load_balance", 2.1, 0.0, 2.0), "outside its range"),
        (lambda: m.in_range("x", float("nan")), "outside its range"),
        (lambda: m.load_balance(np.full((1, 4, 1), 7), 4), "expert index"),
        (lambda: m.load_balance(np.full((1, 4, 1), -2), 4), "expert index"),
        (lambda: m.load_balance(np.full((1, 4, 1), -1), 4), "not all zero"),
        (lambda: m.load_balance(np.zeros((1, 4, 1)), 4), "integers"),
        (lambda: m.capacity(50.0, 40.0), "outside its range"),  # per cent instead of fractions
        (lambda: m.expert_weight_entropy(np.array([[[0.5, -0.1]]])), "not negative"),
    ],
)
def test_what_cannot_be_true_is_refused(call, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        call()


def test_streams_give_the_values_of_whole_arrays() -> None:
    scores, indices, weights = routings()
    mask = np.random.default_rng(3).random(400) < 0.8
    totals = RoutingTotals(3, 16)
    for start in range(0, 400, 37):
        part = slice(start, start + 37)
        for layer in range(3):
            totals.update(
                layer,
                indices[layer, part],
                weights_Tk=weights[layer, part],
                scores_TN=scores[layer, part],
                mask_T=mask[part],
            )
    assert totals.load_balance_L() == pytest.approx(m.load_balance_L(indices, 16, mask))
    assert totals.collaboration_L() == pytest.approx(m.collaboration_L(indices, 16, mask))
    assert totals.expert_allocation_entropy_L() == pytest.approx(m.expert_allocation_entropy_L(indices, 16, mask))
    assert totals.expert_weight_entropy_L() == pytest.approx(m.expert_weight_entropy_L(weights, None, mask))
    assert totals.router_margin_L() == pytest.approx(m.router_margin_L(scores, mask))
    assert totals.expert_coactivation() == pytest.approx(m.expert_coactivation(indices, 16, mask))
    distance = m.distribution_distance_L(totals.distribution_LN(), totals.distribution_LN())
    assert distance == pytest.approx(0.0)
