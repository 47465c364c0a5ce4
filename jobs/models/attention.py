"""Self-attention with rotary positions: grouped heads, causal mask and cache, the rotation in few passes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from jobs.models.key_values import KeyValues
from jobs.models.norm import RMSNorm
from jobs.moe.host import is_fake, visible
from orchestrator.spec.model import Model


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


@dataclass(frozen=True, slots=True)
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

    def _of_heads(self, heads: int) -> tuple[Tensor, Tensor]:
        """Return a table row for each head of each position: a CPU runs over whole rows faster than over heads."""
        if heads not in self._rows:
            cos, sin = (table.unsqueeze(2).expand(-1, -1, heads, -1).flatten(1, 2) for table in (self.cos, self.sin))
            self._rows[heads] = cos, sin
        return self._rows[heads]


class RotaryTables(nn.Module):
    """Cosines and sines of the angles of rotary positions: position * theta^(-2i/d) (RoFormer, eq. 15)."""

    inv_freq: Tensor

    def __init__(self, head_dim: int, theta: float) -> None:
        super().__init__()
        frequencies = 1.0 / (theta ** (torch.arange(0, head_dim, 2, dtype=torch.float) / head_dim))
        self.register_buffer("inv_freq", frequencies, persistent=False)

    @torch.no_grad()
    def forward(self, positions_BS: Tensor, dtype: torch.dtype) -> Angles:
        """Return the angles of positions [B,S] in a type."""
        angles = positions_BS[..., None].float() * self.inv_freq.to(device=positions_BS.device, dtype=torch.float)
        twice = torch.cat((angles, angles), dim=-1)
        return Angles(twice.cos().to(dtype), twice.sin().to(dtype))


def causal_mask(given: Tensor | None, batch: int, length: int, past: int, device: torch.device) -> Tensor | None:
    """Return which keys each query may see [B,1,S,past+S], None where the kernel's own causal mask says the same.

    `given` [B,past+S] is 1 for real tokens; a mask of four dimensions is taken as it is.
    """
    if given is not None and given.dim() == 4:
        return given
    total = past + length
    real = None if given is None else given.to(device=device, dtype=torch.bool)
    if length in (1, total) and (real is None or (not is_fake(real) and bool(real.all()))):
        return None
    places = torch.arange(total, device=device)
    seen = places <= places[past:, None]
    if real is None:
        return seen.expand(batch, 1, -1, -1)
    return seen & real[:, None, None, :]


def behind_prefix(q: Tensor, prefix: tuple[Tensor, Tensor], k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Return softmax(q k / sqrt(d)) v [B,H,1,d] of one query a row over a prefix of all rows and a row's own keys.

    `prefix` are keys and values [1,G,P,d], read once for the whole batch: all rows' queries are one matrix. `k`, `v`
    [B,G,L,d]; `mask` [B,1,1,P + L] is False where a key is not seen, None: all are.
    """
    groups, front = k.shape[1], prefix[0].shape[-2]
    rows = q.unflatten(1, (groups, -1)).squeeze(3) * q.shape[-1] ** -0.5  # [B,G,h,d]
    side_by_side = rows.transpose(0, 1)  # [G,B,h,d]
    shared = (side_by_side.flatten(1, 2) @ prefix[0][0].mT).float().unflatten(1, side_by_side.shape[1:3])
    own = (rows @ k.mT).float()
    if mask is not None:
        shared.masked_fill_(~mask[None, :, 0, :, :front], -torch.inf)
        own.masked_fill_(~mask[:, :, 0, None, front:], -torch.inf)
    largest = torch.maximum(shared.amax(-1, keepdim=True).transpose(0, 1), own.amax(-1, keepdim=True))
    shared.sub_(largest.transpose(0, 1)).exp_()
    own.sub_(largest).exp_()
    total = shared.sum(-1, keepdim=True).transpose(0, 1) + own.sum(-1, keepdim=True)
    mixed = (shared.to(v.dtype).flatten(1, 2) @ prefix[1][0]).unflatten(1, side_by_side.shape[1:3]).transpose(0, 1)
    whole: Tensor = (mixed + own.to(v.dtype) @ v) / total
    return whole.to(q.dtype).flatten(1, 2).unsqueeze(2)


class Attention(nn.Module):
    """Causal self-attention of a Llama-like decoder, under the names that public checkpoints give its weights."""

    role = "attention"

    def __init__(self, spec: Model, layer: int) -> None:
        super().__init__()
        width, self.head_dim, self.layer = spec.hidden_size, spec.head_width, layer
        wide, narrow = self.head_dim * spec.num_heads, self.head_dim * spec.num_kv_heads
        self.groups = spec.num_heads // spec.num_kv_heads
        biased = bool(spec.attention_bias)
        self.q_proj = nn.Linear(width, wide, bias=biased)
        self.k_proj = nn.Linear(width, narrow, bias=biased)
        self.v_proj = nn.Linear(width, narrow, bias=biased)
        self.o_proj = nn.Linear(wide, width, bias=spec.attention_bias == "all")
        # OLMoE norms queries and keys before they are split into heads, Qwen3 each head by itself.
        self.by_head = spec.normed == "head"
        sizes = (self.head_dim, self.head_dim) if self.by_head else (wide, narrow)
        self.q_norm, self.k_norm = (RMSNorm(size, spec.norm_eps) if spec.normed else nn.Identity() for size in sizes)

    def forward(self, x_BSD: Tensor, angles: Angles, mask: Tensor | None, cache: KeyValues | None) -> Tensor:
        """Return the mixed hidden states [B,S,D]; `angles` are those of the positions."""
        q, k = self._normed(self.q_norm, self.q_proj(x_BSD)), self._normed(self.k_norm, self.k_proj(x_BSD))
        v = self.v_proj(x_BSD)
        q, k = angles.turn(q), angles.turn(k)
        v = v.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        prefix = None
        if cache is not None:
            k, v = cache.update(k, v, self.layer)
            prefix = cache.prefix(self.layer)
        if prefix is not None and q.shape[2] == 1:
            heads = behind_prefix(q, prefix, k, v, mask)
        else:
            if prefix is not None:
                k, v = (torch.cat([s.expand(len(x), -1, -1, -1), x], 2) for s, x in zip(prefix, (k, v), strict=True))
            heads = self._mixed(q, k, v, mask)
        mixed: Tensor = self.o_proj(heads.transpose(1, 2).flatten(-2))
        return mixed

    def _normed(self, norm: nn.Module, x_BSD: Tensor) -> Tensor:
        """Return queries or keys [B,S,h d] normed, over all heads at once or in each."""
        normed: Tensor = norm(x_BSD.unflatten(-1, (-1, self.head_dim))).flatten(-2) if self.by_head else norm(x_BSD)
        return normed

    def _mixed(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """Return softmax(q k / sqrt(d)) v [B,H,S,d]; queries in groups share keys and values [B,H/g,S',d]."""
        shape, shared = q.shape, self.groups > 1 and mask is None and self.head_dim <= 256
        if self.groups > 1 and not shared:
            if shape[2] == 1:
                # One query a head: those of a group are so many queries of one head.
                q = q.reshape(shape[0], -1, self.groups, self.head_dim)
                if mask is not None and mask.shape[1] > 1:
                    mask = mask.reshape(len(mask), -1, self.groups, mask.shape[-1])
            else:
                k, v = (x.repeat_interleave(self.groups, dim=1) for x in (k, v))
        causal = shape[2] > 1 and mask is None
        mixed = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, scale=self.head_dim**-0.5, is_causal=causal, enable_gqa=shared
        )
        return mixed.reshape(shape)
