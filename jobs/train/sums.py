"""Sums over the micro-batches and ranks of a step."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from jobs.train.engine import Engine


class Sums:
    """Named tensors summed over micro-batches, then over ranks as one vector, then read with one look at the host."""

    def __init__(self) -> None:
        self._tensors: dict[str, Tensor] = {}

    def add(self, name: str, value: Tensor, weight: float = 1.0) -> None:
        """Add `weight * value` to the sum of this name (in fp64)."""
        value = value.detach().double() * weight
        known = self._tensors.get(name)
        self._tensors[name] = value if known is None else known + value

    def layout(self) -> dict[str, torch.Size]:
        """Return the shape of every sum, in order."""
        return {name: tensor.shape for name, tensor in self._tensors.items()}

    def fill(self, layout: Mapping[str, torch.Size], device: torch.device) -> None:
        """Make the sums those of `layout`, in its order; what is missing is zero."""
        missing = {name: torch.zeros(shape, dtype=torch.float64, device=device) for name, shape in layout.items()}
        self._tensors = missing | self._tensors

    def reduce(self, engine: Engine, after: Tensor) -> tuple[dict[str, Tensor], dict[str, list[float]], float]:
        """Return the sums over ranks as tensors and as flat lists, and the scalar `after`, which is not summed."""
        sizes = [tensor.numel() for tensor in self._tensors.values()]
        flat = engine.sum_over_ranks(torch.cat([tensor.reshape(-1) for tensor in self._tensors.values()]))
        tensors = {
            name: part.view(self._tensors[name].shape)
            for name, part in zip(self._tensors, flat.split(sizes), strict=True)
        }
        values = torch.cat([flat, after.detach().double().reshape(1)]).tolist()
        lists, first = {}, 0
        for name, size in zip(self._tensors, sizes, strict=True):
            lists[name] = values[first : first + size]
            first += size
        return tensors, lists, values[-1]
