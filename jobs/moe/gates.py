"""Our gates beyond a router's own matrix."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from orchestrator.catalog.gates import Affine


class AffineGate(nn.Module):
    """W x + b, bounded by cap * tanh(. / cap): `weight` [N,D], `bias` [N]."""

    def __init__(self, ids: int, hidden_size: int, own: Affine) -> None:
        super().__init__()
        self.cap = own.cap
        self.weight = nn.Parameter(torch.empty(ids, hidden_size))
        self.bias = nn.Parameter(torch.empty(ids)) if own.bias else None

    def reset_parameters(self, std: float) -> None:
        """Draw the matrix from N(0, std); the bias starts at 0."""
        nn.init.normal_(self.weight, std=std)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x_TD: Tensor) -> Tensor:
        """Return logits [T,N] of fp32 hidden states."""
        logits = F.linear(x_TD, self.weight.float(), None if self.bias is None else self.bias.float())
        return self.cap * torch.tanh(logits / self.cap) if self.cap else logits
