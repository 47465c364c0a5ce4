"""The load-balance scalings, by hand on small records; their balanced minima; padding never counts."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import Tensor

from jobs.moe.balance import balance_loss, balanced_value, collective, layer_losses, load_balance
from jobs.moe.block import build_block
from jobs.moe.routing import Routing
from orchestrator.catalog.losses import LOAD_VARIANTS
from orchestrator.catalog.routers import ROUTERS
from orchestrator.errors import MoegridError
from orchestrator.spec.cell import BalanceSpec

N, K, B, S, D = 6, 2, 3, 10, 12


def record(seed: int = 0, score: str = "softmax", padding: Tensor | None = None, length: int = S) -> Routing:
    torch.manual_seed(seed)
    fields = {"preset": "smoe", "score": score, "router_init_std": 1.0}
    block = build_block({"hidden_size": D, "num_experts": N, "top_k": K, **fields})
    return block(torch.randn(B, length, D), padding=padding)[1]


def by_hand(routing: Routing, variant: str, group: str) -> float:
    """Compute a scaling with loops over groups, tokens and experts."""
    group = LOAD_VARIANTS[variant] or group
    tokens = [[t for t in range(b * S, (b + 1) * S) if routing.mask[t]] for b in range(B)]
    groups = tokens if group == "sequence" else [[t for members in tokens for t in members]]
    values = []
    for members in groups:
        value = 0.0
        for i in range(N):
            slots = routing.indices[members, :1] if variant == "top1_squared" else routing.indices[members]
            f = (slots == i).sum().item() / len(members)
            s, h = routing.scores[members].double(), routing.logits[members].double()
            if variant == "sigmoid_raw":
                p = s
            elif variant == "sigmoid_normalised":
                p = s / s.sum(-1, keepdim=True)
            else:
                p = h.softmax(-1)
            value += f * p[:, i].mean().item()
        scale = {"paper": 1.0, "olmoe_hf": N, "top1_squared": N}.get(variant, N / K)
        values.append(value * scale)
    return sum(values) / len(values)


PADDING = torch.zeros(B, S, dtype=torch.bool)
PADDING[1, 4:] = True
PADDING[2, :3] = True


@pytest.mark.parametrize("variant", [v for v in LOAD_VARIANTS if v != "heterogeneous"])
@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("padding", [None, PADDING], ids=["full", "padded"])
@pytest.mark.parametrize("group", ["batch", "sequence"])
def test_a_scaling_is_its_formula(variant: str, score: str, padding: Tensor | None, group: str) -> None:
    routing = record(1, score, padding)
    assert load_balance([routing], variant, group).item() == pytest.approx(by_hand(routing, variant, group), rel=1e-5)
    if group == "batch":
        assert routing.losses()[variant].item() == pytest.approx(by_hand(routing, variant, "batch"), rel=1e-5)


def test_layers_are_averaged_and_pooled_layers_are_pooled_first() -> None:
    routings = [record(seed) for seed in range(3)]
    each = [load_balance([r], "switch").item() for r in routings]
    assert load_balance(routings, "switch").item() == pytest.approx(sum(each) / 3, rel=1e-5)
    f = torch.stack([r.counts.float() / (B * S) for r in routings]).mean(0)
    p = torch.stack([r.scores.mean(0) for r in routings]).mean(0)
    assert load_balance(routings, "olmoe_hf").item() == pytest.approx((N * (f * p).sum()).item(), rel=1e-5)
    assert load_balance(routings, "switch", "pooled").item() == pytest.approx((N / K * (f * p).sum()).item(), rel=1e-5)


@pytest.mark.parametrize("variant", ["switch", "top1_squared", "sequence"])
@pytest.mark.parametrize("group", ["batch", "sequence"])
def test_layers_of_other_tokens_are_each_a_mean_over_their_own(variant: str, group: str) -> None:
    """As in a model that sees: an encoder routes patches, a connector fewer tokens, a decoder text as well."""
    routings = [record(0, length=37), record(1, length=9), record(2, padding=PADDING), record(3)]
    each = [load_balance([r], variant, group).item() for r in routings]
    assert load_balance(routings, variant, group).item() == pytest.approx(sum(each) / 4, rel=1e-5)
    assert load_balance(routings[1:], variant, group).item() == pytest.approx(sum(each[1:]) / 3, rel=1e-5)


@pytest.mark.parametrize("variant", ["paper", "switch", "olmoe_hf", "sequence", "sigmoid_normalised", "top1_squared"])
def test_an_even_routing_has_the_balanced_value(variant: str) -> None:
    tokens = N * 4
    indices = torch.stack([(torch.arange(tokens) + j) % N for j in range(K)], dim=1)
    routing = Routing(
        logits=torch.zeros(tokens, N),
        scores=torch.full((tokens, N), 1 / N),
        indices=indices,
        weights=torch.full((tokens, K), 1 / N),
        mask=torch.ones(tokens, dtype=torch.bool),
        counts=torch.bincount(indices.view(-1), minlength=N),
        batch=2,
        top_k=K,
        num_experts=N,
    )
    assert load_balance([routing], variant).item() == pytest.approx(balanced_value(variant, K, N), rel=1e-6)


def test_other_losses_by_hand() -> None:
    routing = record(2, padding=PADDING)
    p = routing.scores[routing.mask].double()
    entropy = lambda q: -(q * q.log()).sum(-1)  # noqa: E731
    losses = layer_losses(routing)
    assert losses["entropy"].item() == pytest.approx(-entropy(p.mean(0)).item(), rel=1e-5)
    information = entropy(p).mean() - entropy(p.mean(0))
    assert losses["mutual_information"].item() == pytest.approx(information.item(), rel=1e-4)
    z = torch.logsumexp(routing.logits[routing.mask].double(), -1).square().mean().item()
    assert losses["z_loss"].item() == pytest.approx(z, rel=1e-5)


def test_heterogeneous_load_loss_weighs_experts_without_ffn_by_tau() -> None:
    block = build_block({"preset": "moepp", "hidden_size": D, "num_experts": N, "top_k": K, "router_init_std": 1})
    _, routing = block(torch.randn(B, S, D))
    f, p = routing.counts / (B * S), routing.scores.mean(0)
    eta = torch.tensor([1.0] * N + [0.75] * 4)
    expected = pytest.approx((eta * f * p).sum().item(), rel=1e-5)
    assert routing.losses()["heterogeneous"].item() == expected
    assert load_balance([routing, routing], "heterogeneous", "pooled").item() == expected


def test_null_reward_is_minus_the_null_probability() -> None:
    block = build_block({"preset": "tc_moe", "null_experts": 3, "hidden_size": D, "num_experts": N, "top_k": K})
    _, routing = block(torch.randn(B, S, D), padding=PADDING)
    expected = -routing.scores[routing.mask][:, 2 * N :].sum(-1).mean().item()
    assert routing.losses()["null_reward"].item() == pytest.approx(expected, rel=1e-5)


def test_balance_loss_adds_coefficient_times_loss() -> None:
    routings = [record(seed) for seed in range(2)]
    spec = BalanceSpec(aux_coef=0.1, aux_variant="paper", z_coef=0.01, entropy_coef=0.2, mutual_information_coef=0.3)
    total, parts = balance_loss(routings, spec)
    expected = 0.1 * parts["aux_loss"] + 0.01 * parts["z_loss"] + 0.2 * parts["entropy_loss"]
    expected += 0.3 * parts["mutual_information_loss"]
    torch.testing.assert_close(total, expected)
    assert total.requires_grad
    silent, parts = balance_loss(routings, BalanceSpec(aux_coef=0.0, z_coef=0.0))
    assert not silent.requires_grad
    assert silent.item() == 0
    assert parts["aux_loss"] > 0, "a loss without a coefficient is still reported"


def test_balance_gradient_evens_the_load() -> None:
    torch.manual_seed(0)
    block = build_block({"preset": "smoe", "hidden_size": D, "num_experts": N, "top_k": K, "router_init_std": 1})
    x = torch.randn(8, 32, D) + 1.0
    optimizer = torch.optim.Adam(block.router.parameters(), lr=0.05)
    losses = []
    for _ in range(60):
        loss, _ = balance_loss([block(x)[1]], BalanceSpec(aux_coef=1.0, z_coef=0.0))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] > 1.2
    assert losses[-1] < 1.05


def test_thresholds_start_with_the_first_batch_then_follow_slowly() -> None:
    fields = {"train_select": "threshold", "eval_select": "threshold", "threshold_decay": 0.9}
    block = build_block({"preset": "expert_choice", "hidden_size": D, "num_experts": N, "top_k": K, **fields})
    x = torch.randn(B, S, D)
    cutoffs = []
    for _ in range(2):
        cutoffs.append(torch.stack([block(x * scale)[1].cutoffs for scale in (1.0, 3.0)]).mean(0))
        block.update_thresholds(cutoffs[-1])
    torch.testing.assert_close(block.router.threshold, 0.9 * cutoffs[0] + 0.1 * cutoffs[1])
    before = block.router.threshold.clone()
    block.eval()
    _, routing = block(x)
    torch.testing.assert_close(block.router.threshold, before, atol=0, rtol=0)
    chosen = routing.scores >= before
    assert routing.counts.tolist() == chosen.sum(0).tolist()
    assert math.isclose(routing.weights.sum().item(), routing.scores[chosen].sum().item(), rel_tol=1e-5)


def test_what_stands_at_padding_reaches_no_loss() -> None:
    torch.manual_seed(0)
    block = build_block({"hidden_size": D, "num_experts": N, "top_k": K, "preset": "smoe", "router_init_std": 1.0})
    padding = torch.zeros(B, S, dtype=torch.bool)
    padding[1, 6:] = True
    x = torch.randn(B, S, D)
    losses = []
    for value in (0.0, float("nan")):
        x[padding] = value
        losses.append(block(x, padding=padding)[1].losses())
    assert losses[0] == losses[1]


def test_a_bias_that_is_not_there_is_not_updated() -> None:
    block = build_block({"hidden_size": D, "num_experts": N, "top_k": K, "preset": "smoe"})
    with pytest.raises(MoegridError, match="no balancing bias"):
        block.update_balance_bias(torch.ones(N), 0.1)


@pytest.mark.parametrize("variant", ["sequence", "sigmoid_raw", "top1_squared", "switch"])
def test_only_a_share_of_the_whole_batch_is_summed_over_ranks(variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    summed: list[Tensor] = []
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "all_reduce", summed.append)
    load_balance([record()], variant, scope="global")
    assert bool(summed) == (variant == "switch")


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (2, 5)], ids=["no row", "no token", "padding alone"])
@pytest.mark.parametrize("preset", [preset for preset in ROUTERS.builtins if preset != "dense"])
def test_without_a_token_every_loss_and_its_gradient_is_zero(preset: str, shape: tuple[int, int]) -> None:
    block = build_block({"preset": preset, "hidden_size": D, "num_experts": N, "top_k": K})
    x = torch.randn(*shape, D, requires_grad=True)
    _, routing = block(x, torch.zeros(shape, dtype=torch.long), torch.ones(shape, dtype=torch.bool))
    routings = [routing]
    if not x.numel():
        routings.append(block(x, torch.zeros(shape, dtype=torch.long))[1])
    for record in routings:
        losses = list(record.losses().values())
        losses += [load_balance([record], v, g) for v in LOAD_VARIANTS for g in ("batch", "sequence", "pooled")]
        assert [loss.item() for loss in losses] == [0.0] * len(losses)
        torch.stack(losses).sum().backward()
    gradients = [p.grad for p in block.parameters() if p.grad is not None]
    assert not any(gradient.any() for gradient in gradients)


def test_a_spare_counts_nothing_in_what_ranks_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    own, other = record(), record(1)
    total = torch.cat([own.counts, torch.tensor([B * S])]).float()
    added: list[Tensor] = []

    def of_two_ranks(value: Tensor) -> None:
        added.append(value.clone())
        value += total

    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "all_reduce", of_two_ranks)
    balance = BalanceSpec(aux_scope="global", aux_coef=1.0, z_coef=0.0)
    for spare in (True, False):
        _, parts = balance_loss([other], balance, spare=spare)
        counts = own.counts + (0 if spare else other.counts)
        f = counts.double() / (B * S * (1 if spare else 2))
        assert parts["aux_loss"].item() == pytest.approx((N / K * (f * other.scores.mean(0)).sum()).item(), rel=1e-5)
    assert not added[0].any()
    assert added[1].flatten()[-1] == B * S
    assert collective(balance)
    assert not collective(dataclasses.replace(balance, aux_group="sequence"))
    assert not collective(dataclasses.replace(balance, aux_variant="sigmoid_raw"))
    assert not collective(BalanceSpec())
