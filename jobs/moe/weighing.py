"""What a router does with rows of numbers: noise, a scale of logits, the chosen scores, their normalisation."""

from __future__ import annotations

import torch
from torch import Tensor

# The least that is divided by, or whose logarithm is taken: a token without experts has weights of 0, not NaN.
TINY = torch.finfo(torch.float32).tiny
# The same of a sum that has a gradient: that of a quotient grows with its inverse, and times 0 would be NaN.
LEAST = 1e-30


def chosen_scores(scores_TN: Tensor, indices_TK: Tensor, empty_TK: Tensor | None) -> Tensor:
    """Return the scores of the chosen ids [T,K], 0 in empty slots."""
    chosen = scores_TN.gather(1, indices_TK)
    return chosen if empty_TK is None else chosen.masked_fill(empty_TK, 0.0)


def renormalised(weights_TK: Tensor, p: float = 1.0) -> Tensor:
    """Return the weights divided by their sum over a token's slots, or by another p-norm."""
    if p == 1.0:
        return weights_TK / weights_TK.sum(-1, keepdim=True).clamp_min(LEAST)
    norm: Tensor = torch.linalg.vector_norm(weights_TK, ord=p, dim=-1, keepdim=True)
    return weights_TK / norm.clamp_min(LEAST)


def standardised(logits_TN: Tensor, std: float) -> Tensor:
    """Return logits divided by their (unbiased) standard deviation over a token's ids, times `std`; -inf stays."""
    there = logits_TN > float("-inf")
    number = there.sum(-1, keepdim=True)
    finite = torch.where(there, logits_TN, 0.0)
    off = torch.where(there, finite - finite.sum(-1, keepdim=True) / number, 0.0)
    variance = off.square().sum(-1, keepdim=True) / (number - 1).clamp_min(1)
    return logits_TN * (std / variance.clamp_min(TINY).sqrt())


def jittered(x: Tensor, by: float) -> Tensor:
    """Return x times uniform noise in 1 - by .. 1 + by (Fedus et al. 2022)."""
    return x * torch.empty_like(x).uniform_(1.0 - by, 1.0 + by) if by else x
