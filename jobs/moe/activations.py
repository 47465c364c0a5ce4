"""Activations of our expert forms beyond torch's own."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from orchestrator.catalog.experts import Clamped, Shifted, SoftCaps


def relu_squared(x: Tensor) -> Tensor:
    """Return relu(x)^2 (So et al. 2021, Primer)."""
    return F.relu(x).square()


def gelu_tanh(x: Tensor) -> Tensor:
    """Return GELU in its tanh approximation (Hendrycks and Gimpel 2016)."""
    return F.gelu(x, approximate="tanh")


def swiglu_clamped(gate: Tensor, up: Tensor, own: Clamped) -> Tensor:
    """Return silu(min(gate, limit)) * clamp(up, -limit, limit), or min(silu(gate), limit) `after`."""
    gated = F.silu(gate).clamp(max=own.limit) if own.after else F.silu(gate.clamp(max=own.limit))
    return gated * up.clamp(-own.limit, own.limit)


def swiglu_shifted(gate: Tensor, up: Tensor, own: Shifted) -> Tensor:
    """Return g * sigmoid(alpha g) * (u + 1) of g = min(gate, limit), u = clamp(up, -limit, limit) (GPT-OSS)."""
    gate, up = gate.clamp(max=own.limit), up.clamp(-own.limit, own.limit)
    return gate * torch.sigmoid(own.alpha * gate) * (up + 1.0)


def swiglu_softcapped(gate: Tensor, up: Tensor, own: SoftCaps) -> Tensor:
    """Return cap(gate) * sigmoid(gate) * cap(up), cap(x) = c * tanh(x / c)."""
    capped = own.gate_cap * torch.tanh(gate / own.gate_cap)
    return capped * torch.sigmoid(gate) * (own.up_cap * torch.tanh(up / own.up_cap))
