"""The key-value cache of a model's attention. Methods are named as those of transformers' caches: scoring uses both."""

from __future__ import annotations

import torch
from torch import Tensor

from jobs.moe.spans import SpanState


class KeyValues:
    """Keys and values [B,H,S,d] of the tokens seen, by layer, and what span routers know of a span that is open."""

    def __init__(self) -> None:
        self._layers: list[tuple[Tensor, Tensor]] = []
        self.span_states: dict[int, SpanState] = {}

    def update(self, keys: Tensor, values: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        """Add what is new of a layer, called in their order at first; return all of its keys and values."""
        if layer == len(self._layers):
            self._layers.append((keys.contiguous(), values.contiguous()))
        else:
            before = self._layers[layer]
            self._layers[layer] = torch.cat([before[0], keys], dim=-2), torch.cat([before[1], values], dim=-2)
        return self._layers[layer]

    def get_seq_length(self) -> int:
        """Return how many tokens are held."""
        return self._layers[0][0].shape[-2] if self._layers else 0

    def crop(self, change: int) -> None:
        """Drop the last `-change` tokens."""
        if change:
            self._layers = [(keys[..., :change, :], values[..., :change, :]) for keys, values in self._layers]

    def batch_select_indices(self, rows: Tensor) -> None:
        """Keep these rows of the batch."""
        self._layers = [(keys[rows], values[rows]) for keys, values in self._layers]
