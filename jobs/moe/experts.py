"""Experts: three-dimensional weights, computed over tokens sorted by expert.

Three paths give the same numbers: `slices` (own forward and backward, one GEMM per expert and weight, in-cache
intermediates), `grouped` (torch's grouped matmul) and `loop` (plain autograd, the reference in tests).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from jobs.moe.selection import count
from jobs.threads import for_each
from orchestrator.catalog.experts import EXPERTS
from orchestrator.registry import load

aten = torch.ops.aten


@dataclass
class Dispatch:
    """Slots sorted by expert: `order` [S] into the flat slots, the `token` [S] of each, each expert's run length."""

    order: Tensor
    token: Tensor
    counts: Tensor  # [N]
    slots: int  # slots per token

    def place(self, rows: int) -> Tensor:
        """Return where each slot [T,K] is in `order`; empty ones are at `rows`, the number of filled slots."""
        ranks = torch.arange(len(self.order), device=self.order.device)
        place = torch.empty_like(ranks).index_copy_(0, self.order, ranks)
        return place.clamp_max_(rows).view(-1, self.slots)


def dispatch(experts_TK: Tensor, num_experts: int) -> Dispatch:
    """Sort the slots by expert; empty slots (-1) come last and are in no expert's run."""
    flat = experts_TK.reshape(-1)
    key = torch.where(flat < 0, num_experts, flat)
    order = torch.argsort(key, stable=True)
    counts = count(flat, num_experts)
    return Dispatch(order, order // experts_TK.shape[1], counts, experts_TK.shape[1])


def activation_of(form: str) -> Callable[[Tensor], Tensor]:
    """Return the activation of an expert form, ours or another package's."""
    return cast(Callable[[Tensor], Tensor], load(EXPERTS.get(form).code, EXPERTS.who(form)))


# The forms whose backward pass `_Slices` has.
SLICED = ("swiglu", "relu_mlp")


class Experts(nn.Module):
    """N feed-forward experts: `up` [N,2f,D] holds a gated form's gate and up (else [N,f,D]), `down` [N,D,f]."""

    role = "routed_expert"

    def __init__(self, num_experts: int, hidden_size: int, width: int, form: str) -> None:
        super().__init__()
        self.form, self.width, self.num_experts = form, width, num_experts
        self.kind, self.activation = EXPERTS.get(form), activation_of(form)
        rows = 2 * width if self.kind.gated else width
        self.up = nn.Parameter(torch.empty(num_experts, rows, hidden_size))
        self.down = nn.Parameter(torch.empty(num_experts, hidden_size, width))
        if self.kind.bias:
            self.up_bias = nn.Parameter(torch.empty(num_experts, width))
            self.down_bias = nn.Parameter(torch.empty(num_experts, hidden_size))

    def reset_parameters(self, std: float) -> None:
        """Draw the weights from N(0, std); biases start at 0."""
        for name, parameter in self.named_parameters():
            nn.init.zeros_(parameter) if name.endswith("bias") else nn.init.normal_(parameter, std=std)

    def forward(self, x_TD: Tensor, experts_TK: Tensor, weights_TK: Tensor, path: str = "") -> Tensor:
        """Return sum over a token's slots of weight * expert(x) [T,D]; slots with expert -1 add nothing."""
        up: Tensor = self.up
        down: Tensor = self.down
        if torch.is_autocast_enabled(x_TD.device.type):
            dtype = torch.get_autocast_dtype(x_TD.device.type)
            x_TD, up, down = x_TD.to(dtype), up.to(dtype), down.to(dtype)
        plan = dispatch(experts_TK, self.num_experts)
        path = path or self.choose_path(x_TD)
        if path == "slices":
            y: Tensor = _Slices.apply(x_TD, weights_TK, up, down, plan, self.form)  # type: ignore[no-untyped-call]
            return y
        if path == "grouped":
            return self._grouped(x_TD, weights_TK, up, down, plan)
        return self._loop(x_TD, weights_TK, up, down, plan)

    def choose_path(self, x_TD: Tensor) -> str:
        """Return the fastest path for these inputs; benchmarks/moe_block.py prints the measurements behind the rule."""
        if self.form in SLICED and (x_TD.is_cpu or x_TD.dtype == torch.float64):
            return "slices"
        # The grouped kernel has no fp64 and wants rows of whole 16 bytes.
        aligned = all(size * x_TD.element_size() % 16 == 0 for size in (x_TD.shape[1], self.width))
        return "grouped" if aligned and x_TD.dtype != torch.float64 else "loop"

    def activate(self, hidden: Tensor) -> Tensor:
        """Apply the non-linearity of the expert form to the first projection."""
        if self.kind.gated:
            gate, up = hidden.split(self.width, dim=-1)
            gated: Tensor = self.activation(gate) * up
            return gated
        return self.activation(hidden)

    def _grouped(self, x_TD: Tensor, weights_TK: Tensor, up: Tensor, down: Tensor, plan: Dispatch) -> Tensor:
        ends = plan.counts.cumsum(0).to(torch.int32)
        # The kernel leaves rows behind the last run uninitialised, in its output and in the gradient of its input.
        run = (torch.arange(len(plan.order), device=x_TD.device) < ends[-1]).unsqueeze(-1)
        x = torch.where(run, x_TD.index_select(0, plan.token), 0.0)
        hidden = F.grouped_mm(x, up.transpose(-2, -1), offs=ends)
        if self.has_bias:
            rows = torch.arange(len(x), device=x.device, dtype=torch.int32)
            expert = torch.searchsorted(ends, rows, right=True).clamp_max(len(up) - 1)
            hidden = torch.where(run, hidden + self.up_bias.to(hidden.dtype)[expert], 0.0)
        out = F.grouped_mm(self.activate(hidden), down.transpose(-2, -1), offs=ends)
        if self.has_bias:
            out = out + self.down_bias.to(out.dtype)[expert]
        out = torch.where(run, out, 0.0)
        weighted = out * weights_TK.reshape(-1)[plan.order].to(out.dtype).unsqueeze(-1)
        slots = torch.empty_like(weighted).index_copy(0, plan.order, weighted)
        return slots.view(len(x_TD), plan.slots, -1).sum(1)

    def _loop(self, x_TD: Tensor, weights_TK: Tensor, up: Tensor, down: Tensor, plan: Dispatch) -> Tensor:
        out = torch.zeros_like(x_TD)
        weights = weights_TK.reshape(-1)[plan.order].to(x_TD.dtype).unsqueeze(-1)
        start = 0
        for expert, size in enumerate(plan.counts.tolist()):
            if not size:
                continue
            rows = slice(start, start + size)
            hidden = F.linear(x_TD[plan.token[rows]], up[expert], self.up_bias[expert] if self.has_bias else None)
            y = F.linear(self.activate(hidden), down[expert], self.down_bias[expert] if self.has_bias else None)
            out = out.index_add(0, plan.token[rows], y * weights[rows])
            start += size
        return out

    @property
    def has_bias(self) -> bool:
        return self.kind.bias


class _Slices(torch.autograd.Function):
    """Forward and backward of bias-free experts, one expert's slice at a time: its intermediates stay in cache.

    Bit-deterministic for a fixed number of threads: a token's sum runs over its slots in rank order.
    """

    @staticmethod
    def forward(
        ctx: Any, x_TD: Tensor, weights_TK: Tensor, up: Tensor, down: Tensor, plan: Dispatch, form: str
    ) -> Tensor:
        sizes = plan.counts.tolist()
        rows = sum(sizes)
        place = plan.place(rows)
        hidden = x_TD.new_empty(rows, up.shape[1])
        weights = weights_TK.reshape(-1).index_select(0, plan.order[:rows]).to(x_TD.dtype).unsqueeze(-1)
        y = _slots(x_TD, rows)
        # Split once: a slice in the loop costs as much as a small product's call.
        tokens, runs, parts = plan.token[:rows].split(sizes), hidden.split(sizes), _halves(hidden, form, sizes)
        w, out = weights.split(sizes), y[:rows].split(sizes)
        w_up, w_down = up.transpose(1, 2).unbind(0), down.transpose(1, 2).unbind(0)

        def run(i: int) -> None:
            torch.mm(x_TD.index_select(0, tokens[i]), w_up[i], out=runs[i])
            torch.mm(_activate(parts[i]).mul_(w[i]), w_down[i], out=out[i])

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
            a, d_h = _activate_backward(parts[i], d_a, w[i])
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


def _activate(halves: tuple[Tensor, ...]) -> Tensor:
    return F.silu(halves[0]).mul_(halves[1]) if len(halves) == 2 else F.relu(halves[0])


def _activate_backward(halves: tuple[Tensor, ...], d_a: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
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


class SharedExperts(nn.Module):
    """n experts that every token takes, as one feed-forward of width n * f: `gate`, `up` [n*f,D], `down` [D,n*f]."""

    role = "shared_expert"

    def __init__(self, num_experts: int, hidden_size: int, width: int, form: str) -> None:
        super().__init__()
        self.form, self.width = form, num_experts * width
        self.kind, self.activation = EXPERTS.get(form), activation_of(form)
        if self.kind.gated:
            self.gate = nn.Parameter(torch.empty(self.width, hidden_size))
        self.up = nn.Parameter(torch.empty(self.width, hidden_size))
        self.down = nn.Parameter(torch.empty(hidden_size, self.width))
        if self.kind.bias:
            self.up_bias = nn.Parameter(torch.empty(self.width))
            self.down_bias = nn.Parameter(torch.empty(hidden_size))

    def reset_parameters(self, std: float) -> None:
        """Draw the weights from N(0, std); biases start at 0."""
        for name, parameter in self.named_parameters():
            nn.init.zeros_(parameter) if name.endswith("bias") else nn.init.normal_(parameter, std=std)

    def forward(self, x: Tensor) -> Tensor:
        """Return the feed-forward of x [..., D]."""
        if self.kind.gated:
            return F.linear(self.activation(F.linear(x, self.gate)) * F.linear(x, self.up), self.down)
        if self.kind.bias:
            return F.linear(self.activation(F.linear(x, self.up, self.up_bias)), self.down, self.down_bias)
        return F.linear(self.activation(F.linear(x, self.up)), self.down)
