"""Activations of our expert forms beyond torch's own."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from orchestrator.catalog.experts import Limit, Shifted


def relu_squared(x: Tensor) -> Tensor:
    """Return relu(x)^2 (So et al. 2021, Primer)."""
    return F.relu(x).square()


def gelu_tanh(x: Tensor) -> Tensor:
    """Return GELU in its tanh approximation (Hendrycks and Gimpel 2016)."""
    return F.gelu(x, approximate="tanh")


def swiglu_clamped(gate: Tensor, up: Tensor, own: Limit) -> Tensor:
    """Return silu(min(gate, limit)) * clamp(up, -limit, limit)."""
    return F.silu(gate.clamp(max=own.limit)) * up.clamp(-own.limit, own.limit)


def swiglu_shifted(gate: Tensor, up: Tensor, own: Shifted) -> Tensor:
    """Return g * sigmoid(alpha g) * (u + 1) of g = min(gate, limit), u = clamp(up, -limit, limit) (GPT-OSS)."""
    gate, up = gate.clamp(max=own.limit), up.clamp(-own.limit, own.limit)
    return gate * torch.sigmoid(own.alpha * gate) * (up + 1.0)
