"""RMS norm with its own backward: two passes over fresh memory, the others over what is still in cache."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        inverse = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, inverse, weight)
        y: Tensor = (x * inverse).mul_(weight)
        return y

    @staticmethod
    def backward(ctx: Any, d_y: Tensor) -> tuple[Tensor, Tensor | None, None]:
        x, inverse, weight = ctx.saved_tensors
        product = d_y * x
        mean = torch.mv(product.reshape(-1, x.shape[-1]), weight).view_as(inverse).div_(x.shape[-1])
        d_weight = product.mul_(inverse).reshape(-1, x.shape[-1]).sum(0) if ctx.needs_input_grad[1] else None
        # The same memory again: it is still in cache.
        d_x = torch.mul(d_y, weight, out=product).addcmul_(x, mean * inverse.square(), value=-1).mul_(inverse)
        return d_x, d_weight, None


class RMSNorm(nn.Module):
    """weight * x / rms(x), the mean square in fp32 (Zhang and Sennrich 2019, eq. 4)."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x: Tensor) -> Tensor:
        """Return the normed x [..., D] in x's dtype."""
        if x.dtype is torch.float32 and self.weight.dtype is torch.float32:
            y: Tensor = _RMSNorm.apply(x, self.weight, self.eps)  # type: ignore[no-untyped-call]
            return y
        wide = x.float()
        return self.weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)).to(x.dtype)
