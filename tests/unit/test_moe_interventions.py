"""Interventions: exact effect on the chosen experts and weights, none left behind."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from jobs.models.building import build_model
from jobs.models.weights import canonical_state, load_canonical
from jobs.moe import build_block
from jobs.moe.collaboration import collaboration_lists, set_collaboration
from jobs.moe.interventions import c2r, dropped, pruned, random_routing, temperature
from jobs.moe.selection import top_k
from jobs.train.collaboration import profile_collaboration
from orchestrator.errors import MoegridError
from orchestrator.spec.model import ModelSpec, MoESpec

D, N, K = 12, 8, 2
X = torch.randn(2, 40, D, generator=torch.Generator().manual_seed(0))


def block_of(**fields: object) -> torch.nn.Module:
    torch.manual_seed(0)
    spec = {"hidden_size": D, "num_experts": N, "top_k": K, "expert_width": 8, "router_init_std": 1.0}
    return build_block({**spec, **fields})


@pytest.mark.parametrize("preset", ["smoe", "aux_free", "xmoe", "moepp", "tc_moe", "expert_choice", "deepseek_moe"])
def test_a_removed_expert_serves_no_token_and_comes_back(preset: str) -> None:
    block = block_of(preset=preset)
    before = block(X)[1]
    expert = int(before.expert_counts().argmax())
    if hasattr(block.router, "bias"):
        block.router.bias[expert] = 100.0  # not even the balancing bias may bring it back
    with pruned(block, {0: expert}):
        _, routing = block(X)
    assert (routing.expert_indices() != expert).all()
    assert int(routing.expert_counts()[expert]) == 0
    assert torch.isfinite(routing.weights).all()
    if preset in ("smoe", "aux_free"):
        torch.testing.assert_close(routing.weights.sum(-1), torch.ones(80))
    if hasattr(block.router, "bias"):
        block.router.bias[expert] = 0.0
    after = block(X)[1]
    assert torch.equal(after.indices, before.indices)


def test_pruning_all_but_one_expert_leaves_one_slot() -> None:
    block = block_of()
    with pruned(block, {0: list(range(1, N))}):
        _, routing = block(X)
    assert (routing.indices[:, 0] == 0).all()
    assert (routing.indices[:, 1] == -1).all()
    torch.testing.assert_close(routing.weights[:, 0], torch.ones(80))
    assert int(routing.counts.sum()) == 80


def test_random_routing_keeps_weights_in_rank_order_and_is_uniform() -> None:
    block = block_of()
    x = torch.randn(1, 8000, D)
    plain = block(x)[1]
    with random_routing(block, 5):
        first = block(x)[1]
        again = block(x)[1]
    with random_routing(block, 6):
        other = block(x)[1]
    assert torch.equal(first.indices, again.indices)
    assert not torch.equal(first.indices, other.indices)
    assert torch.equal(first.weights, plain.weights)
    assert (first.indices[:, 0] != first.indices[:, 1]).all()
    share = first.counts / first.counts.sum()
    assert (share - 1 / N).abs().max() < 0.01
    pairs = torch.bincount(first.indices[:, 0] * N + first.indices[:, 1], minlength=N * N).view(N, N)
    expected = 8000 / (N * (N - 1))
    off_diagonal = pairs[~torch.eye(N, dtype=torch.bool)]
    assert (off_diagonal - expected).abs().max() < 6 * expected**0.5


@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize("renormalise", [True, False])
def test_dropping_the_best_serves_the_next_ranks_with_their_own_scores(n: int, renormalise: bool) -> None:
    block = block_of(renormalise=renormalise)
    ranked = torch.sort(block(X)[1].scores, dim=-1, descending=True)
    with dropped(block, n):
        _, routing = block(X)
    assert torch.equal(routing.indices, ranked.indices[:, n : n + K])
    weights = ranked.values[:, n : n + K]
    torch.testing.assert_close(routing.weights, weights / weights.sum(-1, keepdim=True) if renormalise else weights)


def test_dropping_more_than_there_are_is_refused() -> None:
    with pytest.raises(MoegridError, match="cannot drop"), dropped(block_of(), N - 1):
        pass
    with pytest.raises(MoegridError, match="needs token choice"), dropped(block_of(preset="expert_choice"), 1):
        pass
    for block in (
        block_of(preset="deepseek_moe", variant="v3", n_group=4, topk_group=1),
        block_of(preset="c2r", collaboration_top=1),
    ):
        with pytest.raises(MoegridError, match="exceeds the 2 experts of a choice"), dropped(block, 1):
            pass


def test_nested_interventions_add_up_and_leave_nothing_behind() -> None:
    block = block_of()
    plain = block(X)[1]
    with pruned(block, {0: 1}), pruned(block, {0: [2, 3]}), random_routing(block, 0):
        indices = block(X)[1].indices
    assert not torch.isin(indices, torch.tensor([1, 2, 3])).any()
    assert torch.isin(torch.tensor([0, 4, 5, 6, 7]), indices).all()
    with temperature(block, 2.0), temperature(block, 5.0):
        torch.testing.assert_close(block(X)[1].logits, plain.logits / 10)
    with dropped(block, 1), dropped(block, 1):
        twice = block(X)[1].indices
    with dropped(block, 2):
        assert torch.equal(block(X)[1].indices, twice)
    assert torch.equal(block(X)[1].indices, plain.indices)
    half, other = ({0: list(ids)} for ids in (range(4), range(4, N)))
    with pytest.raises(MoegridError, match="no expert left"), pruned(block, half), pruned(block, other):
        pass


def test_what_is_forbidden_fills_no_slot_however_few_are_left() -> None:
    block: Any = block_of(preset="c2r", collaboration_top=1)
    set_collaboration(block, torch.tensor([[(i + 1) % N] for i in range(N)]))
    with pruned(block, {0: 5}):
        _, routing = block(X)
    alone = routing.indices[:, 0] == 4
    assert alone.any()
    assert (routing.indices[alone, 1] == -1).all()
    assert torch.equal(routing.weights[alone], torch.tensor([1.0, 0.0]).expand(int(alone.sum()), 2))
    block = block_of(preset="deepseek_moe", variant="v2", n_group=4, topk_group=1)
    with pruned(block, {0: 0}):
        indices = block(X)[1].indices
    assert {tuple(row) for row in indices.tolist() if 1 in row} <= {(1, -1)}
    block = block_of(preset="xmoe", variant="libmoe_vlm")
    with pruned(block, {0: range(N - 1)}):
        torch.testing.assert_close(block(X)[1].weights, torch.tensor([1.0, 0.0]).expand(80, 2))


@pytest.mark.parametrize("preset", ["sigma_moe", "sharede_v3", "smoe", "tc_moe"])
def test_a_low_temperature_changes_no_choice_by_rounding(preset: str) -> None:
    block: Any = block_of(preset=preset)
    block.load_named({"router.weight": 8 * block.named_weights()["router.weight"]})
    x = X.double()
    h = (x @ block.router.weight.double().t()).view(-1, block.router.num_ids) / 0.05
    expected = top_k(h - block.router.offset if preset == "tc_moe" else h, K)
    with temperature(block, 0.05):
        assert torch.equal(block(X)[1].indices, expected)


@pytest.mark.parametrize("group_score", ["max", "top2_sum"])
@pytest.mark.parametrize("n_group", [1, 2, 4])
@pytest.mark.parametrize("removed", [[0], [2, 3], [1, 4]])
def test_a_group_is_judged_by_the_experts_that_are_left(group_score: str, n_group: int, removed: list[int]) -> None:
    fields = {"n_group": n_group, "topk_group": (n_group + 1) // 2, "group_score": group_score}
    block = block_of(preset="deepseek_moe", variant="v3", **fields)
    block.router.bias += torch.linspace(-0.2, 0.2, N)
    with pruned(block, {0: removed}):
        _, routing = block(X)
    size = N // n_group
    for token, h in enumerate(X.view(-1, D) @ block.router.weight.detach().t()):
        values = {i: float(torch.sigmoid(h[i]) + block.router.bias[i]) for i in range(N) if i not in removed}
        groups = [[i for i in range(g * size, (g + 1) * size) if i in values] for g in range(n_group)]
        best = [sorted((values[i] for i in group), reverse=True) for group in groups]
        number = 1 if group_score == "max" or n_group == 1 else 2
        strengths = [sum(v[:number]) / len(v[:number]) if v else float("-inf") for v in best]
        kept = sorted(range(n_group), key=lambda g: -strengths[g])[: (n_group + 1) // 2]
        allowed = sorted((i for g in kept for i in groups[g]), key=lambda i: -values[i])[:K]
        assert [i for i in routing.indices[token].tolist() if i >= 0] == allowed
    served = set(routing.indices.unique().tolist()) - {-1}
    assert served == set(range(N)) - set(removed)


def test_random_routing_of_signed_experts_takes_distinct_ones() -> None:
    block = block_of(preset="tc_moe")
    x = torch.randn(1, 4000, D)
    with random_routing(block, 3):
        routing = block(x)[1]
    experts = routing.expert_indices()
    assert ((experts[:, 0] != experts[:, 1]) | (experts[:, 0] < 0)).all()
    share = routing.counts / routing.counts.sum()
    assert (share[:N] - share[N : 2 * N]).abs().max() < 0.02


@pytest.mark.parametrize(
    "lists, reason",
    [
        ([[i] for i in range(N)], "its own expert"),
        ([[(i + 1) % N, (i + 1) % N] for i in range(N)], "or one twice"),
        ([[9]] * N, "not there"),
        ([0] * N, r"\[N,T\] integers"),
    ],
)
def test_collaboration_lists_that_mean_nothing_are_refused(lists: list[object], reason: str) -> None:
    block = block_of()
    with pytest.raises(MoegridError, match=reason), c2r(block, {0: torch.tensor(lists)}):
        pass
    with pytest.raises(MoegridError, match="no MoE layer 3"), c2r(block, {3: torch.tensor(lists)}):
        pass


def test_arguments_that_mean_nothing_are_refused() -> None:
    block = block_of()
    for intervention in (
        lambda: dropped(block, -1),
        lambda: random_routing(block, 2**45),
        lambda: pruned(block, {0: [1.5]}),  # type: ignore[list-item]
        lambda: temperature(block_of(preset="dense"), 2.0),
    ):
        with pytest.raises(MoegridError), intervention():
            pass


@pytest.mark.parametrize("tau", [0.1, 10.0])
def test_temperature_divides_the_logits(tau: float) -> None:
    for preset, function in (("smoe", lambda h: h.softmax(-1)), ("sigma_moe", torch.sigmoid)):
        block = block_of(preset=preset)
        h = block(X)[1].logits
        with temperature(block, tau):
            _, routing = block(X)
        torch.testing.assert_close(routing.scores, function(h / tau))
    block = block_of(preset="tc_moe")
    h = block(X)[1].logits
    with temperature(block, tau):
        _, routing = block(X)
    torch.testing.assert_close(routing.scores, (h / tau - block.router.offset).softmax(-1))


def test_c2r_lists_come_from_coactivation_and_limit_the_partners() -> None:
    block = block_of(top_k=3)
    indices = block(X)[1].indices
    indices[5] = -1
    together = torch.zeros(N, N)
    for row in indices.tolist():
        for i in row:
            for j in row:
                if i != j and i >= 0:
                    together[i, j] += 1
    lists = collaboration_lists(indices, N, 3)
    for i in range(N):
        ranked = sorted((j for j in range(N) if j != i), key=lambda j: (-together[i, j].item(), j))
        assert lists[i].tolist() == ranked[:3]
    plain = block(X)[1]
    with c2r(block, {0: lists}):
        _, routing = block(X)
    assert torch.equal(routing.indices[:, 0], plain.indices[:, 0])
    for first, *others in routing.indices.tolist():
        assert set(others) <= set(lists[first].tolist())
    assert torch.equal(block(X)[1].indices, plain.indices)
    with pytest.raises(MoegridError, match="collaboration lists"), c2r(block, {0: lists[:, :1]}):
        pass


def test_profiled_lists_limit_the_model_and_travel_with_its_weights() -> None:
    moe = MoESpec(preset="c2r", num_experts=N, top_k=3, expert_width=8, collaboration_top=3, router_init_std=1.0)
    spec = ModelSpec(hidden_size=D, num_layers=2, num_heads=2, num_kv_heads=2, init_std=0.3, moe=moe)
    torch.manual_seed(0)
    model = build_model(spec, 50)
    ids = torch.randint(0, 50, (3, 20))
    free = model(ids).routings
    profile_collaboration(model, [(ids, torch.ones_like(ids), None)])
    assert model.training
    lists = collaboration_lists(free[0].indices, N, 3)
    assert torch.equal(model.moe_blocks[0].router.allowed.nonzero()[:, 1].view(N, 3), lists.sort(1).values)
    for layer, routing in enumerate(model(ids).routings):
        allowed = model.moe_blocks[layer].router.allowed
        first, others = routing.indices[:, :1], routing.indices[:, 1:]
        assert allowed[first.expand_as(others), others].all()
    other = build_model(spec, 50)
    load_canonical(other, canonical_state(model))
    assert torch.equal(other(ids).logits, model(ids).logits)


def test_interventions_nest_and_end_after_an_error() -> None:
    block = block_of()
    plain = block(X)[1]
    records = []

    def fail_inside() -> None:
        with temperature(block, 10.0), pruned(block, {0: 3}):
            records.append(block(X)[1])
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail_inside()
    assert int(records[0].counts[3]) == 0
    assert records[0].scores.std() < plain.scores.std()
    assert torch.equal(block(X)[1].indices, plain.indices)


@pytest.mark.parametrize("k", [1, 2, 4, 6, 8])
def test_ties_go_to_the_lower_expert(k: int) -> None:
    values = torch.tensor([[1.0, 3, 3, 2, 3, 2, 0, 0], [0.5] * 8, [2.0, 1, 1, 1, 1, 1, 1, 3]])
    expected = [[1, 2, 4, 3, 5, 0, 6, 7], [0, 1, 2, 3, 4, 5, 6, 7], [7, 0, 1, 2, 3, 4, 5, 6]]
    assert top_k(values, k).tolist() == [row[:k] for row in expected]


def test_top_k_never_repeats_an_id_when_few_are_finite() -> None:
    values = torch.full((2, 6), float("-inf"))
    values[0, 3] = 1.0
    assert top_k(values, 3).tolist() == [[3, 0, 1], [0, 1, 2]]


def test_zero_weights_route_every_token_to_the_first_experts() -> None:
    block = block_of()
    block.load_named({"router.weight": torch.zeros(N, D)})
    assert (block(X)[1].indices == torch.arange(K)).all()


def test_expert_dropout_touches_routed_outputs_in_training_only() -> None:
    block: Any = block_of(shared_experts=1)
    shared = block.shared(X)
    full = block(X)[0]
    block.expert_dropout = 0.5
    assert torch.equal(block.eval()(X)[0], full)
    torch.manual_seed(3)
    routed = (block.train()(X)[0] - shared).view(-1)
    reference = (full - shared).view(-1)
    kept = (routed - 2 * reference).abs() < 1e-5
    gone = routed.abs() < 1e-6
    assert (kept | gone).all()
    assert 0.4 < gone.float().mean() < 0.6


def test_named_weights_round_trip_and_wrong_names_are_refused() -> None:
    block, other = block_of(shared_experts=1), block_of(shared_experts=1)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(1.0)
    other.load_named({name: tensor.clone() for name, tensor in block.named_weights().items()})
    assert torch.equal(other(X)[0], block(X)[0])
    assert list(block.named_weights()) == [
        "router.weight", "experts.gate", "experts.up", "experts.down", "shared.gate", "shared.up", "shared.down",
    ]  # fmt: skip
    assert block.named_weights()["experts.down"].shape == (N, D, 8)
    with pytest.raises(MoegridError, match="no weight"):
        block.load_named({"router.wieght": torch.zeros(N, D)})
    with pytest.raises(MoegridError, match="expected"):
        block.load_named({"router.weight": torch.zeros(D, N)})


def test_spans_are_demanded_where_they_are_needed() -> None:
    with pytest.raises(MoegridError, match="span ids"):
        block_of(unit="word")(X)
