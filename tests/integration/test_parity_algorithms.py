"""Every published algorithm against a plain loop over tokens, written from its definition: outputs and gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from jobs.moe import build_block
from jobs.moe.collaboration import set_collaboration
from orchestrator.catalog.routers import ROUTERS

D, W, N, K, B, S = 20, 12, 8, 3, 2, 11
SPEC = {"hidden_size": D, "num_experts": N, "top_k": K, "expert_width": W}
Weights = dict[str, Tensor]


def make(seed: int = 0, **fields: object) -> nn.Module:
    """Return a block whose weights and biases are all far from their initial values."""
    block = build_block({**SPEC, **fields})
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in block.parameters():
            if parameter.dim():
                parameter.normal_(0, 0.4, generator=generator)
        if hasattr(block.router, "bias"):
            block.router.bias.normal_(0, 0.3, generator=generator)
    return block


def compare(block: nn.Module, reference: Callable[[Tensor, Weights], Tensor]) -> None:
    """Run the block and the loop on the same tokens; outputs, input gradients and weight gradients must agree."""
    generator = torch.Generator().manual_seed(5)
    x, target = (torch.randn(B * S, D, generator=generator) for _ in range(2))
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    y, _ = block(ours.view(B, S, D))
    (y.view(-1, D) * target).sum().backward()
    copies = {name: tensor.detach().clone() for name, tensor in block.named_weights().items()}
    copies = {name: t.requires_grad_() if t.is_floating_point() else t for name, t in copies.items()}
    expected = torch.stack([reference(token, copies) for token in theirs])
    (expected * target).sum().backward()
    torch.testing.assert_close(y.view(-1, D), expected, atol=1e-5, rtol=1e-5)
    assert ours.grad is not None
    assert theirs.grad is not None
    scale = theirs.grad.abs().max().clamp_min(1.0)
    torch.testing.assert_close(ours.grad / scale, theirs.grad / scale, atol=1e-5, rtol=0)
    gradients = {name: p.grad for name, p in block.named_parameters()}
    if "experts.gate" in copies:
        fused = gradients.pop("experts.up")
        gradients["experts.gate"], gradients["experts.up"] = fused[:, :W], fused[:, W:]
    for name, gradient in gradients.items():
        expected_gradient = copies[name].grad
        if gradient is None or expected_gradient is None:
            assert all(g is None or not g.any() for g in (gradient, expected_gradient)), name
            continue
        scale = expected_gradient.abs().max().clamp_min(1.0)
        torch.testing.assert_close(gradient / scale, expected_gradient / scale, atol=1e-5, rtol=0, msg=name)


def swiglu(x: Tensor, w: Weights, e: int) -> Tensor:
    return (F.silu(w["experts.gate"][e] @ x) * (w["experts.up"][e] @ x)) @ w["experts.down"][e].T


def shared(x: Tensor, w: Weights) -> Tensor:
    return w["shared.down"] @ (F.silu(w["shared.gate"] @ x) * (w["shared.up"] @ x))


def best(values: Tensor, k: int) -> list[int]:
    """Return the ids of the k largest values, ties to the lower id."""
    return sorted(range(len(values)), key=lambda i: (-values[i].item(), i))[:k]


def mixture(x: Tensor, w: Weights, scores: Tensor, chosen: list[int], renormalise: bool) -> Tensor:
    total = sum(scores[i] for i in chosen) if renormalise else 1.0
    return sum((scores[i] / total * swiglu(x, w, i) for i in chosen), torch.zeros(()))


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("renormalise", [True, False])
def test_token_choice(score: str, renormalise: bool) -> None:
    function = torch.sigmoid if score == "sigmoid" else lambda h: h.softmax(-1)

    def reference(x: Tensor, w: Weights) -> Tensor:
        s = function(w["router.weight"] @ x)
        return mixture(x, w, s, best(s, K), renormalise)

    compare(make(preset="smoe", score=score, renormalise=renormalise), reference)


@pytest.mark.parametrize("variant", ["original", "libmoe"])
def test_sigma_moe_with_relu_experts(variant: str) -> None:
    def reference(x: Tensor, w: Weights) -> Tensor:
        s = torch.sigmoid(w["router.weight"] @ x)
        chosen = best(s, K)
        total = sum(s[i] for i in chosen) if variant == "libmoe" else 1.0
        return sum(
            (s[i] / total * (w["experts.down"][i] @ F.relu(w["experts.up"][i] @ x)) for i in chosen), torch.zeros(())
        )

    compare(make(preset="sigma_moe", variant=variant, expert="relu_mlp"), reference)


def test_gelu_experts_with_biases() -> None:
    def reference(x: Tensor, w: Weights) -> Tensor:
        s = (w["router.weight"] @ x).softmax(-1)
        chosen = best(s, K)
        total = sum(s[i] for i in chosen)

        def expert(i: int) -> Tensor:
            hidden = F.gelu(w["experts.up"][i] @ x + w["experts.up_bias"][i])
            return w["experts.down"][i] @ hidden + w["experts.down_bias"][i]

        return sum((s[i] / total * expert(i) for i in chosen), torch.zeros(()))

    compare(make(preset="smoe", expert="gelu_mlp_bias"), reference)


@pytest.mark.parametrize("preset", ["sharede_v2", "sharede_v3"])
@pytest.mark.parametrize("combine", ["sum", "weighted"])
def test_shared_experts(preset: str, combine: str) -> None:
    def reference(x: Tensor, w: Weights) -> Tensor:
        h = w["router.weight"] @ x
        s = h.softmax(-1) if preset == "sharede_v2" else torch.sigmoid(h)
        routed = mixture(x, w, s, best(s, K), True)
        if combine == "sum":
            return routed + shared(x, w)
        return routed * K / (K + 2) + shared(x, w) * 2 / (K + 2)

    compare(make(preset=preset, combine=combine), reference)


@pytest.mark.parametrize("variant", ["paper", "torchscale", "libmoe_lm", "libmoe_vlm"])
def test_xmoe(variant: str) -> None:
    def reference(x: Tensor, w: Weights) -> Tensor:
        z, embeddings = w["router.projection"] @ x, w["router.embeddings"]
        if variant != "paper":
            # Held at norm 1.5 by a rescaling that no gradient sees.
            held = embeddings.detach() / embeddings.detach().norm(dim=1, keepdim=True) * 1.5
            embeddings = held + embeddings - embeddings.detach()
        if variant in ("paper", "torchscale"):
            embeddings = embeddings / embeddings.norm(dim=1, keepdim=True)
        if variant != "torchscale":
            z = z / z.norm()
        h = embeddings @ z
        if variant == "paper":
            p = (h / w["router.temperature"]).softmax(-1)
            return mixture(x, w, p, best(p, K), False)
        if variant == "torchscale":
            p = h.softmax(-1)
            return mixture(x, w, p, best(p, K), False)
        p = (h / 0.3).softmax(-1)
        if variant == "libmoe_lm":
            p = p.softmax(-1)
            return mixture(x, w, p, best(p, K), True)
        chosen = best(p, K)
        weights = torch.stack([p[i] for i in chosen]).softmax(-1)
        return sum((weights[j] * swiglu(x, w, i) for j, i in enumerate(chosen)), torch.zeros(()))

    block = make(preset="xmoe", variant=variant)
    assert block.router.projection.shape == (N // 2, D)
    compare(block, reference)


@pytest.mark.parametrize("variant", ["paper", "reference", "mixtral"])
@pytest.mark.parametrize("gating_layers", [1, 2])
def test_moepp(variant: str, gating_layers: int) -> None:
    # ids: N FFN, two constant, one copy, one zero expert
    def reference(x: Tensor, w: Weights) -> Tensor:
        hidden = torch.tanh(w["router.hidden"] @ x) if gating_layers == 2 else x
        p = (w["router.weight"] @ hidden).softmax(-1)
        chosen = best(p, K)
        gates = {i: p[i] for i in chosen}
        if variant == "reference" and N + 3 in gates:
            gates[N + 3] = torch.zeros(())
        if variant != "paper":
            total = sum(gates.values())
            gates = {i: g / total for i, g in gates.items()}
        source = x * K if variant == "reference" else x

        def expert(i: int) -> Tensor:
            if i < N:
                return swiglu(source, w, i)
            if i < N + 2:
                a, b = (w["constant.router"][i - N] @ source).softmax(-1)
                return a * source + b * w["constant.value"][i - N]
            return source if i == N + 2 else torch.zeros_like(source)

        return sum((g * expert(i) for i, g in gates.items()), torch.zeros(()))

    block = make(preset="moepp", variant=variant, gating_layers=gating_layers)
    _, routing = block(torch.randn(4, 60, D))
    assert (routing.counts > 0).all(), "the test must reach every kind of expert"
    compare(block, reference)


def test_moepp_gating_residual_takes_the_summed_logits_of_the_layer_before() -> None:
    first, second = make(0, preset="moepp"), make(1, preset="moepp")
    x = torch.randn(B, S, D)
    y, before = first(x)
    _, after = second(y, previous=before.carried)
    weights = second.named_weights()
    summed = y.view(-1, D) @ weights["router.weight"].T + before.logits @ weights["router.residual"].T
    torch.testing.assert_close(after.logits, summed, atol=1e-5, rtol=1e-5)
    assert after.carried is not None
    torch.testing.assert_close(after.carried, summed, atol=1e-5, rtol=1e-5)


def test_tc_moe_applies_the_sign_and_counts_all_null_probability() -> None:
    nulls = 2

    def reference(x: Tensor, w: Weights) -> Tensor:
        h = w["router.weight"] @ x
        offset = torch.tensor([0.0] * N + [1.0] * N + [10.0] * nulls)
        p = (h - offset).softmax(-1)
        chosen = best(p, K)
        real = [i for i in chosen if i < 2 * N]
        total = sum(p[i] for i in real) + p[2 * N :].sum()
        out = torch.zeros(D)
        for i in real:
            out = out + (1 if i < N else -1) * p[i] / total * swiglu(x, w, i % N)
        return out

    block = make(preset="tc_moe", null_experts=nulls)
    with torch.no_grad():
        block.router.weight[2 * N :] *= 12  # so that null experts are chosen at all
        block.router.weight[:N] *= 0.5
    _, routing = block(torch.randn(4, 60, D))
    positive, negative, null = routing.counts[:N].sum(), routing.counts[N : 2 * N].sum(), routing.counts[2 * N :].sum()
    assert min(positive, negative, null) > 0
    assert routing.expert_counts().sum() == positive + negative
    compare(block, reference)


def test_tc_moe_token_with_null_experts_alone_outputs_zero() -> None:
    block = make(preset="tc_moe", null_experts=K)
    with torch.no_grad():
        block.router.weight[2 * N :] = 50.0
    y, routing = block(torch.rand(1, 5, D))
    assert (routing.expert_indices() == -1).all()
    assert not y.any()


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_aux_free_bias_selects_but_never_weighs(score: str) -> None:
    def reference(x: Tensor, w: Weights) -> Tensor:
        h = w["router.weight"] @ x
        s = torch.sigmoid(h) if score == "sigmoid" else h.softmax(-1)
        return mixture(x, w, s, best(s.detach() + w["router.bias"].detach(), K), True)

    compare(make(preset="aux_free", score=score), reference)


@pytest.mark.parametrize("preset", [preset for preset in ROUTERS.builtins if preset != "dense"])
def test_routers_compute_in_fp32_under_bf16(preset: str) -> None:
    block = make(preset=preset).bfloat16()
    spans = torch.arange(S).expand(B, S) // 3
    x = torch.randn(B, S, D, generator=torch.Generator().manual_seed(2)).bfloat16()
    y, routing = block(x, spans=spans)
    assert y.dtype is torch.bfloat16
    wide = make(preset=preset)
    wide.load_named(block.named_weights())
    _, expected = wide(x.float(), spans=spans)
    for name in ("logits", "scores", "weights"):
        assert getattr(routing, name).dtype is torch.float32
        torch.testing.assert_close(getattr(routing, name), getattr(expected, name), atol=1e-6, rtol=1e-6)
    assert torch.equal(routing.indices, expected.indices)
    assert all(loss.dtype is torch.float32 for loss in routing.losses().values())


def test_aux_free_update_rule() -> None:
    block = make(preset="aux_free")
    counts = torch.tensor([10, 0, 3, 3, 3, 3, 3, 3])  # mean 3.5
    signs = torch.tensor([-1.0, 1, 1, 1, 1, 1, 1, 1])
    for center in (False, True):
        before = block.router.bias.clone()
        block.update_balance_bias(counts, 0.1, center)
        expected = 0.1 * (signs - signs.mean()) if center else 0.1 * signs
        torch.testing.assert_close(block.router.bias - before, expected)


def test_c2r_takes_the_rest_from_the_first_choices_list() -> None:
    generator = torch.Generator().manual_seed(3)
    orders = [torch.randperm(N, generator=generator) for _ in range(N)]
    lists = torch.stack([order[order != i][:4] for i, order in enumerate(orders)])

    def reference(x: Tensor, w: Weights) -> Tensor:
        p = (w["router.weight"] @ x).softmax(-1)
        first = best(p, 1)[0]
        others = sorted(lists[first].tolist(), key=lambda i: (-p[i].item(), i))[: K - 1]
        return mixture(x, w, p, [first, *others], True)

    block: Any = make(preset="c2r", collaboration_top=4)
    set_collaboration(block, lists)
    compare(block, reference)


@pytest.mark.parametrize("group", ["sequence", "batch"])
def test_expert_choice_takes_the_best_tokens_of_a_group(group: str) -> None:
    block = make(preset="expert_choice", choice_group=group)
    x = torch.randn(B, S, D, generator=torch.Generator().manual_seed(5)).requires_grad_()
    y, routing = block(x)
    w = block.named_weights()
    scores = (x @ w["router.weight"].T).softmax(-1)
    groups = [[(b, t) for t in range(S)] for b in range(B)]
    if group == "batch":
        groups = [groups[0] + groups[1]]
    expected = torch.zeros(B, S, D)
    for members in groups:
        capacity = max(1, K * len(members) // N)
        for e in range(N):
            ranked = sorted(range(len(members)), key=lambda i: (-scores[members[i]][e].item(), i))[:capacity]
            for b, t in (members[i] for i in ranked):
                expected[b, t] += scores[b, t, e].detach() * swiglu(x[b, t], w, e).detach()
    torch.testing.assert_close(y, expected, atol=1e-5, rtol=1e-5)
    assert routing.counts.tolist() == [sum(max(1, K * len(m) // N) for m in groups)] * N


@pytest.mark.parametrize("pool", ["causal_mean", "full_mean"])
def test_a_spans_mean_depends_on_its_own_tokens_alone_however_long_the_row_is(pool: str) -> None:
    block = make(preset="word", pool=pool)
    x = torch.randn(1, 3000, D) + 1
    spans = torch.arange(3000).unsqueeze(0) // 3
    whole = block(x, spans=spans)[1].logits
    alone = block(x[:, 2997:], spans=spans[:, 2997:])[1].logits
    torch.testing.assert_close(whole[2997:], alone, atol=1e-6, rtol=1e-6)
    padding = torch.zeros(1, 3000, dtype=torch.bool)
    padding[0, :2] = True
    before = block(x, spans=spans, padding=padding)[1].logits
    x[0, :2] = float("nan")
    assert torch.equal(block(x, spans=spans, padding=padding)[1].logits[2:], before[2:])


@pytest.mark.parametrize("pool", ["first", "causal_mean", "full_mean"])
def test_span_pooling(pool: str) -> None:
    block = make(preset="word", pool=pool)
    x = torch.randn(B, S, D)
    spans = torch.tensor([[0, 0, 0, 1, 2, 2, 3, 3, 3, 3, 4], [5, 6, 6, 6, 6, 6, 6, 7, 7, 7, 8]])
    _, routing = block(x, spans=spans)
    h = x @ block.named_weights()["router.weight"].T
    expected = torch.zeros_like(h)
    for b in range(B):
        for t in range(S):
            members = [u for u in range(S) if spans[b, u] == spans[b, t]]
            if pool == "first":
                members = members[:1]
            elif pool == "causal_mean":
                members = [u for u in members if u <= t]
            expected[b, t] = h[b, members].mean(0)
    torch.testing.assert_close(routing.logits.view_as(h), expected, atol=1e-5, rtol=1e-5)
    if pool != "causal_mean":
        indices = routing.indices.view(B, S, K)
        same = spans[:, 1:] == spans[:, :-1]
        assert (indices[:, 1:] == indices[:, :-1])[same].all()
