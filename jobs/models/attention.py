"""Self-attention with rotary positions: grouped heads, causal mask, cache, window and sinks."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from jobs.models.key_values import KeyValues, behind
from jobs.models.norm import RMSNorm
from jobs.models.packing import Packing
from jobs.models.rotary import Angles
from jobs.moe.host import is_fake
from jobs.moe.products import Linear
from orchestrator.spec.model import Model


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


def behind_prefix(
    q: Tensor,
    prefix: tuple[Tensor, Tensor],
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    scale: float,
    sinks_H: Tensor | None = None,
) -> Tensor:
    """Return softmax(scale q k) v [B,H,1,d] of one query a row over a prefix of all rows and a row's own keys.

    `prefix` are keys and values [1,G,P,d], read once for the whole batch: all rows' queries are one matrix. `k`, `v`
    [B,G,L,d]; `mask` [B,1,1,P + L] is False where a key is not seen, None: all are. `sinks` [H] as in `mixed`.
    """
    groups, front = k.shape[1], prefix[0].shape[-2]
    rows = q.unflatten(1, (groups, -1)).squeeze(3) * scale  # [B,G,h,d]
    side_by_side = rows.transpose(0, 1)  # [G,B,h,d]
    shared = (side_by_side.flatten(1, 2) @ prefix[0][0].mT).float().unflatten(1, side_by_side.shape[1:3])
    own = (rows @ k.mT).float()
    if mask is not None:
        shared.masked_fill_(~mask[None, :, 0, :, :front], -torch.inf)
        own.masked_fill_(~mask[:, :, 0, None, front:], -torch.inf)
    largest = torch.maximum(shared.amax(-1, keepdim=True).transpose(0, 1), own.amax(-1, keepdim=True))
    sinks = None if sinks_H is None else sinks_H.float().view(1, groups, -1, 1)
    if sinks is not None:
        largest = torch.maximum(largest, sinks)
    shared.sub_(largest.transpose(0, 1)).exp_()
    own.sub_(largest).exp_()
    total = shared.sum(-1, keepdim=True).transpose(0, 1) + own.sum(-1, keepdim=True)
    if sinks is not None:
        total = total + (sinks - largest).exp()
    mixed = (shared.to(v.dtype).flatten(1, 2) @ prefix[1][0]).unflatten(1, side_by_side.shape[1:3]).transpose(0, 1)
    whole: Tensor = (mixed + own.to(v.dtype) @ v) / total
    return whole.to(q.dtype).flatten(1, 2).unsqueeze(2)


def windowed_mask(
    mask: Tensor | Packing | None, window: int, queries_BS: Tensor, keys_BK: Tensor
) -> Tensor | Packing | None:
    """Return `mask` with no key that lies `window` positions or more before its query: of queries and of all keys.

    None as it came in, where everything lies within the window.
    """
    if keys_BK.shape[1] <= window:
        return mask
    if isinstance(mask, Packing):
        return mask.within(window, queries_BS[0], keys_BK[0])
    distance = queries_BS[:, None, :, None] - keys_BK[:, None, None, :]
    near = distance < window
    if mask is None:
        return near & (distance >= 0)
    if mask.dtype is torch.bool:
        return mask & near
    return mask.masked_fill(~near, torch.finfo(mask.dtype).min)


class Sinks(nn.Module):
    """A learned logit for each head [H]: attention that goes there reaches no token (GPT-OSS)."""

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(heads))


def asked(x_BSD: Tensor, angles: Angles, mask: Tensor | Packing | None) -> tuple[Tensor, Angles]:
    """Return what queries are made of, and their angles: of all tokens, or of those that a packing keeps."""
    if not isinstance(mask, Packing) or not mask.last or mask.kept is None:
        return x_BSD, angles
    return x_BSD[:, mask.kept], angles.at(mask.kept)


class Attention(nn.Module):
    """Causal self-attention of a Llama-like decoder, under the names that public checkpoints give its weights."""

    role = "attention"

    def __init__(self, spec: Model, layer: int) -> None:
        super().__init__()
        width, self.head_dim, self.layer = spec.hidden_size, spec.head_width, layer
        wide, narrow = self.head_dim * spec.num_heads, self.head_dim * spec.num_kv_heads
        self.scale = spec.multipliers.attention or self.head_dim**-0.5
        biased = bool(spec.attention_bias)
        self.q_proj = Linear(width, wide, bias=biased)
        self.k_proj = Linear(width, narrow, bias=biased)
        self.v_proj = Linear(width, narrow, bias=biased)
        self.o_proj = Linear(wide, width, bias=spec.attention_bias == "all")
        # OLMoE norms queries and keys before they are split into heads, Qwen3 each head by itself.
        self.by_head = spec.normed == "head"
        sizes = (self.head_dim, self.head_dim) if self.by_head else (wide, narrow)
        self.q_norm, self.k_norm = (RMSNorm(size, spec.norm_eps) if spec.normed else nn.Identity() for size in sizes)
        self.sinks = Sinks(spec.num_heads) if spec.attention_sinks else None

    def forward(self, x_BSD: Tensor, angles: Angles, mask: Tensor | Packing | None, cache: KeyValues | None) -> Tensor:
        """Return the mixed hidden states [B,S,D]; `angles` are those of the positions."""
        asking, turns = asked(x_BSD, angles, mask)
        q, k = self._normed(self.q_norm, self.q_proj(asking)), self._normed(self.k_norm, self.k_proj(x_BSD))
        v = self.v_proj(x_BSD)
        q, k = self._turned(q, turns), self._turned(k, angles)
        v = v.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        prefix = None
        if cache is not None:
            k, v = cache.update(k, v, self.layer)
            prefix = cache.prefix(self.layer)
        sinks = None if self.sinks is None else self.sinks.weight
        if isinstance(mask, Packing):
            heads = mask.mixed(q, k, v, self.scale, sinks)
        elif prefix is not None and q.shape[2] == 1:
            heads = behind_prefix(q, prefix, k, v, mask, self.scale, sinks)
        else:
            if prefix is not None:
                k, v = behind(prefix, (k, v))
            heads = mixed(q, k, v, mask, self.scale, sinks)
        y: Tensor = self.o_proj(heads.transpose(1, 2).flatten(-2))
        return y

    def _normed(self, norm: nn.Module, x_BSD: Tensor) -> Tensor:
        """Return queries or keys [B,S,h d] normed, over all heads at once or in each."""
        normed: Tensor = norm(x_BSD.unflatten(-1, (-1, self.head_dim))).flatten(-2) if self.by_head else norm(x_BSD)
        return normed

    def _turned(self, x_BSD: Tensor, angles: Angles) -> Tensor:
        """Return queries or keys as heads [B,H,S,d], the first dimensions of each turned."""
        width = angles.cos.shape[-1]
        if width == self.head_dim:
            return angles.turn(x_BSD)
        heads = x_BSD.unflatten(-1, (-1, self.head_dim))
        turned = angles.turn(heads[..., :width].flatten(-2))
        return torch.cat([turned, heads[..., width:].transpose(1, 2)], dim=-1)


def mixed(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, sinks_H: Tensor | None = None) -> Tensor:
    """Return softmax(scale q k) v [B,H,S,d']; queries [B,H,S,d] in groups share keys and values [B,H/g,S',d].

    Without a mask a query sees the keys up to its own place, one query all of them. `sinks` [H] are further logits,
    whose values are 0.
    """
    (batch, heads, length, width), groups = q.shape, q.shape[1] // k.shape[1]
    if sinks_H is not None:
        k, v = (x.repeat_interleave(groups, dim=1) for x in (k, v)) if groups > 1 else (k, v)
        return _with_sinks(q, k, v, mask, scale, sinks_H)
    shared = groups > 1 and mask is None and width <= 256
    if groups > 1 and not shared:
        if length == 1:
            # One query a head: those of a group are so many queries of one head.
            q = q.reshape(batch, -1, groups, width)
            if mask is not None and mask.shape[1] > 1:
                mask = mask.reshape(len(mask), -1, groups, mask.shape[-1])
        else:
            k, v = (x.repeat_interleave(groups, dim=1) for x in (k, v))
    causal = length > 1 and mask is None
    seen = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, is_causal=causal, enable_gqa=shared)
    return seen.reshape(batch, heads, length, -1)


def _with_sinks(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, sinks_H: Tensor) -> Tensor:
    """Return the attention whose softmax has one logit more; no kernel has it, so its weights are in memory."""
    logits = torch.matmul(q * scale, k.transpose(-1, -2))
    length, keys = logits.shape[-2:]
    if mask is None and length > 1:
        mask = torch.ones(length, keys, dtype=torch.bool, device=q.device).tril()
    if mask is not None:
        logits = logits.masked_fill(~mask, float("-inf")) if mask.dtype is torch.bool else logits + mask
    sinks = sinks_H.to(logits.dtype).view(1, -1, 1, 1).expand(len(q), -1, length, 1)
    weights = torch.softmax(torch.cat([logits, sinks], dim=-1), dim=-1, dtype=torch.float)[..., :-1]
    return torch.matmul(weights.to(v.dtype), v)
