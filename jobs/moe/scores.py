"""Our scores: from logits [T,N] to scores [T,N]."""

from __future__ import annotations

import torch
from torch import Tensor


def softmax(logits_TN: Tensor) -> Tensor:
    """Return a distribution over the ids of each token."""
    return torch.softmax(logits_TN, dim=-1)


def sigmoid(logits_TN: Tensor) -> Tensor:
    """Return each id's own score in (0, 1)."""
    return torch.sigmoid(logits_TN)


def sqrt_softplus(logits_TN: Tensor) -> Tensor:
    """Return sqrt(log(1 + e^h)); a removed id (-inf) scores 0 and has no gradient."""
    scores = torch.nn.functional.softplus(logits_TN)
    return torch.where(scores > 0, scores, 1.0).sqrt().where(scores > 0, 0.0)
