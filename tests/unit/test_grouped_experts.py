"""The path of a GPU through experts, norm and rotary positions: the values of the plain one, in few passes."""

from __future__ import annotations

import itertools

import pytest
import torch

from benchmarks.operations import FUSED, kernels_on, measure
from jobs.models.building import build_model
from jobs.models.norm import RMSNorm
from jobs.moe.balance import balance_loss
from jobs.moe.experts import Experts
from jobs.moe.host import hidden
from orchestrator.spec.cell import BalanceSpec
from orchestrator.spec.model import ModelSpec, MoESpec

TOKENS, EXPERTS, K, D, WIDTH = 40, 5, 3, 16, 8


def products(path: str, form: str, empty: bool, frozen: tuple[str, ...], counted: bool) -> dict[str, torch.Tensor]:
    """Return output and gradients of experts of which the last is never chosen."""
    torch.manual_seed(0)
    experts = Experts(EXPERTS, D, WIDTH, form)
    experts.reset_parameters(0.5)
    ids = torch.stack([torch.randperm(EXPERTS - 1)[:K] for _ in range(TOKENS)])
    weights = torch.rand(TOKENS, K)
    if empty:
        ids[::3, 1:], ids[5] = -1, -1
        weights = weights * (ids >= 0)
    given = {"x": torch.randn(TOKENS, D), "weights": weights, "up": experts.up, "down": experts.down}
    for name, tensor in given.items():
        tensor.requires_grad_(name not in frozen)
    counts = torch.bincount(ids.view(-1), minlength=EXPERTS) if counted else None
    y = experts(given["x"], ids, given["weights"], path, counts)
    (y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum().backward()
    found = {name: tensor.grad for name, tensor in given.items() if tensor.grad is not None}
    if empty and "weights" in found:
        found["weights"] = found["weights"] * (ids >= 0)  # nobody reads those of empty slots
    return {"y": y.detach(), **found}


@pytest.mark.parametrize("form", ["swiglu", "relu_mlp"])
@pytest.mark.parametrize("slots", ["full", "counted", "empty"])
def test_grouped_products_have_the_values_and_gradients_of_a_loop(form: str, slots: str) -> None:
    names = ("x", "weights", "up", "down")
    for frozen in itertools.chain.from_iterable(itertools.combinations(names, n) for n in (0, 1, 3)):
        right = products("loop", form, slots == "empty", frozen, False)
        found = products("grouped", form, slots == "empty", frozen, slots == "counted")
        assert found.keys() == right.keys()
        for name, value in right.items():
            torch.testing.assert_close(found[name], value, atol=1e-5, rtol=1e-5)


def test_no_token_gives_nothing_and_a_gradient_of_zeros() -> None:
    experts = Experts(EXPERTS, D, WIDTH, "swiglu")
    experts.reset_parameters(0.5)
    x = torch.randn(4, D, requires_grad=True)
    y = experts(x, torch.full((4, K), -1), torch.zeros(4, K), "grouped")
    y.sum().backward()
    assert x.grad is not None
    assert experts.up.grad is not None
    assert not y.any()
    assert not x.grad.any()
    assert not experts.up.grad.any()
    assert experts(x[:0], torch.zeros(0, K, dtype=torch.long), torch.zeros(0, K), "grouped").shape == (0, D)


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_a_model_has_the_same_loss_and_gradients_on_both_paths(kv_heads: int) -> None:
    moe = MoESpec(top_k=2, num_experts=8, expert_width=16)
    spec = ModelSpec(hidden_size=32, num_layers=2, num_heads=4, num_kv_heads=kv_heads, context=64, moe=moe)
    found = []
    for steps_of_a_gpu in (False, True):
        torch.manual_seed(0)
        model = build_model(spec, 64)
        ids = torch.randint(0, 64, (2, 24))
        if steps_of_a_gpu:
            with hidden():
                output = model(ids, labels=ids)
                loss = output.loss / output.tokens + balance_loss(output.routings, BalanceSpec(aux_coef=0.1))[0]
                loss.backward()
        else:
            output = model(ids, labels=ids)
            loss = output.loss / output.tokens + balance_loss(output.routings, BalanceSpec(aux_coef=0.1))[0]
            loss.backward()
        found.append((loss.detach(), [parameter.grad for parameter in model.parameters()]))
    torch.testing.assert_close(found[1], found[0], atol=1e-6, rtol=1e-4)


def test_a_norm_of_few_bits_is_computed_in_many() -> None:
    torch.manual_seed(0)
    norm = RMSNorm(64, 1e-5)
    torch.nn.init.normal_(norm.weight)
    x = torch.randn(7, 64)
    gradient = torch.randn(7, 64)
    right: list[list[torch.Tensor]] = []
    for dtype in (torch.float64, torch.bfloat16):
        norm.weight.data, norm.weight.grad = norm.weight.data.to(torch.bfloat16).to(dtype), None
        given = x.to(torch.bfloat16).to(dtype).requires_grad_()
        if dtype is torch.float64:
            y = norm.weight * given / (given.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        else:
            with hidden():
                y = norm(given)
        assert y.dtype is dtype
        y.backward(gradient.to(torch.bfloat16).to(dtype))
        assert given.grad is not None
        assert norm.weight.grad is not None
        right.append([y.detach().double(), given.grad.double(), norm.weight.grad.double()])
    for exact, rounded in zip(*right, strict=True):
        # One rounding to 8 bits, of what was computed in 24.
        assert ((exact - rounded).abs() <= exact.abs() * 2**-8 + 1e-4).all()


def test_a_layer_writes_less_often_than_transformers() -> None:
    counts = measure(torch.bfloat16)
    assert counts.theirs.total() > 150
    assert counts.fused <= 0.6 * counts.theirs.total()
    # What is counted as fused is what torch has kernels for, of its CPU's it has none.
    assert kernels_on("CUDA").issuperset(FUSED)
    assert kernels_on("CPU").isdisjoint(FUSED)
    assert "bmm.out" in kernels_on("CPU")
