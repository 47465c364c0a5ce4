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
    full: bool = False  # True promises that no slot is empty

    def place(self) -> Tensor:
        """Return where each slot [T,K] is in `order`."""
        ranks = torch.arange(len(self.order), device=self.order.device)
        return torch.empty_like(ranks).index_copy_(0, self.order, ranks).view(-1, self.slots)

    def ends(self) -> Tensor:
        """Return where each expert's run ends [N], as grouped kernels want it."""
        return self.counts.cumsum(0, dtype=torch.int32)

    def rest(self) -> Tensor | None:
        """Return which rows of `order` [S,1] are in no run; None where all slots are filled."""
        if self.full:
            return None
        return (torch.arange(len(self.order), device=self.order.device) >= self.counts.sum()).unsqueeze(-1)


def dispatch(experts_TK: Tensor, num_experts: int, counts_N: Tensor | None = None) -> Dispatch:
    """Sort the slots by expert; empty slots (-1) come last and are in no expert's run.

    Who knows how often each expert was chosen, and that no slot is empty, gives `counts_N`.
    """
    flat, slots = experts_TK.reshape(-1), experts_TK.shape[1]
    key = torch.where(flat < 0, num_experts, flat) if counts_N is None else flat
    order = torch.argsort(key, stable=True)
    counts = count(flat, num_experts) if counts_N is None else counts_N
    return Dispatch(order, order // slots, counts, slots, counts_N is not None)
