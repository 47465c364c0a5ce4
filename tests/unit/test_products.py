"""Products by oneDNN where MKL is slower: the same numbers, the same bits each time, and the choice is recorded."""

from __future__ import annotations

import sys
from functools import cache

import pytest
import torch
import torch.nn.functional as F

from jobs.models.loss import _pieces, linear_cross_entropy
from jobs.moe import pieces
from jobs.moe.experts import Experts, SharedExperts
from jobs.moe.products import Linear, linear
from jobs.moe.slices import FEWEST, filled_up
from jobs.node import machine, numerics
from orchestrator.errors import NumericsError
from orchestrator.spec.cell import Execution, Resources

here = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")


@pytest.fixture
def chosen(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Let oneDNN be chosen on any CPU; returns the shapes that it is given."""
    given: list[tuple[int, ...]] = []
    call = torch.ops.mkldnn._linear_pointwise

    class Counted:
        @staticmethod
        def _linear_pointwise(x: torch.Tensor, w: torch.Tensor, *rest: object) -> torch.Tensor:
            given.append((*x.shape, len(w)))
            y: torch.Tensor = call(x, w, *rest)
            return y

    monkeypatch.setattr(machine, "has_fast_products", lambda: True)
    monkeypatch.setattr(torch.ops, "mkldnn", Counted)
    # TorchScript calls the operator itself.
    monkeypatch.setattr(pieces, "forward", pieces.plain_forward)
    monkeypatch.setattr(pieces, "backward", pieces.plain_backward)
    return given


@here
def test_a_linear_layer_and_its_gradients_are_those_of_fp64(chosen: list[tuple[int, ...]]) -> None:
    torch.manual_seed(0)
    layer = Linear(48, 80)
    x, d_y = torch.randn(4, 32, 48, requires_grad=True), torch.randn(4, 32, 80)
    y = layer(x)
    y.backward(d_y)
    assert chosen == [(128, 48, 80), (128, 80, 48), (80, 128, 48)]
    assert x.grad is not None
    assert layer.weight.grad is not None
    assert layer.bias.grad is not None
    flat, d_flat = x.detach().double().flatten(0, 1), d_y.double().flatten(0, 1)
    weight = layer.weight.detach().double()
    torch.testing.assert_close(y.flatten(0, 1).double(), flat @ weight.T + layer.bias.double(), rtol=0, atol=1e-5)
    torch.testing.assert_close(x.grad.flatten(0, 1).double(), d_flat @ weight, rtol=0, atol=1e-5)
    torch.testing.assert_close(layer.weight.grad.double(), d_flat.T @ flat, rtol=0, atol=1e-4)
    torch.testing.assert_close(layer.bias.grad.double(), d_flat.sum(0), rtol=0, atol=1e-5)


@here
def test_gradients_of_gradients_are_refused_not_wrong(chosen: list[tuple[int, ...]]) -> None:
    x, weight = torch.randn(64, 8, requires_grad=True), torch.randn(8, 8, requires_grad=True)
    (d_x,) = torch.autograd.grad(linear(x, weight).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        d_x.square().sum().backward()
    assert chosen


@here
def test_bits_depend_on_neither_alignment_nor_what_ran_before(chosen: list[tuple[int, ...]]) -> None:
    torch.manual_seed(0)
    x, weight, memory = torch.randn(64, 96), torch.randn(192, 96), torch.empty(64 * 96 + 32)
    first = linear(x, weight)
    for offset in (0, 1, 3, 8, 17):
        linear(torch.randn(128, 96), weight)
        moved = memory[offset : offset + x.numel()].view_as(x).copy_(x)
        assert torch.equal(linear(moved, weight), first)
    assert chosen


@here
def test_numbers_of_rows_that_may_be_any_and_other_types_are_left_to_mkl(chosen: list[tuple[int, ...]]) -> None:
    weight = torch.randn(8, 16)
    for x in (torch.randn(63, 16), torch.randn(0, 16), torch.randn(1, 1, 16)):
        assert torch.equal(linear(x, weight), F.linear(x, weight))
    linear(torch.randn(64, 16).double(), weight.double())
    linear(torch.randn(64, 16).bfloat16(), weight.bfloat16())
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(torch.randn(64, 16), weight).dtype is torch.bfloat16
    assert not chosen


@here
@pytest.mark.parametrize("form", ["swiglu", "relu_mlp"])
def test_experts_with_runs_filled_up_are_those_of_single_products(form: str, chosen: list[tuple[int, ...]]) -> None:
    torch.manual_seed(0)
    tokens, experts = 640, Experts(4, 16, 8, form)
    experts.reset_parameters(0.3)
    # Expert 2 has no token, the others different numbers; some slots are empty.
    indices = torch.stack([torch.arange(tokens) % 2, torch.full((tokens,), 3)], 1)
    indices[5::7, 1] = -1
    weights = torch.rand(tokens, 2, requires_grad=True)
    x, d_y = torch.randn(tokens, 16, requires_grad=True), torch.randn(tokens, 16)
    inputs = (x, weights, experts.up, experts.down)
    assert (indices >= 0).sum() >= FEWEST * 4
    found = experts(x, indices, weights, "slices")
    gradients = torch.autograd.grad(found, inputs, d_y)
    assert len(chosen) == 3 * 6, "of three experts: two products, and two for each in the backward pass"
    again = experts(x, indices, weights, "slices")
    assert torch.equal(again, found)
    reference = experts(x, indices, weights, "loop")
    torch.testing.assert_close(found, reference, rtol=0, atol=1e-5)
    for own, other in zip(gradients, torch.autograd.grad(reference, inputs, d_y), strict=True):
        torch.testing.assert_close(own, other, rtol=0, atol=2e-4)


@here
def test_shared_experts_and_so_dense_blocks_take_the_same_products(chosen: list[tuple[int, ...]]) -> None:
    torch.manual_seed(0)
    shared = SharedExperts(2, 16, 24, "swiglu")
    shared.reset_parameters(0.3)
    x = torch.randn(128, 16)
    y = shared(x)
    assert chosen == [(128, 16, 48), (128, 16, 48), (128, 48, 16)]
    gate, up, down = (weight.detach().double() for weight in (shared.gate, shared.up, shared.down))
    expected = (F.silu(x.double() @ gate.T) * (x.double() @ up.T)) @ down.T
    torch.testing.assert_close(y.double(), expected, rtol=0, atol=1e-5)


@here
@pytest.mark.parametrize("form", ["swiglu", "relu_mlp"])
def test_no_expert_learns_from_a_token_that_it_does_not_have(form: str, chosen: list[tuple[int, ...]]) -> None:
    torch.manual_seed(0)
    tokens, experts = 640, Experts(4, 16, 8, form)
    experts.reset_parameters(0.3)
    # The first token overflows wherever it is multiplied, and has no expert.
    indices = torch.arange(2 * tokens).view(tokens, 2) % 4
    indices[0], indices[1:101, 0] = -1, 3
    x = torch.randn(tokens, 16).index_fill_(0, torch.tensor([0]), 1e30).requires_grad_()
    experts(x, indices, torch.rand(tokens, 2), "slices").sum().backward()
    assert chosen
    for gradient in (x.grad, experts.up.grad, experts.down.grad):
        assert gradient is not None
        assert torch.isfinite(gradient).all()


def test_lengths_are_few_and_little_longer() -> None:
    assert [filled_up(size) for size in (0, 1, 32, 33, 500, 513, 1024, 1025)] == [0, 32, 32, 64, 512, 576, 1024, 1152]
    lengths = {filled_up(size) for size in range(1, 8193)}
    assert len(lengths) == 16 + 8 * 4
    assert all(size <= filled_up(size) < size * 1.126 for size in range(256, 8193))


@here
@pytest.mark.parametrize("labelled", [1.0, 0.4])
def test_the_loss_and_its_gradients_are_those_of_fp64(labelled: float, chosen: list[tuple[int, ...]]) -> None:
    torch.manual_seed(0)
    hidden, head = torch.randn(1, 700, 24, requires_grad=True), torch.randn(50, 24, requires_grad=True)
    labels = torch.randint(0, 50, (1, 700)).masked_fill(torch.rand(1, 700) > labelled, -100)
    loss, tokens = linear_cross_entropy(hidden, head, labels)
    loss.backward()
    assert chosen
    assert int(tokens) == int((labels != -100).sum())
    wide_hidden, wide_head = (x.detach().double().requires_grad_() for x in (hidden, head))
    expected = F.cross_entropy((wide_hidden @ wide_head.T).flatten(0, 1), labels.flatten(), reduction="sum")
    expected.backward()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=0)
    for own, wide in ((hidden, wide_hidden), (head, wide_head)):
        assert own.grad is not None
        assert wide.grad is not None
        torch.testing.assert_close(own.grad.double(), wide.grad, rtol=0, atol=1e-4)


def test_chunks_cover_every_row_once() -> None:
    assert _pieces(2040, 256, 64)[-2:] == [(1792, 192), (1984, 56)]
    for rows in (0, 1, 63, 64, 255, 256, 257, 700):
        for step in (1, 64):
            pieces = _pieces(rows, min(256, rows), step)
            assert [row for start, size in pieces for row in range(start, start + size)] == list(range(rows))


AMD = {"vendor_id": "AuthenticAMD", "flags": "fpu avx2 avx512f"}


@here
@pytest.mark.parametrize(
    ("fields", "branch", "fast"),
    [
        (AMD, "AUTO,STRICT", True),
        (AMD, "AUTO", True),
        (AMD, "COMPATIBLE", False),
        ({**AMD, "flags": "fpu avx2"}, "AUTO,STRICT", False),
        ({**AMD, "vendor_id": "GenuineIntel"}, "AUTO,STRICT", False),
        ({**AMD, "vendor_id": "GenuineIntel"}, "AVX2,STRICT", False),
        ({}, "", False),
    ],
)
def test_onednn_is_taken_where_no_bits_of_other_cpus_are_given_up(
    fields: dict[str, str], branch: str, fast: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "cpu_fields", lambda: fields)
    monkeypatch.setattr(machine, "mkl_branch", lambda: branch)
    monkeypatch.setattr(machine, "_are_faster", machine._are_faster.__wrapped__)
    assert machine.has_fast_products() is fast
    assert machine.facts("cpu")["products"] == ("oneDNN" if fast else "")


@here
def test_who_asks_before_torch_is_imported_does_not_answer_for_later(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "cpu_fields", lambda: AMD)
    monkeypatch.setattr(machine, "mkl_branch", lambda: "AUTO")
    monkeypatch.setattr(machine, "_are_faster", cache(machine._are_faster.__wrapped__))
    with monkeypatch.context() as before:
        before.delitem(sys.modules, "torch")
        assert not machine.has_fast_products()
    assert machine.has_fast_products()


def test_a_state_made_with_other_products_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {}
    for fast in (True, False):
        monkeypatch.setattr(machine, "has_fast_products", lambda fast=fast: fast)
        found[fast] = numerics.record(Execution(), Resources(), 1)
    with pytest.raises(NumericsError, match="products none -> oneDNN"):
        numerics.refuse_other({k: v for k, v in found[False].items() if k != "products"}, found[True], "a state")
    numerics.refuse_other({k: v for k, v in found[False].items() if k != "products"}, found[False], "a state")
