"""The products of routed experts on slices of one sorted buffer, with a backward pass of their own."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from jobs.moe.dispatch import Dispatch
from jobs.threads import for_each

aten = torch.ops.aten


class Slices(torch.autograd.Function):
    """Forward and backward of bias-free experts, one expert's slice at a time: its intermediates stay in cache.

    Bit-deterministic for a fixed number of threads: a token's sum runs over its slots in rank order.
    """

    @staticmethod
    def forward(
        ctx: Any, x_TD: Tensor, weights_TK: Tensor, up: Tensor, down: Tensor, plan: Dispatch, form: str
    ) -> Tensor:
        sizes = plan.counts.tolist()
        rows = sum(sizes)
        place = plan.place().clamp_max_(rows)  # empty slots read zeros
        hidden = x_TD.new_empty(rows, up.shape[1])
        weights = weights_TK.reshape(-1).index_select(0, plan.order[:rows]).to(x_TD.dtype).unsqueeze(-1)
        y = _slots(x_TD, rows)
        # Split once: a slice in the loop costs as much as a small product's call.
        tokens, runs, parts = plan.token[:rows].split(sizes), hidden.split(sizes), _halves(hidden, form, sizes)
        w, out = weights.split(sizes), y[:rows].split(sizes)
        w_up, w_down = up.transpose(1, 2).unbind(0), down.transpose(1, 2).unbind(0)

        def run(i: int) -> None:
            torch.mm(x_TD.index_select(0, tokens[i]), w_up[i], out=runs[i])
            torch.mm(activate(parts[i]).mul_(w[i]), w_down[i], out=out[i])

        for_each(run, sizes)
        ctx.save_for_backward(x_TD, weights, up, down, hidden, place)
        ctx.plan, ctx.form, ctx.sizes, ctx.weights_dtype = plan, form, sizes, weights_TK.dtype
        return _sum_slots(y, place)

    @staticmethod
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        x_TD, weights, up, down, hidden, place = ctx.saved_tensors
        sizes, d_out = ctx.sizes, d_out.contiguous()
        rows = len(hidden)
        need_x, _, need_up, need_down = ctx.needs_input_grad[:4]
        d_x = _slots(x_TD, rows) if need_x else None
        d_up = torch.empty_like(up) if need_up else None
        d_down = torch.empty_like(down) if need_down else None
        d_weights = _slots(weights, rows)
        tokens, parts = ctx.plan.token[:rows].split(sizes), _halves(hidden, ctx.form, sizes)
        w, d_w = weights.split(sizes), d_weights[:rows].split(sizes)
        w_up, w_down = up.unbind(0), down.unbind(0)
        d_rows = None if d_x is None else d_x[:rows].split(sizes)
        for gradient in (d_up, d_down):
            if gradient is not None:
                for i, size in enumerate(sizes):
                    if not size:
                        gradient[i].zero_()

        def run(i: int) -> None:
            d_y = d_out.index_select(0, tokens[i])
            d_a = torch.mm(d_y, w_down[i])
            a, d_h = activate_backward(parts[i], d_a, w[i])
            torch.sum(d_a.mul_(a), -1, keepdim=True, out=d_w[i])
            if d_down is not None:
                torch.mm(d_y.t(), a.mul_(w[i]), out=d_down[i])
            if d_up is not None:
                torch.mm(d_h.t(), x_TD.index_select(0, tokens[i]), out=d_up[i])
            if d_rows is not None:
                torch.mm(d_h, w_up[i], out=d_rows[i])

        for_each(run, sizes)
        d_slots = d_weights.view(-1).index_select(0, place.view(-1)).view_as(place).to(ctx.weights_dtype)
        return None if d_x is None else _sum_slots(d_x, place), d_slots, d_up, d_down, None, None


def _slots(like: Tensor, rows: int) -> Tensor:
    """Return memory for `rows` filled slots and, behind them, the zeros that empty ones read."""
    slots = like.new_empty(rows + 1, like.shape[1])
    slots[rows].zero_()
    return slots


def _sum_slots(slots: Tensor, place_TK: Tensor) -> Tensor:
    """Return the sum of each token's slots [T,D], in rank order."""
    if not place_TK.numel():
        return slots.new_zeros(len(place_TK), slots.shape[1])
    return F.embedding_bag(place_TK, slots, mode="sum")


def _halves(hidden: Tensor, form: str, sizes: list[int]) -> list[tuple[Tensor, ...]]:
    """Return each expert's run of the first projection: (gate, up) of swiglu, else (hidden,)."""
    parts = hidden.chunk(2, dim=1) if form == "swiglu" else (hidden,)
    return list(zip(*(part.split(sizes) for part in parts), strict=True))


def activate(halves: tuple[Tensor, ...]) -> Tensor:
    """Return silu(gate) * up of two halves, relu of one."""
    return F.silu(halves[0]).mul_(halves[1]) if len(halves) == 2 else F.relu(halves[0])


def activate_backward(halves: tuple[Tensor, ...], d_a: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return the activation and the gradient of the first projection; `d_a` does not hold the combine weight yet."""
    if len(halves) == 1:
        a = F.relu(halves[0])
        return a, aten.threshold_backward(d_a * weight, a, 0)
    gate, up = halves
    gated = F.silu(gate)
    weighted = d_a * weight
    d_hidden = d_a.new_empty(len(d_a), 2 * d_a.shape[1])
    d_gate, d_up = d_hidden.chunk(2, dim=1)
    torch.mul(weighted, gated, out=d_up)
    aten.silu_backward.grad_input(weighted.mul_(up), gate, grad_input=d_gate)
    return gated.mul_(up), d_hidden
