"""The products of routed experts on slices of one sorted buffer, with a backward pass of their own."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from jobs.moe.dispatch import Dispatch
from jobs.moe.products import ROWS, fits, times
from jobs.threads import for_each

aten = torch.ops.aten


# oneDNN is given runs of as few different lengths as an eighth more rows allow: it makes a kernel for each, which takes
# a megabyte. Below so many rows an expert on average it is not worth it.
FEWEST = 128


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
        token, place = plan.token[:rows], plan.place().clamp_max_(rows)  # empty slots read zeros
        weights = weights_TK.reshape(-1).index_select(0, plan.order[:rows]).to(x_TD.dtype).unsqueeze(-1)
        fast = x_TD.dtype is up.dtype is down.dtype and rows >= FEWEST * len(sizes) and fits(x_TD, ROWS)
        if fast:
            sizes, runs = _whole_runs(sizes, plan.counts)
            # What fills a run up is its own first token with a weight of 0: it adds nothing to any gradient, as one
            # that overflows in an expert that is not its own would.
            first = (plan.counts.cumsum(0) - plan.counts).clamp_max_(rows - 1)
            filling = token.index_select(0, first).repeat_interleave(torch.tensor(sizes))
            token = filling.index_copy_(0, runs[:rows], token)
            weights = weights.new_zeros(sum(sizes), 1).index_copy_(0, runs[:rows], weights)
            rows, place = sum(sizes), runs.index_select(0, place.view(-1)).view_as(place)
        y = _slots(x_TD, rows)
        # Split once: a slice in the loop costs as much as a small product's call.
        tokens, w, out = token.split(sizes), weights.split(sizes), y[:rows].split(sizes)
        hidden = [x_TD] * len(sizes) if fast else list(x_TD.new_empty(rows, up.shape[1]).split(sizes))
        w_up, w_down = up.unbind(0), down.unbind(0)

        def run(i: int) -> None:
            x = x_TD.index_select(0, tokens[i])
            if fast:
                hidden[i] = times(x, w_up[i])
            else:
                torch.mm(x, w_up[i].t(), out=hidden[i])
            _multiply(activate(_halves(hidden[i], form)).mul_(w[i]), w_down[i], out[i], fast)

        for_each(run, sizes)
        ctx.save_for_backward(x_TD, token, weights, up, down, place, *hidden)
        ctx.form, ctx.sizes, ctx.weights_dtype, ctx.fast = form, sizes, weights_TK.dtype, fast
        return _sum_slots(y, place)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        x_TD, token, weights, up, down, place, *hidden = ctx.saved_tensors
        sizes, fast, d_out = ctx.sizes, ctx.fast, d_out.contiguous()
        rows = len(token)
        need_x, _, need_up, need_down = ctx.needs_input_grad[:4]
        d_x = _slots(x_TD, rows) if need_x else None
        d_up = torch.empty_like(up) if need_up else None
        d_down = torch.empty_like(down) if need_down else None
        d_weights = _slots(weights, rows)
        tokens, w, d_w = token.split(sizes), weights.split(sizes), d_weights[:rows].split(sizes)
        w_up, w_down = up.unbind(0), down.unbind(0)
        d_rows = None if d_x is None else d_x[:rows].split(sizes)
        for gradient in (d_up, d_down):
            if gradient is not None:
                for i, size in enumerate(sizes):
                    if not size:
                        gradient[i].zero_()

        def run(i: int) -> None:
            d_y = d_out.index_select(0, tokens[i])
            d_a = times(d_y, w_down[i].t()) if fast else torch.mm(d_y, w_down[i])
            a, d_h = activate_backward(_halves(hidden[i], ctx.form), d_a, w[i])
            torch.sum(d_a.mul_(a), -1, keepdim=True, out=d_w[i])
            if d_down is not None:
                _multiply(d_y.t(), a.mul_(w[i]).t(), d_down[i], fast)
            if d_up is not None:
                _multiply(d_h.t(), x_TD.index_select(0, tokens[i]).t(), d_up[i], fast)
            if d_rows is not None:
                _multiply(d_h, w_up[i].t(), d_rows[i], fast)

        for_each(run, sizes)
        d_slots = d_weights.view(-1).index_select(0, place.view(-1)).view_as(place).to(ctx.weights_dtype)
        return None if d_x is None else _sum_slots(d_x, place), d_slots, d_up, d_down, None, None


def _whole_runs(sizes: list[int], counts_N: Tensor) -> tuple[list[int], Tensor]:
    """Return the runs' lengths, filled up, and where among them each sorted slot is [R+1].

    The last place, behind all runs, is that of empty slots.
    """
    whole = [filled_up(size) for size in sizes]
    added = torch.tensor([0, *(more - size for more, size in zip(whole, sizes, strict=True))]).cumsum(0)
    rows = torch.arange(sum(sizes) + 1)
    rows += added.repeat_interleave(F.pad(counts_N, (0, 1), value=1))
    return whole, rows


def filled_up(size: int) -> int:
    """Return the next length of a run: whole multiples of 32 up to 512, from there on eight to each doubling."""
    step = max(32, 1 << max(0, (size - 1).bit_length() - 4))
    return -(-size // step) * step


def _multiply(left: Tensor, right: Tensor, out: Tensor, fast: bool) -> None:
    """Write left right^T to `out`."""
    if fast:
        out.copy_(times(left, right))
    else:
        torch.mm(left, right.t(), out=out)


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


def _halves(hidden: Tensor, form: str) -> tuple[Tensor, ...]:
    """Return an expert's run of the first projection: (gate, up) of swiglu, else (hidden,)."""
    return hidden.chunk(2, dim=1) if form == "swiglu" else (hidden,)


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
