"""SparseMixer-v2: experts are drawn one after the other, each with the gradient of its own softmax (Phi-3.5-MoE)."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from jobs.moe.routers.base import Context, Router
from jobs.moe.routing import Routing

# Heun's third-order method halves its steps: a draw that is not the best weighs a third, in three of four cases. The
# released code writes the third with four digits.
THIRD, MIDPOINT = 0.3333, 0.75


class Sparsemixer(Router):
    """Each slot's weight is its share in a softmax over the experts near the best one left (Liu et al. 2024).

    In training an expert is drawn from that softmax, in evaluation the best is taken. Phi-3.5-MoE: k = 2.
    """

    def forward(self, x_TD: Tensor, context: Context) -> Routing:
        with torch.autocast(x_TD.device.type, enabled=False):
            logits, carried = self.prepare(self.jittered(x_TD.float()), context)
            scores = self.score(logits)
            rest, slots = self.tempered(logits), []
            for _ in range(self.moe.top_k + self.switches.drop):
                weight, index = self._slot(rest)
                slots.append((weight, torch.where(rest.amax(-1, keepdim=True) == float("-inf"), -1, index)))
                rest = rest.scatter(-1, index, float("-inf"))
            kept = slots[self.switches.drop :]
            weights, indices = (torch.cat(parts, dim=-1) for parts in zip(*kept, strict=True))
            weights = torch.where(indices < 0, 0.0, weights * self.scaling)
        return self.record(context, logits, scores, indices, weights, carried)

    def _slot(self, logits_TN: Tensor) -> tuple[Tensor, Tensor]:
        """Return the weight and the id [T,1] of one slot; what is taken already has a logit of -inf."""
        with torch.no_grad():
            best, first = logits_TN.max(-1, keepdim=True)
            left = best > float("-inf")
            factor = torch.maximum(logits_TN.abs(), best)
            far = (best - logits_TN) / factor > 2 * self.settings.jitter
            gone = (far | (logits_TN == float("-inf"))) & left
        near = torch.where(left, logits_TN.masked_fill(gone, float("-inf")), 0.0)
        gates = torch.softmax(near, dim=-1)
        if not self.training:
            return gates.gather(-1, first), first
        index = (near - torch.empty_like(near).exponential_().log()).argmax(-1, keepdim=True)
        best_gate = gates.argmax(-1, keepdim=True)
        whole = (index == best_gate) | (torch.rand_like(best) > MIDPOINT)
        step = torch.where(whole, 1.0, THIRD)
        weight: Tensor = _Drawn.apply(logits_TN, gates, index, step)  # type: ignore[no-untyped-call]
        return weight, index


class _Saved(Protocol):
    """What a draw keeps for its gradient."""

    saved_tensors: tuple[Tensor, ...]

    def save_for_backward(self, *tensors: Tensor) -> None: ...


class _Drawn(torch.autograd.Function):
    """The drawn gate times a step; its gradient by the logits is that of the gate, whatever the step."""

    @staticmethod
    def forward(ctx: _Saved, logits: Tensor, gates: Tensor, index: Tensor, step: Tensor) -> Tensor:
        ctx.save_for_backward(gates, index)
        return gates.gather(-1, index) * step

    @staticmethod
    def backward(ctx: _Saved, gradient: Tensor) -> tuple[Tensor | None, ...]:
        gates, index = ctx.saved_tensors
        scaled = gradient * gates.gather(-1, index)
        return (-gates * scaled).scatter_add(-1, index, scaled), None, None, None
