"""Which token goes to which expert, sorted by expert."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from jobs.moe.selection import count


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
