"""The key-value cache of a model's attention. Methods are named as those of transformers' caches: scoring uses both."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from jobs.moe.spans import SpanState

# A layer that grows is given room for so many more tokens, and an eighth: few tokens are then copied more than once.
ROOM = 64


@dataclass(slots=True)
class _Layer:
    """One layer's keys and values [B,H,room,d], of which the first `length` tokens are filled."""

    keys: Tensor
    values: Tensor
    length: int

    def add(self, keys: Tensor, values: Tensor) -> None:
        """Write new tokens behind those that are held."""
        length = self.length + keys.shape[-2]
        if length > self.keys.shape[-2]:
            self.keys, self.values = (self._wider(held, length) for held in (self.keys, self.values))
        self.keys[..., self.length : length, :] = keys
        self.values[..., self.length : length, :] = values
        self.length = length

    def filled(self) -> tuple[Tensor, Tensor]:
        """Return the keys and values that are held."""
        return self.keys[..., : self.length, :], self.values[..., : self.length, :]

    def _wider(self, held: Tensor, length: int) -> Tensor:
        batch, heads, _, width = held.shape
        wider = held.new_empty(batch, heads, length + length // 8 + ROOM, width)
        wider[..., : self.length, :] = held[..., : self.length, :]
        return wider


def behind(shared: tuple[Tensor, Tensor], own: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Return keys and values [B,H,P + L,d] of rows that go on from a prefix [1,H,P,d]."""
    first, second = (torch.cat([s.expand(len(x), -1, -1, -1), x], 2) for s, x in zip(shared, own, strict=True))
    return first, second


class KeyValues:
    """Keys and values [B,H,S,d] of the tokens seen, by layer, and what span routers know of a span that is open.

    It is for inference: tokens are written in place, so a gradient through an earlier step's keys is refused by torch.
    Rows that go on from one prefix share its keys and values: they are held once, `prefix` returns them.
    """

    def __init__(self) -> None:
        self._layers: list[_Layer] = []
        self._shared: list[tuple[Tensor, Tensor]] = []
        self._positions: Tensor | None = None
        self.span_states: dict[int, SpanState] = {}

    def update(self, keys: Tensor, values: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        """Add what is new of a layer, called in their order at first; return its keys and values behind the prefix."""
        if layer == len(self._layers):
            self._layers.append(_Layer(keys.contiguous(), values.contiguous(), keys.shape[-2]))
        else:
            self._layers[layer].add(keys, values)
        return self._layers[layer].filled()

    def prefix(self, layer: int) -> tuple[Tensor, Tensor] | None:
        """Return a layer's keys and values [1,H,P,d] that all rows share, if they share any."""
        return self._shared[layer] if self._shared else None

    def place(self, positions: Tensor, batch: int) -> Tensor:
        """Add the positions [B or 1,S] of what is new; return those of all tokens [B,S], in which windows count."""
        fresh = positions.expand(batch, -1)
        self._positions = fresh if self._positions is None else torch.cat([self._positions, fresh], dim=-1)
        return self._positions

    def get_seq_length(self) -> int:
        """Return how many tokens of a row are held."""
        shared = self._shared[0][0].shape[-2] if self._shared else 0
        return shared + (self._layers[0].length if self._layers else 0)

    def crop(self, change: int) -> None:
        """Drop the last `-change` tokens."""
        for layer in self._layers:
            layer.length += change
        if self._positions is not None:
            self._positions = self._positions[:, : self._positions.shape[1] + change]

    def deal(self, places_BL: Tensor, shared: int) -> None:
        """Lay the tokens of one row out as rows [B,L] by their places; all of them go on from the first `shared`."""
        if shared:  # copied, so that the row itself is not held beside what is dealt
            front = [[held[..., :shared, :].clone() for held in layer] for layer in self._filled()]
            self._shared = [(keys, values) for keys, values in front]
        dealt = [[held[0][:, places_BL].transpose(0, 1).contiguous() for held in layer] for layer in self._filled()]
        self._layers = [_Layer(keys, values, places_BL.shape[1]) for keys, values in dealt]
        if self._positions is not None:
            before = self._positions[:, :shared].expand(len(places_BL), -1)
            self._positions = torch.cat([before, self._positions[0][places_BL]], dim=-1)

    def _filled(self) -> list[tuple[Tensor, Tensor]]:
        return [layer.filled() for layer in self._layers]

    def batch_select_indices(self, rows: Tensor) -> None:
        """Keep these rows of the batch."""
        for layer in self._layers:
            layer.keys, layer.values = layer.keys[rows], layer.values[rows]
        if self._positions is not None:
            self._positions = self._positions[rows]

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Make every row of the batch so many equal ones; those of a single row share what it holds."""
        if self._positions is not None:
            self._positions = self._positions.repeat_interleave(repeats, dim=0)
        if self._layers and not self._shared and len(self._layers[0].keys) == 1:
            self._shared = [held.filled() for held in self._layers]
            self._layers = []
            return
        for layer in self._layers:
            layer.keys, layer.values = (held.repeat_interleave(repeats, dim=0) for held in (layer.keys, layer.values))
