"""RMS norm with its own backward: two passes over fresh memory, the others over what is still in cache."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from jobs.moe.host import visible


class _RMSNorm(torch.autograd.Function):
    """Keeps its input and one number a row, as torch's fused kernel does; computes in fp32."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = x.float()
        inverse = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, inverse, weight)
        y: Tensor = (wide * inverse).mul_(weight).to(x.dtype)
        return y

    @staticmethod
    def backward(ctx: Any, d_y: Tensor) -> tuple[Tensor, Tensor | None, None]:
        x, inverse, weight = ctx.saved_tensors
        dtype, x, d_y, wide = x.dtype, x.float(), d_y.float(), weight.float()
        product = d_y * x
        mean = torch.mv(product.reshape(-1, x.shape[-1]), wide).view_as(inverse).div_(x.shape[-1])
        d_weight = None
        if ctx.needs_input_grad[1]:
            d_weight = product.mul_(inverse).reshape(-1, x.shape[-1]).sum(0).to(weight.dtype)
        # The same memory again: it is still in cache.
        d_x = torch.mul(d_y, wide, out=product).addcmul_(x, mean * inverse.square(), value=-1).mul_(inverse)
        return d_x.to(dtype), d_weight, None


class RMSNorm(nn.Module):
    """weight * x / rms(x), the mean square in fp32 (Zhang and Sennrich 2019, eq. 4)."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x: Tensor) -> Tensor:
        """Return the normed x [..., D] in x's dtype."""
        if x.is_cuda:  # there it is one kernel
            return F.rms_norm(x, (x.shape[-1],), self.weight, self.eps).to(x.dtype)
        if not visible(x) or (x.dtype is torch.float32 and self.weight.dtype is torch.float32):
            y: Tensor = _RMSNorm.apply(x, self.weight, self.eps)  # type: ignore[no-untyped-call]
            return y
        wide = x.float()
        return self.weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)).to(x.dtype)
