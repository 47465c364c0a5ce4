"""Low-rank adapters (LoRA, Hu et al. 2022) on single weights: W + scale B A, with A [..., r, in] and B [..., out, r].

The tensors lie beside the weight that they adapt: of `up` they are `up_lora_A`, `up_lora_B` and `up_lora_scale`.
Experts have an A and a B each.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from jobs.moe.products import Linear, linear

MARK = "_lora_"


def adapt(module: nn.Module, name: str, rank: int, alpha: float, generator: torch.Generator) -> dict[str, Tensor]:
    """Put an adapter on the weight `name` [..., out, in] of a module, and return what it begins with.

    B is 0, so that nothing changes at first. The weight may have no memory yet (meta); then its adapter has none.
    """
    weight: Tensor = getattr(module, name)
    *outer, rows, columns = weight.shape
    # peft's start: torch's of a linear layer, uniform with the bound 1 / sqrt(in).
    a = torch.empty(*outer, rank, columns).uniform_(-1, 1, generator=generator) / math.sqrt(columns)
    begun = {"A": a, "B": torch.zeros(*outer, rows, rank), "scale": torch.tensor(alpha / rank)}
    for part in ("A", "B"):
        module.register_parameter(f"{name}{MARK}{part}", nn.Parameter(begun[part].to(weight)))
    module.register_buffer(f"{name}{MARK}scale", begun["scale"].clone())
    if type(module) in (nn.Linear, Linear):
        module.__class__ = LoraLinear
    return {f"{name}{MARK}{part}": tensor for part, tensor in begun.items()}


def effective(module: nn.Module, name: str) -> Tensor:
    """Return the weight `name` of a module with its adapter, where it has one."""
    weight: Tensor = getattr(module, name)
    a: Tensor | None = getattr(module, f"{name}{MARK}A", None)
    if a is None:
        return weight
    b, scale = getattr(module, f"{name}{MARK}B"), getattr(module, f"{name}{MARK}scale")
    adapted: Tensor = weight + (scale * (b @ a)).to(weight.dtype)
    return adapted


class LoraLinear(nn.Linear):
    """A linear layer with an adapter, which is applied without making its product."""

    def forward(self, x: Tensor) -> Tensor:
        a, b, scale = (getattr(self, f"weight{MARK}{part}") for part in ("A", "B", "scale"))
        y = linear(x, self.weight, self.bias)
        adapted: Tensor = y + scale.to(y.dtype) * F.linear(F.linear(x, a), b)
        return adapted
