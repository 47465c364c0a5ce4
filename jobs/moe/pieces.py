"""What one expert does to its run of slots, forward and backward, in one call that leaves Python's lock alone.

Threads that take pieces side by side would else wait for that lock between any two kernels, and for the core they had
gone to sleep on: on two cores a block of scale tiny took 1.2 times as long. TorchScript runs the same kernels in the
same order, so no bit depends on who runs them.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from jobs.moe.products import times


def activate(hidden: Tensor, gated: bool) -> Tensor:
    """Return silu(gate) * up of the first projection's two halves, relu of a whole one."""
    if gated:
        halves = hidden.chunk(2, 1)
        return torch.nn.functional.silu(halves[0]).mul_(halves[1])
    return torch.relu(hidden)


def activate_backward(hidden: Tensor, d_a: Tensor, weight: Tensor, gated: bool) -> tuple[Tensor, Tensor]:
    """Return the activation and the gradient of the first projection; `d_a` does not hold the combine weight yet."""
    if not gated:
        a = torch.relu(hidden)
        return a, torch.ops.aten.threshold_backward(d_a * weight, a, 0)
    halves = hidden.chunk(2, 1)
    gate, up = halves[0], halves[1]
    gated_by = torch.nn.functional.silu(gate)
    weighted = d_a * weight
    d_hidden = d_a.new_empty([d_a.size(0), 2 * d_a.size(1)])
    parts = d_hidden.chunk(2, 1)
    torch.mul(weighted, gated_by, out=parts[1])
    torch.ops.aten.silu_backward(weighted.mul_(up), gate, grad_input=parts[0])
    return gated_by.mul_(up), d_hidden


def multiply(left: Tensor, right: Tensor, out: Tensor, fast: bool) -> None:
    """Write left right^T to `out`, by oneDNN where that is `fast`."""
    if fast:
        out.copy_(times(left, right))
    else:
        torch.mm(left, right.t(), out=out)


def plain_forward(
    x_TD: Tensor,
    token_R: Tensor,
    w_up: Tensor,
    w_down: Tensor,
    weight_R: Tensor,
    hidden: Tensor,
    out: Tensor,
    gated: bool,
    fast: bool,
) -> Tensor:
    """Write the weighted output [R,D] of a run; return its first projection [R,F or 2F], in `hidden` unless `fast`."""
    x = x_TD.index_select(0, token_R)
    if fast:
        hidden = times(x, w_up)
    else:
        torch.mm(x, w_up.t(), out=hidden)
    multiply(activate(hidden, gated).mul_(weight_R), w_down, out, fast)
    return hidden


def plain_backward(
    x_TD: Tensor,
    d_out_TD: Tensor,
    token_R: Tensor,
    w_up: Tensor,
    w_down: Tensor,
    weight_R: Tensor,
    hidden: Tensor,
    d_weight_R: Tensor,
    d_down: Tensor | None,
    d_up: Tensor | None,
    d_x: Tensor | None,
    gated: bool,
    fast: bool,
) -> None:
    """Write the gradients of a run's weights, and those of the matrices and the tokens [R,D] that are asked for."""
    d_y = d_out_TD.index_select(0, token_R)
    d_a = times(d_y, w_down.t()) if fast else torch.mm(d_y, w_down)
    a, d_hidden = activate_backward(hidden, d_a, weight_R, gated)
    torch.sum(d_a.mul_(a), [-1], True, out=d_weight_R)
    if d_down is not None:
        multiply(d_y.t(), a.mul_(weight_R).t(), d_down, fast)
    if d_up is not None:
        multiply(d_hidden.t(), x_TD.index_select(0, token_R).t(), d_up, fast)
    if d_x is not None:
        multiply(d_hidden, w_up.t(), d_x, fast)


with warnings.catch_warnings():
    # What torch recommends in its place makes kernels of its own, of other bits, and wants a compiler.
    warnings.simplefilter("ignore", DeprecationWarning)
    forward: Callable[..., Tensor] = torch.jit.script(plain_forward)
    backward: Callable[..., None] = torch.jit.script(plain_backward)
