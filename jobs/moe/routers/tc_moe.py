"""TC-MoE: ternary choices, an expert's output, its negative, or nothing."""

from __future__ import annotations

import torch
from torch import Tensor

from jobs.moe.routers.base import Extras, Router
from jobs.moe.weighing import TINY, chosen_scores


class TCMoE(Router):
    """TC-MoE: ids are E positive, E negative (output times -1), then null experts; `weight` [2E + null, D]."""

    offset: Tensor

    def count_ids(self) -> int:
        return 2 * self.moe.num_experts + self.moe.null_experts

    def physical_ids(self) -> Tensor:
        experts = torch.arange(self.moe.num_experts)
        return torch.cat([experts, experts, torch.full((self.moe.null_experts,), -1)])

    def build(self) -> None:
        super().build()
        experts, nulls = self.moe.num_experts, self.moe.null_experts
        parts = [torch.full((size,), value) for size, value in ((experts, 0.0), (experts, 1.0), (nulls, 10.0))]
        self.register_buffer("offset", torch.cat(parts), persistent=False)

    def tempered(self, logits_TN: Tensor) -> Tensor:
        return logits_TN / self.fixed_temperature - self.offset

    def weigh(self, scores_TN: Tensor, indices_TK: Tensor, empty_TK: Tensor | None) -> Tensor:
        first_null = 2 * self.moe.num_experts
        chosen = chosen_scores(scores_TN, indices_TK, empty_TK)
        real = torch.where(indices_TK < first_null, chosen, 0.0)
        total = real.sum(-1, keepdim=True) + scores_TN[:, first_null:].sum(-1, keepdim=True)
        return real / total.clamp_min(TINY)

    def signed(self, indices_TK: Tensor, weights_TK: Tensor) -> Tensor:
        # The negative ids' sign rides on the weight of the physical expert.
        return torch.where(indices_TK >= self.moe.num_experts, -weights_TK, weights_TK)

    def extras(self) -> Extras:
        return {"null": (2 * self.moe.num_experts, self.num_ids)}
