"""Experts: three-dimensional weights, computed over tokens sorted by expert.

Three paths give the same numbers: `slices` (own forward and backward, one GEMM per expert and weight, in-cache
intermediates), `grouped` (torch's grouped matmul) and `loop` (plain autograd, the reference in tests).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from jobs.moe.dispatch import Dispatch, dispatch
from jobs.moe.grouped import Grouped
from jobs.moe.host import is_fake, know_grouped_products, visible
from jobs.moe.lowrank import effective
from jobs.moe.parallel import ExpertGroup, keep_own, travel
from jobs.moe.products import linear
from jobs.moe.slices import Slices
from orchestrator.catalog.experts import EXPERTS, ExpertKind
from orchestrator.catalog.parameters import Parameters, code_of
from orchestrator.catalog.uses import Values

NONE = Parameters()  # of a form's own
Frame = Callable[[Tensor], Tensor]  # rows [R,D] of single experts -> as many
# The forms whose backward pass `Slices` and `Grouped` have.
SLICED = ("swiglu", "relu_mlp")


class Experts(nn.Module):
    """N feed-forward experts: `up` [N,2f,D] holds a gated form's gate and up (else [N,f,D]), `down` [N,O,f].

    O is `out_size`, D where it is 0. Of a `group` each rank holds a run of them.
    """

    role = "routed_expert"

    def __init__(
        self, num_experts: int, hidden_size: int, width: int, form: str, own: Values = NONE, out_size: int = 0
    ) -> None:
        super().__init__()
        self.form, self.width, self.num_experts = form, width, num_experts
        self.out_size = out_size or hidden_size
        self.kind, self.activation = EXPERTS.get(form), code_of(EXPERTS, form, own)
        rows = 2 * width if self.kind.gated else width
        self.up = nn.Parameter(torch.empty(num_experts, rows, hidden_size))
        self.down = nn.Parameter(torch.empty(num_experts, self.out_size, width))
        if self.kind.bias:
            self.up_bias = nn.Parameter(torch.empty(num_experts, rows))
            self.down_bias = nn.Parameter(torch.empty(num_experts, self.out_size))
        self.group: ExpertGroup | None = None

    def reset_parameters(self, std: float) -> None:
        """Draw the weights from N(0, std); biases start at 0."""
        for name, parameter in self.named_parameters():
            nn.init.zeros_(parameter) if name.endswith("bias") else nn.init.normal_(parameter, std=std)

    def deal(self, group: ExpertGroup) -> None:
        """Keep this rank's run of the experts alone; MoegridError where the group does not divide them."""
        keep_own(self, self.num_experts, group)
        self.group = group

    def forward(
        self,
        x_TD: Tensor,
        experts_TK: Tensor,
        weights_TK: Tensor,
        path: str = "",
        counts_N: Tensor | None = None,
        after: Frame | None = None,
        meanwhile: Callable[[], None] = lambda: None,
    ) -> Tensor:
        """Return sum over a token's slots of weight * after(expert(x)) [T,O]; slots with expert -1 add nothing.

        `counts_N`, the assignments to each expert where they are known, promises that no slot is empty.
        `meanwhile` is called while tokens travel to other ranks, where the experts are dealt.
        """
        up, down = effective(self, "up"), effective(self, "down")
        if torch.is_autocast_enabled(x_TD.device.type):
            dtype = torch.get_autocast_dtype(x_TD.device.type)
            x_TD, up, down = x_TD.to(dtype), up.to(dtype), down.to(dtype)
        path = path or self.choose_path(x_TD, framed=after is not None)
        plan = dispatch(experts_TK, self.num_experts, counts_N)
        if self.group is None:
            return self._compute(x_TD, weights_TK, up, down, plan, path, after)
        return travel(
            x_TD,
            weights_TK,
            plan,
            self.group,
            lambda x, own, ones: self._compute(x, ones, up, down, dispatch(own, len(up)), path),
            after,
            meanwhile,
        )

    def _compute(
        self,
        x_TD: Tensor,
        weights_TK: Tensor,
        up: Tensor,
        down: Tensor,
        plan: Dispatch,
        path: str,
        after: Frame | None = None,
    ) -> Tensor:
        if path == "slices":
            y: Tensor = Slices.apply(x_TD, weights_TK, up, down, plan, self.form)  # type: ignore[no-untyped-call]
            return y
        if path == "grouped" and self.form in SLICED and after is None:
            grouped: Tensor = Grouped.apply(x_TD, weights_TK, up, down, plan, self.form)  # type: ignore[no-untyped-call]
            return grouped
        if path == "grouped":
            return self._grouped(x_TD, weights_TK, up, down, plan, after)
        return self._loop(x_TD, weights_TK, up, down, plan, after)

    def choose_path(self, x_TD: Tensor, *, framed: bool = False) -> str:
        """Return the fastest path for these inputs; benchmarks/moe_block.py prints the measurements behind the rule."""
        if is_fake(x_TD):
            know_grouped_products()
        sliced = self.form in SLICED and not framed and self.out_size == x_TD.shape[1]
        if sliced and (visible(x_TD) or x_TD.dtype == torch.float64):
            return "slices"
        # The grouped kernel has no fp64 and wants rows of whole 16 bytes.
        sizes = (x_TD.shape[1], self.width, self.out_size)
        aligned = all(size * x_TD.element_size() % 16 == 0 for size in sizes)
        return "grouped" if aligned and x_TD.dtype != torch.float64 else "loop"

    def activate(self, hidden: Tensor) -> Tensor:
        """Apply the non-linearity of the expert form to the first projection."""
        if self.kind.gated:
            gated: Tensor = multiplied(self.kind, self.activation, *hidden.split(self.width, dim=-1))
            return gated
        activated: Tensor = self.activation(hidden)
        return activated

    def _grouped(
        self, x_TD: Tensor, weights_TK: Tensor, up: Tensor, down: Tensor, plan: Dispatch, after: Frame | None
    ) -> Tensor:
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
        if after is not None:
            out = torch.where(run, after(out), 0.0)
        weighted = out * weights_TK.reshape(-1)[plan.order].to(out.dtype).unsqueeze(-1)
        slots = torch.empty_like(weighted).index_copy(0, plan.order, weighted)
        return slots.view(len(x_TD), plan.slots, -1).sum(1)

    def _loop(
        self, x_TD: Tensor, weights_TK: Tensor, up: Tensor, down: Tensor, plan: Dispatch, after: Frame | None
    ) -> Tensor:
        out = x_TD.new_zeros(len(x_TD), self.out_size)
        weights = weights_TK.reshape(-1)[plan.order].to(x_TD.dtype).unsqueeze(-1)
        start = 0
        sizes = plan.counts.tolist()
        for expert, size in enumerate(sizes):
            # Where no expert has a token the first has a gradient of zeros: ranks sum gradients together.
            if not size and (expert or any(sizes)):
                continue
            rows = slice(start, start + size)
            hidden = F.linear(x_TD[plan.token[rows]], up[expert], self.up_bias[expert] if self.has_bias else None)
            y = F.linear(self.activate(hidden), down[expert], self.down_bias[expert] if self.has_bias else None)
            y = y if after is None else after(y)
            out = out.index_add(0, plan.token[rows], y * weights[rows])
            start += size
        return out

    @property
    def has_bias(self) -> bool:
        return self.kind.bias


class SharedExperts(nn.Module):
    """n experts that every token takes, as one feed-forward of width n * f: `gate`, `up` [n*f,D], `down` [O,n*f].

    O is `out_size`, D where it is 0.
    """

    role = "shared_expert"

    def __init__(
        self, num_experts: int, hidden_size: int, width: int, form: str, own: Values = NONE, out_size: int = 0
    ) -> None:
        super().__init__()
        self.form, self.width = form, num_experts * width
        out_size = out_size or hidden_size
        self.kind, self.activation = EXPERTS.get(form), code_of(EXPERTS, form, own)
        if self.kind.gated:
            self.gate = nn.Parameter(torch.empty(self.width, hidden_size))
        self.up = nn.Parameter(torch.empty(self.width, hidden_size))
        self.down = nn.Parameter(torch.empty(out_size, self.width))
        if self.kind.bias and self.kind.gated:
            self.gate_bias = nn.Parameter(torch.empty(self.width))
        if self.kind.bias:
            self.up_bias = nn.Parameter(torch.empty(self.width))
            self.down_bias = nn.Parameter(torch.empty(out_size))

    def reset_parameters(self, std: float) -> None:
        """Draw the weights from N(0, std); biases start at 0."""
        for name, parameter in self.named_parameters():
            nn.init.zeros_(parameter) if name.endswith("bias") else nn.init.normal_(parameter, std=std)

    def forward(self, x: Tensor, weights: Tensor | None = None) -> Tensor:
        """Return the feed-forward of x [..., D]; `weights` [..., n] are those of each expert's output."""
        gate_bias, up_bias, down_bias = (getattr(self, f"{name}_bias", None) for name in ("gate", "up", "down"))
        hidden = linear(x, effective(self, "up"), up_bias)
        if self.kind.gated:
            gate = linear(x, effective(self, "gate"), gate_bias)
            hidden = multiplied(self.kind, self.activation, gate, hidden)
        else:
            hidden = self.activation(hidden)
        if weights is not None:
            hidden = hidden * weights.repeat_interleave(self.width // weights.shape[-1], dim=-1).to(hidden.dtype)
        return linear(hidden, effective(self, "down"), down_bias)


class SharedGate(nn.Module):
    """sigmoid(w x), by which a token's output of the shared experts is scaled (Qwen2-MoE): `weight` [1,D]."""

    role = "shared_expert"

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(1, hidden_size))

    def reset_parameters(self, std: float) -> None:
        """Draw the weights from N(0, std)."""
        nn.init.normal_(self.weight, std=std)

    def forward(self, x: Tensor) -> Tensor:
        """Return the gate of x [..., D] as [..., 1]."""
        return torch.sigmoid(F.linear(x, self.weight))


def multiplied(kind: ExpertKind, activation: Callable[..., Tensor], gate: Tensor, up: Tensor) -> Tensor:
    """Return the product of a gated form's projections [..., f]."""
    return activation(gate, up) if kind.paired else activation(gate) * up
