"""Where values may be looked at: on a CPU for free, on a GPU never inside a layer, in a simulation not at all."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor


def visible(tensor: Tensor) -> bool:
    """Return whether a look at the values costs nothing: real memory of a CPU, and no fake tensor of a simulation."""
    return tensor.is_cpu and not _HIDDEN and not is_fake(tensor)


_HIDDEN: list[bool] = []


@contextmanager
def hidden() -> Iterator[None]:
    """Take the paths of a GPU on a CPU, so that what a simulation says of them can be measured there."""
    _HIDDEN.append(True)
    try:
        yield
    finally:
        _HIDDEN.pop()


def is_fake(tensor: Tensor) -> bool:
    """Return whether a tensor has a shape and no values (FakeTensorMode)."""
    # Imported by who makes fake tensors: sympy and what else comes with it would slow every start down.
    module = sys.modules.get("torch._subclasses.fake_tensor")
    return module is not None and isinstance(tensor, module.FakeTensor)


@cache
def know_grouped_products() -> None:
    """Let fake tensors multiply in groups in any precision: torch's own rule knows bf16 alone, its kernels more."""
    from torch._subclasses.fake_impls import op_implementations_dict, register_op_impl
    from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, in_kernel_invocation_manager

    grouped = torch.ops.aten._grouped_mm.default
    if grouped in op_implementations_dict:
        return

    def shape_of_product(
        mode: FakeTensorMode,
        function: Any,
        a: Tensor,
        b: Tensor,
        offs: Tensor | None = None,
        bias: Tensor | None = None,
        out_dtype: torch.dtype | None = None,
    ) -> Tensor:
        rows, columns = a.shape[-2], b.shape[-1]
        # Runs of rows times one matrix each; or, over runs of the inner dimension, one product each.
        groups = () if a.dim() != b.dim() else (len(offs) if a.dim() == 2 and offs is not None else len(a),)
        # Rows are padded to whole 16 bytes.
        step = 16 // a.element_size()
        width = -(-columns // step) * step
        shape, strides = (*groups, rows, columns), (*((rows * width,) if groups else ()), width, 1)
        with in_kernel_invocation_manager(mode):
            product = torch.empty_strided(shape, strides, dtype=out_dtype or a.dtype, device="meta")
        return FakeTensor(mode, product, a.device)

    register_op_impl(grouped)(shape_of_product)
