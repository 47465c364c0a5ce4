"""MoE++: zero, copy and constant experts beside the FFN ones, and a residual between gates."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from jobs.moe.routers.base import Context, Extras, Part, Router
from jobs.moe.weighing import chosen_scores, renormalised


class MoEPlusPlus(Router):
    """MoE++: ids are the FFN experts, then constant, copy and zero experts.

    `residual` [N,N] adds the previous layer's logits; with two gating layers, `hidden` [8N,D], tanh, `weight` [N,8N].
    """

    COST_OF_SPECIAL = 0.75  # tau, eta of every expert that is no FFN
    cost: Tensor

    def count_ids(self) -> int:
        moe = self.moe
        return moe.num_experts + moe.constant_experts + moe.copy_experts + moe.zero_experts

    def physical_ids(self) -> Tensor:
        ids = torch.arange(self.num_ids)
        return torch.where(ids < self.moe.num_experts, ids, -1)

    def build(self) -> None:
        width = self.hidden_size
        if self.moe.gating_layers == 2:
            width = 8 * self.num_ids
            self.hidden = nn.Parameter(torch.empty(width, self.hidden_size))
        self.weight = nn.Parameter(torch.empty(self.num_ids, width))
        self.residual: nn.Parameter | None = None
        if self.moe.gating_residual:
            self.residual = nn.Parameter(torch.empty(self.num_ids, self.num_ids))
        cost = torch.where(self.physical_ids() >= 0, 1.0, self.COST_OF_SPECIAL)
        self.register_buffer("cost", cost, persistent=False)

    def reset_parameters(self) -> None:
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=self.moe.router_init_std)

    def logits(self, x_TD: Tensor, context: Context) -> Tensor:
        hidden = torch.tanh(F.linear(x_TD, self.hidden.float())) if self.moe.gating_layers == 2 else x_TD
        logits = F.linear(hidden, self.weight.float())
        if self.residual is not None and context.previous is not None:
            logits = logits + F.linear(context.previous, self.residual.float())
        return logits

    def weigh(self, scores_TN: Tensor, indices_TK: Tensor, empty_TK: Tensor | None) -> Tensor:
        if self.moe.variant != "reference":
            return super().weigh(scores_TN, indices_TK, empty_TK)
        zero = indices_TK >= self.num_ids - self.moe.zero_experts
        return renormalised(chosen_scores(scores_TN, indices_TK, empty_TK).masked_fill(zero, 0.0))

    @property
    def input_scale(self) -> float:
        # The released layer feeds k * x to every expert.
        return float(self.moe.top_k) if self.moe.variant == "reference" else 1.0

    def first_layer(self) -> None:
        # No layer stands before the first: a weight without a gradient would stop data-parallel training.
        self.residual = None

    def parts(self) -> dict[str, Part]:
        constants = self.moe.constant_experts
        return {"constant": ConstantExperts(constants, self.hidden_size)} if constants else {}

    def special(self, x_TD: Tensor, indices_TK: Tensor, weights_TK: Tensor, parts: Mapping[str, Part]) -> Tensor | None:
        """Return the share of constant and copy experts; zero experts add nothing."""
        per_id = weights_TK.new_zeros(len(x_TD), self.num_ids + 1)
        slots = torch.where(indices_TK < 0, self.num_ids, indices_TK)
        per_id = per_id.scatter_add(1, slots, weights_TK).to(x_TD.dtype)
        first = self.moe.num_experts
        copies = first + self.moe.constant_experts
        scale = per_id[:, copies : copies + self.moe.copy_experts].sum(-1, keepdim=True)
        if "constant" not in parts:
            return scale * x_TD
        kept, value = parts["constant"](x_TD, per_id[:, first:copies])
        mixed: Tensor = (scale + kept) * x_TD + value
        return mixed

    def extras(self) -> Extras:
        return {"cost": self.cost}


class ConstantExperts(Part):
    """MoE++'s constant experts: a * x + b * v with [a, b] = softmax(W x). `router` [n,2,D], `value` [n,D]."""

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
        logits = torch.einsum("td,ncd->tnc", x_TD, self.router).float()
        mix = (torch.softmax(logits, dim=-1) * weights_Tn.unsqueeze(-1)).to(x_TD.dtype)
        return mix[..., 0].sum(-1, keepdim=True), mix[..., 1] @ self.value
