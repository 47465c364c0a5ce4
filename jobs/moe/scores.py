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
