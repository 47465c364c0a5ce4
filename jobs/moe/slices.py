"""The products of routed experts on slices of one sorted buffer, with a backward pass of their own."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from jobs.moe import pieces
from jobs.moe.dispatch import Dispatch
from jobs.moe.host import visible
from jobs.moe.products import ROWS, fits
from jobs.threads import for_each

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
        w_up, w_down, gated = up.unbind(0), down.unbind(0), form == "swiglu"
        forward = pieces.forward if visible(x_TD) else pieces.plain_forward

        def run(i: int) -> None:
            hidden[i] = forward(x_TD, tokens[i], w_up[i], w_down[i], w[i], hidden[i], out[i], gated, fast)

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
        w_up, w_down, gated = up.unbind(0), down.unbind(0), ctx.form == "swiglu"
        backward = pieces.backward if visible(x_TD) else pieces.plain_backward
        d_rows = None if d_x is None else d_x[:rows].split(sizes)
        for gradient in (d_up, d_down):
            if gradient is not None:
                for i, size in enumerate(sizes):
                    if not size:
                        gradient[i].zero_()

        def run(i: int) -> None:
            backward(
                x_TD,
                d_out,
                tokens[i],
                w_up[i],
                w_down[i],
                w[i],
                hidden[i],
                d_w[i],
                None if d_down is None else d_down[i],
                None if d_up is None else d_up[i],
                None if d_rows is None else d_rows[i],
                gated,
                fast,
            )

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
