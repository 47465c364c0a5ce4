"""Products of fp32 matrices by the faster library: on AMD's CPUs oneDNN uses AVX-512, where MKL takes AVX2.

The choice is a fact of a process's numerics (`machine.facts`). oneDNN makes a kernel for every shape, a millisecond
each: numbers of rows that change are for it whole multiples of `ROWS`, others are left to MKL.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction, once_differentiable

from jobs.moe.host import visible
from jobs.node import machine

ROWS = 64


def fits(x: Tensor, rows: int) -> bool:
    """Return whether oneDNN multiplies x and others of its kind, of so many rows."""
    return rows > 0 and not rows % ROWS and x.dtype is torch.float32 and visible(x) and machine.has_fast_products()


def times(x_mk: Tensor, w_nk: Tensor, bias_n: Tensor | None = None) -> Tensor:
    """Return x w^T + bias [m,n] by oneDNN; `w` may be a transposed view for free, of `x` that makes a copy."""
    y: Tensor = torch.ops.mkldnn._linear_pointwise(x_mk, w_nk, bias_n, "none", [], "")
    return y


class _Product(torch.autograd.Function):
    """x w^T + bias, and its gradients, by oneDNN."""

    @staticmethod
    def forward(ctx: BackwardCFunction, x_TD: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x_TD, weight)
        return times(x_TD, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: BackwardCFunction, d_y: Tensor) -> tuple[Tensor | None, ...]:
        x_TD, weight = list(ctx.saved_tensors)
        need_x, need_weight, need_bias = list(ctx.needs_input_grad)
        d_y = d_y.contiguous()
        return (
            times(d_y, weight.t()) if need_x else None,
            times(d_y.t(), x_TD.t()) if need_weight else None,
            d_y.sum(0) if need_bias else None,
        )


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return x w^T + bias [..., n] of x [..., k], by whichever library is faster."""
    plain = type(weight) in (Tensor, nn.Parameter) and weight.dtype is torch.float32
    if not plain or torch.is_autocast_enabled(x.device.type) or not fits(x, x.numel() // max(1, x.shape[-1])):
        return F.linear(x, weight, bias)
    y: Tensor = _Product.apply(x.reshape(-1, x.shape[-1]), weight, bias)  # type: ignore[no-untyped-call]
    return y.view(*x.shape[:-1], -1)


class Linear(nn.Linear):
    """torch's linear layer, its product by whichever library is faster."""

    def forward(self, x: Tensor) -> Tensor:
        """Return x w^T + bias."""
        return linear(x, self.weight, self.bias)
