"""FLOPs of the products of an operation: 2 per multiplication and addition."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

from torch import Tensor

# Of attention's forward pass: scores and their products with the values; backward recomputes the scores.
_FORWARD, _BACKWARD = 2, 5


def products(name: str, args: Sequence[object], outputs: Sequence[Tensor]) -> int:
    """Return the FLOPs of the matrix products of operation `name`; 0 for all others.

    A causal mask halves attention's. Runs of grouped products are those of all rows, however they are grouped.
    """
    operation = name.partition("::")[2]
    tensors = [arg for arg in args if isinstance(arg, Tensor)]
    if operation in ("mm", "bmm"):
        return 2 * prod(tensors[0].shape) * tensors[1].shape[-1]
    if operation in ("addmm", "addmm_", "baddbmm"):
        return 2 * prod(tensors[1].shape) * tensors[2].shape[-1]
    if operation == "_grouped_mm":
        a, b = tensors[:2]
        # Rows times one matrix each; or, over runs of the inner dimension, every column of a with its run of b.
        return 2 * prod(a.shape) * b.shape[-1]
    if operation.startswith("_scaled_dot_product"):
        backward = operation.endswith("_backward")
        q, k = tensors[1:3] if backward else tensors[:2]
        causal = any(arg is True for arg in args)
        scores = 2 * prod(q.shape) * k.shape[-2]
        return (_BACKWARD if backward else _FORWARD) * scores // (2 if causal else 1)
    return 0
