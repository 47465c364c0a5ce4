"""Settings of released routers that no transformers block has, against plain loops over tokens."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from jobs.moe import build_block
from jobs.moe.balance import z_loss
from tests.integration.test_parity_algorithms import B, D, K, N, S, Weights, best, compare, make, swiglu

TOKENS = B * S


def capped(chosen: list[list[int]], most: int) -> list[list[bool]]:
    """Return which choices are kept, first choices of all tokens before second ones."""
    taken = [0] * N
    kept = [[False] * len(one) for one in chosen]
    for slot in range(len(chosen[0])):
        for token, ids in enumerate(chosen):
            kept[token][slot] = taken[ids[slot]] < most
            taken[ids[slot]] += 1
    return kept


@pytest.mark.parametrize(("mode", "most"), [("train", 2 * math.ceil(TOKENS / N)), ("eval", math.ceil(0.15 * TOKENS))])
def test_torchscale_drops_what_is_above_capacity_and_renormalises_what_is_kept(mode: str, most: int) -> None:
    block: Any = make(
        preset="xmoe",
        variant="torchscale",
        parameters={"rank": 5},
        renormalise=True,
        top_k=2,
        overflow="capacity",
        overflow_parameters={"factor": 2.0, "eval_fraction": 0.15, "group": "batch"},
        renormalise_kept=True,
    ).train(mode == "train")
    assert block.router.projection.shape == (5, D)
    assert block.router.embeddings.shape == (N, 5)
    seen: list[list[int]] = []
    x = torch.randn(TOKENS, D, generator=torch.Generator().manual_seed(5))

    def scores(token: Tensor, w: Weights) -> Tensor:
        unit = F.normalize(w["router.embeddings"], dim=1)
        return (unit @ (w["router.projection"] @ token)).softmax(-1)

    weights = {name: tensor.detach().clone() for name, tensor in block.named_weights().items()}
    seen = [best(scores(token, weights), 2) for token in x]
    kept = capped(seen, most)
    assert not all(all(one) for one in kept)
    turn = iter(range(TOKENS))

    def reference(token: Tensor, w: Weights) -> Tensor:
        number = next(turn)
        s = scores(token, w)
        chosen = [id_ for id_, stays in zip(seen[number], kept[number], strict=True) if stays]
        total = sum((s[i] for i in chosen), torch.zeros(())).clamp_min(torch.finfo(torch.float32).eps)
        return sum((s[i] / total * swiglu(token, w, i) for i in chosen), torch.zeros(D) + 0 * token)

    y, routing = block(x.view(B, S, D))
    expected = torch.stack([reference(token, weights) for token in x])
    torch.testing.assert_close(y.detach().view(-1, D), expected, atol=1e-5, rtol=1e-5)
    assert int(routing.counts.sum()) == sum(map(sum, kept)) < TOKENS * 2
    assert routing.asked is not None
    assert torch.equal(routing.asked, torch.tensor(seen))


@pytest.mark.parametrize("variant", ["paper", "reference", "mixtral"])
def test_moepp_brings_logits_to_one_standard_deviation(variant: str) -> None:
    target = 1.7
    scale = K if variant == "reference" else 1

    def reference(x: Tensor, w: Weights) -> Tensor:
        logits = w["router.weight"] @ x
        p = (logits / (logits.std() / target)).softmax(-1)
        chosen = best(p, K)
        gates = {i: torch.zeros(()) if variant == "reference" and i == N else p[i] for i in chosen}
        total = sum(gates.values()) if variant != "paper" else 1.0
        return sum((g / total * swiglu(scale * x, w, i) for i, g in gates.items() if i < N), torch.zeros(()) * x)

    block = make(
        preset="moepp", variant=variant, constant_experts=0, copy_experts=0, gating_residual=False, logit_std=target
    )
    compare(block, reference)


def test_molm_takes_its_losses_behind_the_temperature() -> None:
    block: Any = make(preset="olmoe", gate="cosine", gate_parameters={"rank": 6})

    def logits(x: Tensor, w: Weights) -> Tensor:
        z, e = w["router.gate.projection"] @ x, w["router.gate.embeddings"]
        return (e / e.norm(dim=1, keepdim=True)) @ (z / z.norm()) * w["router.gate.temperature"].exp()

    def reference(x: Tensor, w: Weights) -> Tensor:
        p = logits(x, w).softmax(-1)
        return sum((p[i] * swiglu(x, w, i) for i in best(p, K)), torch.zeros(()))

    compare(block, reference)
    x = torch.randn(1, S, D)
    weights = dict(block.named_weights())
    expected = [torch.exp(logits(token, weights)).sum().log().item() ** 2 for token in x[0]]
    assert z_loss(block(x)[1]).item() == pytest.approx(sum(expected) / S, rel=1e-5)


@pytest.mark.parametrize("after", [False, True])
def test_the_z_loss_is_taken_before_or_behind_a_temperature(after: bool) -> None:
    fields = {"preset": "xmoe", "variant": "libmoe_lm", "num_experts": N, "top_k": 2, "z_after_temperature": after}
    block: Any = build_block(fields, hidden_size=D)
    _, routing = block(torch.randn(B, S, D))
    logits = routing.logits.double() / (0.3 if after else 1.0)
    expected = torch.exp(logits).sum(-1).log().square().mean()
    assert z_loss(routing).item() == pytest.approx(expected.item(), rel=1e-5)
