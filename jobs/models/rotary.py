"""Rotary positions (RoFormer): their frequencies, stretched for longer contexts, and the rotation in few passes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from jobs.moe.host import is_fake, visible
from orchestrator.spec.attention import RopeSpec


class _Rotary(torch.autograd.Function):
    """x * cos + rotate_half(x) * sin (RoFormer, eq. 34); its gradient is the rotation by the opposite angle."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotate(x, cos, sin, 1)

    @staticmethod
    def backward(ctx: Any, d_y: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _rotate(d_y, cos, sin, -1), None, None


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, sign: int) -> Tensor:
    half = x.shape[-1] // 2
    # Contiguous, whatever the layout of x.
    y = torch.mul(x, cos, out=x.new_empty(x.shape))
    y[..., :half].addcmul_(x[..., half:], sin[..., :half], value=-sign)
    y[..., half:].addcmul_(x[..., :half], sin[..., half:], value=sign)
    return y


@dataclass(frozen=True)  # no slots: DeepSpeed's hooks read what a module returns from its __dict__
class Angles:
    """Cosines and sines [B or 1,S,head_dim] of the positions of one forward pass, each angle twice: for both halves."""

    cos: Tensor
    sin: Tensor
    _rows: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def turn(self, x_BSD: Tensor) -> Tensor:
        """Return the heads [B,H,S,d] of [B,S,H d], turned by their positions."""
        batch, length, width = x_BSD.shape
        heads = width // self.cos.shape[-1]
        if not visible(x_BSD):
            x_BSHd = x_BSD.view(batch, length, heads, -1)
            turned: Tensor = _Rotary.apply(x_BSHd, self.cos.unsqueeze(2), self.sin.unsqueeze(2))  # type: ignore[no-untyped-call]
            return turned.transpose(1, 2)
        rows = x_BSD.reshape(batch, length * heads, -1)
        turned = _Rotary.apply(rows, *self._of_heads(heads))  # type: ignore[no-untyped-call]
        return turned.view(batch, length, heads, -1).transpose(1, 2)

    def at(self, places: Tensor) -> Angles:
        """Return the angles of some of one row's tokens."""
        return Angles(self.cos[:, places], self.sin[:, places])

    def _of_heads(self, heads: int) -> tuple[Tensor, Tensor]:
        """Return a table row for each head of each position: a CPU runs over whole rows faster than over heads."""
        if heads not in self._rows:
            cos, sin = (table.unsqueeze(2).expand(-1, -1, heads, -1).flatten(1, 2) for table in (self.cos, self.sin))
            self._rows[heads] = cos, sin
        return self._rows[heads]


class RotaryTables(nn.Module):
    """Cosines and sines of the angles of rotary positions: position * theta^(-2i/d) (RoFormer, eq. 15)."""

    inv_freq: Tensor

    def __init__(self, width: int, theta: float, rope: RopeSpec | None = None) -> None:
        """`width` is what turns of a head; `rope` says how its frequencies are stretched."""
        super().__init__()
        self.width, self.theta, self.rope = width, theta, rope or RopeSpec()
        self.factor = self.rope.table_factor
        self.register_buffer("inv_freq", frequencies(width, theta, self.rope), persistent=False)

    @torch.no_grad()
    def forward(self, positions_BS: Tensor, dtype: torch.dtype) -> Angles:
        """Return the angles of positions [B,S] in a type."""
        inv_freq = self._frequencies(positions_BS).to(device=positions_BS.device, dtype=torch.float)
        angles = positions_BS[..., None].float() * inv_freq
        twice = torch.cat((angles, angles), dim=-1)
        cos, sin = twice.cos(), twice.sin()
        if self.factor != 1.0:
            cos, sin = cos * self.factor, sin * self.factor
        return Angles(cos.to(dtype), sin.to(dtype))

    def _frequencies(self, positions_BS: Tensor) -> Tensor:
        """Return the frequencies of sequences that end with these positions."""
        if self.rope.scaling not in ("dynamic", "longrope") or not positions_BS.numel() or is_fake(positions_BS):
            return self.inv_freq
        length = int(positions_BS.max()) + 1
        if length <= self.rope.original_context:
            return self.inv_freq
        if self.rope.scaling == "longrope":
            return divided(self.rope.long_factor, self.width, self.theta)
        return frequencies(self.width, grown(self.theta, self.width, length, self.rope), RopeSpec())


def frequencies(width: int, theta: float, rope: RopeSpec) -> Tensor:
    """Return the frequencies [width / 2] of sequences within the context (`RopeSpec.scaling` says how stretched)."""
    plain = 1.0 / (theta ** (torch.arange(0, width, 2, dtype=torch.float) / width))
    if rope.scaling == "linear":
        return plain / rope.factor
    if rope.scaling == "llama3":
        return slowed(plain, rope)
    if rope.scaling == "longrope":
        return divided(rope.short_factor, width, theta)
    return stretched(plain, theta, rope) if rope.scaling == "yarn" else plain


def divided(factors: Sequence[float], width: int, theta: float) -> Tensor:
    """Return the frequencies [width / 2], each divided by a factor of its own (LongRoPE)."""
    return 1.0 / (torch.tensor(factors) * theta ** (torch.arange(0, width, 2, dtype=torch.float) / width))


def grown(theta: float, width: int, length: int, rope: RopeSpec) -> float:
    """Return the base for sequences of `length` beyond the context (dynamic NTK-aware scaling)."""
    beyond = rope.factor * length / rope.original_context - (rope.factor - 1)
    return float(theta * beyond ** (width / (width - 2)))


def slowed(frequencies_d: Tensor, rope: RopeSpec) -> Tensor:
    """Return the frequencies of a longer context as Llama 3.1 stretches them.

    Those that turn `high_freq_factor` times or more in the original context stay, those that turn fewer than
    `low_freq_factor` times are divided by `factor`, and between the two by a ramp over the rotations.
    """
    low, high = rope.low_freq_factor, rope.high_freq_factor
    rotations = rope.original_context / (2 * math.pi / frequencies_d)
    kept = ((rotations - low) / (high - low)).clamp(0, 1)
    return frequencies_d / rope.factor * (1 - kept) + frequencies_d * kept


def stretched(frequencies_d: Tensor, theta: float, rope: RopeSpec) -> Tensor:
    """Return the frequencies of a longer context by YaRN (Peng et al. 2024, eq. 17 and 23).

    Those that turn more than `beta_fast` times in the original context stay, those below `beta_slow` are divided by
    `factor`, and between the two by a ramp over the dimensions.
    """
    pairs = len(frequencies_d)

    def dimension(rotations: float) -> float:
        return pairs * math.log(rope.original_context / (rotations * 2 * math.pi)) / math.log(theta)

    low, high = dimension(rope.beta_fast), dimension(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, 2 * pairs - 1)
    # Where both bounds are one dimension, the ramp is a step.
    ramp = ((torch.arange(pairs, dtype=torch.float) - low) / ((high - low) or 0.001)).clamp(0, 1)
    return frequencies_d / rope.factor * ramp + frequencies_d * (1 - ramp)
