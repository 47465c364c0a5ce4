"""Experts: three-dimensional weights, computed over tokens sorted by expert.

Three paths give the same numbers: `slices` (own forward and backward, one GEMM per expert and weight, in-cache
intermediates), `grouped` (torch's grouped matmul) and `loop` (plain autograd, the reference in tests).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from jobs.moe.routing import count

aten = torch.ops.aten


@dataclass
class Dispatch:
    """Slots sorted by expert: `order` [S] into the flat slots, the `token` [S] of each, each expert's run length."""

    order: Tensor
    token: Tensor
    counts: Tensor  # [N]
    slots: int  # slots per token


def dispatch(experts_TK: Tensor, num_experts: int) -> Dispatch:
    """Sort the slots by expert; empty slots (-1) come last and are in no expert's run."""
    flat = experts_TK.reshape(-1)
    key = torch.where(flat < 0, num_experts, flat)
    order = torch.argsort(key, stable=True)
    counts = count(flat, num_experts)
    return Dispatch(order, order // experts_TK.shape[1], counts, experts_TK.shape[1])


class Experts(nn.Module):
    """N feed-forward experts: `up` [N,2f,D] holds swiglu's gate and up (else [N,f,D]), `down` [N,D,f]."""

    role = "routed_expert"

    def __init__(self, num_experts: int, hidden_size: int, width: int, form: str) -> None:
        super().__init__()
        self.form, self.width, self.num_experts = form, width, num_experts
        rows = 2 * width if form == "swiglu" else width
        self.up = nn.Parameter(torch.empty(num_experts, rows, hidden_size))
        self.down = nn.Parameter(torch.empty(num_experts, hidden_size, width))
        if form == "gelu_mlp_bias":
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
            return _Slices.apply(x_TD, weights_TK, up, down, plan, self.form)
        if path == "grouped":
            return self._grouped(x_TD, weights_TK, up, down, plan)
        return self._loop(x_TD, weights_TK, up, down, plan)

    def choose_path(self, x_TD: Tensor) -> str:
        """Return the fastest path for these inputs; benchmarks/moe_block.py prints the measurements behind the rule."""
        if x_TD.dtype == torch.float64:
            return "loop" if self.has_bias else "slices"
        return "slices" if x_TD.is_cpu and not self.has_bias else "grouped"

    def activate(self, hidden: Tensor) -> Tensor:
        """Apply the non-linearity of the expert form to the first projection."""
        if self.form == "swiglu":
            gate, up = hidden.split(self.width, dim=-1)
            return F.silu(gate) * up
        return F.relu(hidden) if self.form == "relu_mlp" else F.gelu(hidden)

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
        return self.form == "gelu_mlp_bias"


class _Slices(torch.autograd.Function):
    """Forward and backward of bias-free experts, one expert's slice at a time: its intermediates stay in cache.

    Bit-deterministic for a fixed number of threads: every sum runs in slot order.
    """

    @staticmethod
    def forward(
        ctx: Any, x_TD: Tensor, weights_TK: Tensor, up: Tensor, down: Tensor, plan: Dispatch, form: str
    ) -> Tensor:
        sizes = plan.counts.tolist()
        hidden = x_TD.new_empty(sum(sizes), up.shape[1])
        weights = weights_TK.reshape(-1).index_select(0, plan.order).to(x_TD.dtype).unsqueeze(-1)
        out, start = torch.zeros_like(x_TD), 0
        for size, w_up, w_down in zip(sizes, up.unbind(0), down.unbind(0), strict=True):
            if not size:
                continue
            stop = start + size
            token = plan.token[start:stop]
            h = torch.mm(x_TD.index_select(0, token), w_up.t(), out=hidden[start:stop])
            y = torch.mm(_activate(h, form).mul_(weights[start:stop]), w_down.t())
            out.index_add_(0, token, y)
            start = stop
        ctx.save_for_backward(x_TD, weights, up, down, hidden)
        ctx.plan, ctx.form, ctx.sizes, ctx.weights_meta = plan, form, sizes, (weights_TK.shape, weights_TK.dtype)
        return out

    @staticmethod
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        x_TD, weights, up, down, hidden = ctx.saved_tensors
        plan, d_out = ctx.plan, d_out.contiguous()
        need_x, _, need_up, need_down = ctx.needs_input_grad[:4]
        d_x = torch.zeros_like(x_TD) if need_x else None
        d_up = torch.empty_like(up) if need_up else None
        d_down = torch.empty_like(down) if need_down else None
        d_weights = weights.new_zeros(len(plan.order))
        start = 0
        for expert, (size, w_up, w_down) in enumerate(zip(ctx.sizes, up.unbind(0), down.unbind(0), strict=True)):
            if not size:
                for gradient in (d_up, d_down):
                    if gradient is not None:
                        gradient[expert].zero_()
                continue
            stop = start + size
            token, h, w = plan.token[start:stop], hidden[start:stop], weights[start:stop]
            d_y = d_out.index_select(0, token)
            d_a = torch.mm(d_y, w_down)
            a, d_h = _activate_backward(h, d_a, w, ctx.form)
            torch.sum(d_a.mul_(a), -1, out=d_weights[start:stop])
            if d_down is not None:
                torch.mm(d_y.t(), a.mul_(w), out=d_down[expert])
            if d_up is not None:
                torch.mm(d_h.t(), x_TD.index_select(0, token), out=d_up[expert])
            if d_x is not None:
                d_x.index_add_(0, token, torch.mm(d_h, w_up))
            start = stop
        shape, dtype = ctx.weights_meta
        d_flat = torch.empty_like(d_weights).index_copy_(0, plan.order, d_weights)
        return d_x, d_flat.view(shape).to(dtype), d_up, d_down, None, None


def _activate(hidden: Tensor, form: str) -> Tensor:
    if form == "swiglu":
        width = hidden.shape[1] // 2
        return F.silu(hidden[:, :width]).mul_(hidden[:, width:])
    return F.relu(hidden)


def _activate_backward(hidden: Tensor, d_a: Tensor, weight: Tensor, form: str) -> tuple[Tensor, Tensor]:
    """Return the activation and the gradient of the first projection; `d_a` does not hold the combine weight yet."""
    if form != "swiglu":
        a = F.relu(hidden)
        return a, aten.threshold_backward(d_a * weight, a, 0)
    width = hidden.shape[1] // 2
    gate, up = hidden[:, :width], hidden[:, width:]
    gated = F.silu(gate)
    weighted = d_a * weight
    d_hidden = torch.empty_like(hidden)
    torch.mul(weighted, gated, out=d_hidden[:, width:])
    aten.silu_backward.grad_input(weighted.mul_(up), gate, grad_input=d_hidden[:, :width])
    return gated.mul_(up), d_hidden


class SharedExperts(nn.Module):
    """n experts that every token takes, as one feed-forward of width n * f: `gate`, `up` [n*f,D], `down` [D,n*f]."""

    role = "shared_expert"

    def __init__(self, num_experts: int, hidden_size: int, width: int, form: str) -> None:
        super().__init__()
        self.form, self.width = form, num_experts * width
        if form == "swiglu":
            self.gate = nn.Parameter(torch.empty(self.width, hidden_size))
        self.up = nn.Parameter(torch.empty(self.width, hidden_size))
        self.down = nn.Parameter(torch.empty(hidden_size, self.width))
        if form == "gelu_mlp_bias":
            self.up_bias = nn.Parameter(torch.empty(self.width))
            self.down_bias = nn.Parameter(torch.empty(hidden_size))

    def reset_parameters(self, std: float) -> None:
        """Draw the weights from N(0, std); biases start at 0."""
        for name, parameter in self.named_parameters():
            nn.init.zeros_(parameter) if name.endswith("bias") else nn.init.normal_(parameter, std=std)

    def forward(self, x: Tensor) -> Tensor:
        """Return the feed-forward of x [..., D]."""
        if self.form == "swiglu":
            return F.linear(F.silu(F.linear(x, self.gate)) * F.linear(x, self.up), self.down)
        if self.form == "relu_mlp":
            return F.linear(F.relu(F.linear(x, self.up)), self.down)
        return F.linear(F.gelu(F.linear(x, self.up, self.up_bias)), self.down, self.down_bias)


class ConstantExperts(nn.Module):
    """MoE++'s constant experts: a * x + b * v with [a, b] = softmax(W x). `router` [n,2,D], `value` [n,D]."""

    role = "routed_expert"

    def __init__(self, num_experts: int, hidden_size: int) -> None:
        super().__init__()
        self.router = nn.Parameter(torch.empty(num_experts, 2, hidden_size))
        self.value = nn.Parameter(torch.empty(num_experts, hidden_size))

    def reset_parameters(self, std: float) -> None:
        """Draw the mixing weights from N(0, std) and the constants from N(0, 1), as the released layer does."""
        nn.init.normal_(self.router, std=std)
        nn.init.normal_(self.value)

    def forward(self, x_TD: Tensor, weights_Tn: Tensor) -> tuple[Tensor, Tensor]:
        """Return (c [T,1], v [T,D]): the weighted outputs sum to c * x + v."""
        mix = torch.softmax(torch.einsum("td,ncd->tnc", x_TD, self.router), dim=-1) * weights_Tn.unsqueeze(-1)
        return mix[..., 0].sum(-1, keepdim=True), mix[..., 1] @ self.value
