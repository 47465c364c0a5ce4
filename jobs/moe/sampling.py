"""Selections that draw a token's second experts in training (GShard, Lepikhin et al. 2020)."""

from __future__ import annotations

import torch
from torch import Tensor

from jobs.moe.selection import top_k
from jobs.moe.weighing import TINY


@torch.no_grad()
def sampled_others(values_TN: Tensor, k: int) -> Tensor:
    """Return the best id and k - 1 others [T,k], drawn without replacement in proportion to their values (Gumbel)."""
    first = top_k(values_TN, 1)
    noise = -torch.empty_like(values_TN).exponential_().clamp_min(TINY).log()
    gone = values_TN == float("-inf")
    noisy = (values_TN.clamp_min(TINY).log() + noise).masked_fill(gone, float("-inf")).scatter(1, first, float("-inf"))
    return torch.cat([first, top_k(noisy, k - 1)], dim=1) if k > 1 else first


@torch.no_grad()
def random_others(values_TN: Tensor, k: int) -> Tensor:
    """Return the k best ids [T,k]; each after the first stays with probability 2 value, and is -1 else."""
    chosen = top_k(values_TN, k)
    values = values_TN.gather(1, chosen)
    stays = 2 * values > torch.rand_like(values)
    stays[:, 0] = True
    return torch.where(stays, chosen, -1)
