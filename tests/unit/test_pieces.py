"""An expert's piece is the same kernels in the same order, whether TorchScript runs it or Python."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from jobs.moe import pieces
from jobs.moe.experts import Experts

ROWS, WIDTH, INNER = 192, 48, 80


def made(gated: bool) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(3)
    inner = INNER * (1 + gated)

    def normal(*shape: int) -> Tensor:
        return 0.25 * torch.randn(*shape, generator=draw)

    return {
        "x": normal(300, WIDTH),
        "d_out": normal(300, WIDTH),
        "token": torch.randperm(300, generator=draw)[:ROWS],
        "up": normal(inner, WIDTH),
        "down": normal(WIDTH, INNER),
        "weight": torch.rand(ROWS, 1, generator=draw),
    }


def run(forward: Any, backward: Any, given: dict[str, Tensor], gated: bool, fast: bool) -> list[Tensor]:
    """Return all that a piece writes."""
    nothing = given["x"].new_full
    out = nothing((ROWS, WIDTH), torch.nan)
    hidden = nothing((ROWS, len(given["up"])), torch.nan)
    first = (given["x"], given["token"], given["up"], given["down"], given["weight"])
    hidden = forward(*first, hidden, out, gated, fast)
    d_weight = nothing((ROWS, 1), torch.nan)
    d_down, d_up = torch.full_like(given["down"], torch.nan), torch.full_like(given["up"], torch.nan)
    d_x = torch.full_like(out, torch.nan)
    backward(given["x"], given["d_out"], *first[1:], hidden, d_weight, d_down, d_up, d_x, gated, fast)
    return [out, hidden, d_weight, d_down, d_up, d_x]


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("gated", [True, False])
def test_a_scripted_piece_has_the_bits_of_the_plain_one_and_the_numbers_of_fp64(gated: bool, fast: bool) -> None:
    if fast and not torch.backends.mkldnn.is_available():
        pytest.skip("this torch has no oneDNN")
    given = made(gated)
    plain = run(pieces.plain_forward, pieces.plain_backward, given, gated, fast)
    for _ in range(4):  # TorchScript looks at the first runs, and may run later ones in another way
        scripted = run(pieces.forward, pieces.backward, given, gated, fast)
        assert all(torch.equal(a, b) for a, b in zip(scripted, plain, strict=True))
    wide = {name: value.double() if value.is_floating_point() else value for name, value in given.items()}
    leaves = {name: wide[name].requires_grad_() for name in ("x", "up", "down", "weight")}
    x = leaves["x"][wide["token"]]
    hidden = x @ leaves["up"].t()
    gate, up = (hidden[:, :INNER], hidden[:, INNER:]) if gated else (hidden, None)
    a = torch.relu(hidden) if up is None else gate * torch.sigmoid(gate) * up
    out = leaves["weight"] * (a @ leaves["down"].t())
    d_y = wide["d_out"][wide["token"]]
    d_weight, d_down, d_up, d_x = torch.autograd.grad(
        (out * d_y).sum(), [leaves["weight"], leaves["down"], leaves["up"], x]
    )
    for ours, exact in zip(plain, [out, hidden, d_weight, d_down, d_up, d_x], strict=True):
        torch.testing.assert_close(ours.double(), exact.detach(), rtol=1e-5, atol=1e-5)


def test_gradients_that_nobody_asks_for_are_not_computed() -> None:
    given = made(True)
    hidden, out = given["x"].new_empty(ROWS, 2 * INNER), given["x"].new_empty(ROWS, WIDTH)
    pieces.forward(*[given[n] for n in ("x", "token", "up", "down", "weight")], hidden, out, True, False)
    whole, alone = given["x"].new_empty(ROWS, 1), given["x"].new_empty(ROWS, 1)
    first = [given[n] for n in ("x", "d_out", "token", "up", "down", "weight")]
    d_x = torch.empty_like(out)
    pieces.backward(*first, hidden, whole, None, None, d_x, True, False)
    pieces.backward(*first, hidden, alone, None, None, None, True, False)
    assert torch.equal(whole, alone)
    with torch.profiler.profile() as profile:
        pieces.backward(*first, hidden, alone, None, None, None, True, False)
    assert sum(event.count for event in profile.key_averages() if event.key == "aten::mm") == 1


@pytest.mark.parametrize("form", ["swiglu", "relu_mlp"])
def test_a_block_on_two_threads_has_the_bits_of_one_that_python_runs(
    form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def trained() -> list[Tensor]:
        torch.manual_seed(0)
        experts = Experts(8, 32, 64, form=form)
        for parameter in experts.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
        x = torch.randn(2048, 32, requires_grad=True)
        chosen = torch.rand(2048, 8).topk(2).indices
        weights = torch.rand(2048, 2, requires_grad=True)
        y = experts(x, chosen, weights)
        y.square().sum().backward()
        return [y.detach(), x.grad, weights.grad, experts.up.grad, experts.down.grad]

    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        scripted = trained()
        monkeypatch.setattr(pieces, "forward", pieces.plain_forward)
        monkeypatch.setattr(pieces, "backward", pieces.plain_backward)
        plain = trained()
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(scripted, plain, strict=True))
