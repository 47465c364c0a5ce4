"""The one record of a routing decision: losses, metrics, interventions and plots read only this."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor

from jobs.moe.balance import layer_losses
from jobs.moe.selection import count


@dataclass
class Routing:
    """What one MoE layer decided for T = batch * sequence tokens over N router ids, K slots a token.

    Slots that hold no expert have index -1 and weight 0; padding tokens hold only such slots. Within a token, slots are
    in rank order (best first). `counts` are the assignments to each id.
    """

    logits: Tensor  # [T,N] fp32, before the score's own temperature; -inf where an intervention removed an expert
    scores: Tensor  # [T,N] fp32
    indices: Tensor  # [T,K] router ids, -1 = empty slot
    weights: Tensor  # [T,K] fp32, 0 in empty slots
    mask: Tensor  # [T] bool, True = a real token
    counts: Tensor  # [N]
    batch: int
    top_k: int
    num_experts: int  # physical routed experts; router ids may be more (MoE++, TC-MoE)
    padded: bool = False  # False promises that `mask` is all True
    full: bool = False  # True promises that no slot is empty
    softmax: bool = True  # scores are a softmax over the ids
    physical: Tensor | None = None  # [N] router id -> physical expert, -1 = none; None = the identity
    null: tuple[int, int] | None = None  # the ids [a, b) of TC-MoE's null experts
    cost: Tensor | None = None  # [N] eta of MoE++'s heterogeneous load loss
    cutoffs: Tensor | None = None  # [N] expert choice: mean over groups of the C-th best score
    asked: Tensor | None = None  # [T,K] ids before some were dropped for want of capacity; None = `indices`
    shared: Tensor | None = None  # [T,n] weights of the shared experts, where the router weighs them
    tempered: Tensor | None = field(default=None, repr=False)  # [T,N] the z-loss's logits, where not `logits`
    carried: Tensor | None = field(default=None, repr=False)  # [T,...] for the next layer's router

    @property
    def num_ids(self) -> int:
        return self.logits.shape[1]

    @cached_property
    def probabilities(self) -> Tensor:
        """Return p [T,N], a distribution over the ids: the scores, or softmax(h) when scores are sigmoids."""
        return self.scores if self.softmax else torch.softmax(self.logits, dim=-1)

    def expert_indices(self) -> Tensor:
        """Return `indices` as physical experts [T,K]; -1 also for slots without one (null, zero, copy, constant)."""
        return to_physical(self.indices, self.physical)

    def expert_counts(self) -> Tensor:
        """Return the assignments to each physical expert [num_experts]."""
        if self.physical is None:
            return self.counts
        real = self.physical >= 0
        counts = torch.zeros(self.num_experts, dtype=self.counts.dtype, device=self.counts.device)
        return counts.index_add_(0, self.physical[real], self.counts[real])

    def split(self, sizes: Sequence[int]) -> list[Routing]:
        """Return the records of stretches of so many tokens, each of which is a batch of one row; nothing is carried.

        Tokens choose one by one: there are no `cutoffs`.
        """
        stretched = ("logits", "scores", "indices", "weights", "mask", "asked", "shared", "tempered")
        parts = {name: x.split(list(sizes)) for name in stretched if (x := getattr(self, name)) is not None}
        found = []
        for number in range(len(sizes)):
            own = {name: part[number] for name, part in parts.items()}
            counts = count(own["indices"], self.num_ids, full=self.full)
            found.append(replace(self, **own, counts=counts, batch=1, carried=None))
        return found

    def losses(self) -> dict[str, Tensor]:
        """Return every loss of this layer by variant name, with coefficient 1 (MOE losses of `jobs.moe.balance`)."""
        return layer_losses(self)


def to_physical(indices_TK: Tensor, physical: Tensor | None) -> Tensor:
    """Map router ids to physical experts; -1 stays -1."""
    if physical is None:
        return indices_TK
    return torch.where(indices_TK < 0, indices_TK, physical[indices_TK.clamp_min(0)])
