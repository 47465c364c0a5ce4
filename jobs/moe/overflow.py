"""Experts that take no more than so many tokens: what is above is dropped."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from jobs.moe.selection import count
from orchestrator.catalog.overflows import Capacity


@dataclass(frozen=True)
class Asked:
    """What tokens ask for: T = batch * length tokens, K ids each in rank order."""

    indices: Tensor  # [T,K] ids, -1 = an empty slot or padding
    scores: Tensor  # [T,N]
    mask: Tensor  # [T] bool, True = a real token
    batch: int
    training: bool

    @property
    def num_ids(self) -> int:
        return self.scores.shape[1]


@torch.no_grad()
def capacity(asked: Asked, own: Capacity) -> Tensor:
    """Return which assignments [T,K] are among the first C of their expert and group (GShard, Lepikhin et al. 2020).

    C counts real tokens. All first choices come before all second ones; among them earlier tokens first, or those with
    the higher best score.
    """
    tokens, slots = asked.indices.shape
    groups = asked.batch if own.group == "sequence" else 1
    device, num = asked.indices.device, asked.num_ids
    if not tokens:
        return torch.ones_like(asked.indices, dtype=torch.bool)
    real = asked.mask.view(groups, -1).sum(1)
    if own.eval_fraction and not asked.training:
        most = (own.eval_fraction * real.double()).ceil()
    elif own.tokens:
        most = torch.full_like(real, own.tokens)
    else:
        most = (own.factor * ((real + num - 1) // num).double()).floor()
    # Each slot's place in the queue: by rank, then by token.
    turn = torch.arange(tokens, device=device)
    if own.order == "score":
        best = asked.scores.detach().amax(-1)
        turn = torch.argsort(torch.argsort(best, descending=True, stable=True))
    place = turn.unsqueeze(1) + tokens * torch.arange(slots, device=device)
    group = torch.arange(tokens, device=device) // (tokens // groups)
    queue = torch.where(asked.indices < 0, -1, group.unsqueeze(1) * num + asked.indices).reshape(-1)
    in_turn = torch.argsort(place.reshape(-1), stable=True)
    order = in_turn[torch.argsort(queue[in_turn], stable=True)]
    lengths = count(queue, groups * num)
    starts = torch.cat([lengths.new_zeros(1), (len(queue) - lengths.sum() + lengths.cumsum(0) - lengths)])
    rank = torch.arange(len(queue), device=device) - starts[queue[order] + 1]
    ranks = torch.empty_like(rank).index_copy_(0, order, rank).view(tokens, slots)
    return (asked.indices >= 0) & (ranks < most[group].unsqueeze(1))
