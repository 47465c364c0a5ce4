"""The products of routed experts where nobody may look at a count: grouped kernels, with their own backward pass."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from jobs.moe.dispatch import Dispatch
from jobs.moe.pieces import activate, activate_backward


class Grouped(torch.autograd.Function):
    """Forward and backward of bias-free experts, all at once: each tensor of rows is written once and read in place.

    What is kept for the backward pass is the input and the first projection. A token's sum runs over its slots in rank
    order, combine weights inside it.
    """

    @staticmethod
    def forward(
        ctx: Any, x_TD: Tensor, weights_TK: Tensor, up: Tensor, down: Tensor, plan: Dispatch, form: str
    ) -> Tensor:
        ends, place, rest = plan.ends(), plan.place(), plan.rest()
        weights = weights_TK.detach().to(x_TD.dtype)
        hidden = F.grouped_mm(x_TD.index_select(0, plan.token), up.transpose(1, 2), offs=ends)
        out = F.grouped_mm(activate(hidden, form == "swiglu"), down.transpose(1, 2), offs=ends)
        ctx.save_for_backward(x_TD, weights, up, down, hidden, ends, place)
        ctx.plan, ctx.form, ctx.rest, ctx.weights_dtype = plan, form, rest, weights_TK.dtype
        return _summed(_emptied(out, rest), place, weights)

    @staticmethod
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        x_TD, weights, up, down, hidden, ends, place = ctx.saved_tensors
        need_x, need_weights, need_up, need_down = ctx.needs_input_grad[:4]
        plan = ctx.plan
        w = weights.reshape(-1).index_select(0, plan.order).unsqueeze(-1)
        d_y = d_out.contiguous().index_select(0, plan.token)
        d_a = F.grouped_mm(d_y, down, offs=ends)
        a, d_hidden = activate_backward(hidden, d_a, w, ctx.form == "swiglu")
        d_slots = d_x = d_up = d_down = None
        if need_weights:
            d_w = _emptied(d_a.mul_(a).sum(-1, keepdim=True), ctx.rest)
            d_slots = d_w.view(-1).index_select(0, place.view(-1)).view_as(place).to(ctx.weights_dtype)
        if need_down:
            d_down = F.grouped_mm(d_y.t(), a.mul_(w), offs=ends)
        if need_up:
            d_up = F.grouped_mm(d_hidden.t(), x_TD.index_select(0, plan.token), offs=ends)
        if need_x:
            d_x = _summed(_emptied(F.grouped_mm(d_hidden, up, offs=ends), ctx.rest), place, None)
        return d_x, d_slots, d_up, d_down, None, None


def _emptied(rows: Tensor, rest: Tensor | None) -> Tensor:
    """Return rows with zeros behind the last run, which the kernel leaves uninitialised."""
    return rows if rest is None else rows.masked_fill_(rest, 0.0)


def _summed(rows: Tensor, place_TK: Tensor, weights_TK: Tensor | None) -> Tensor:
    """Return the (weighted) sum of each token's slots [T,D]."""
    if not place_TK.numel():
        return rows.new_zeros(len(place_TK), rows.shape[1])
    return F.embedding_bag(place_TK, rows, mode="sum", per_sample_weights=weights_TK)
