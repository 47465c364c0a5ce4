"""Multi-head latent attention (DeepSeek-V2, section 2.1): keys and values of all heads come from one latent a token."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from jobs.models.attention import asked, behind_prefix, mixed
from jobs.models.key_values import KeyValues, behind
from jobs.models.norm import RMSNorm
from jobs.models.packing import Packing
from jobs.models.rotary import Angles
from jobs.moe.products import Linear
from orchestrator.spec.model import Model

# Of the latents' norms, whatever the others' is: no public config says it.
LATENT_EPS = 1e-6


class LatentAttention(nn.Module):
    """Attention over latents, under the names that public checkpoints give its weights.

    The cache holds what all heads share: the normed latent [B,1,S,r] and the turned part of the keys [B,1,S,d].
    """

    role = "attention"

    def __init__(self, spec: Model, layer: int) -> None:
        super().__init__()
        latent, width, self.heads, self.layer = spec.latent, spec.hidden_size, spec.num_heads, layer
        self.latent, self.head_dim, self.interleaved = latent, spec.head_width, spec.rope.interleaved
        self.scale = (spec.multipliers.attention or self.head_dim**-0.5) * spec.rope.logit_factor
        wide = self.heads * self.head_dim
        if latent.q_rank:
            self.q_a_proj = Linear(width, latent.q_rank, bias=False)
            self.q_a_layernorm = RMSNorm(latent.q_rank, LATENT_EPS)
            self.q_b_proj = Linear(latent.q_rank, wide, bias=False)
        else:
            self.q_proj = Linear(width, wide, bias=False)
        self.kv_a_proj_with_mqa = Linear(width, latent.kv_rank + latent.rotary_dim, bias=False)
        self.kv_a_layernorm = RMSNorm(latent.kv_rank, LATENT_EPS)
        self.kv_b_proj = Linear(latent.kv_rank, self.heads * (latent.plain_dim + latent.value_dim), bias=False)
        self.o_proj = Linear(self.heads * latent.value_dim, width, bias=False)

    def forward(self, x_BSD: Tensor, angles: Angles, mask: Tensor | Packing | None, cache: KeyValues | None) -> Tensor:
        """Return the mixed hidden states [B,S,D]; `angles` are those of the positions."""
        plain, turning = self.latent.plain_dim, self.latent.rotary_dim
        asking, turns = asked(x_BSD, angles, mask)
        q = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(asking))) if self.latent.q_rank else self.q_proj(asking)
        q_plain, q_turning = q.unflatten(-1, (self.heads, self.head_dim)).split((plain, turning), dim=-1)
        q = torch.cat([q_plain.transpose(1, 2), self._turned(q_turning.flatten(-2), turns)], dim=-1)
        latent, shared = self.kv_a_proj_with_mqa(x_BSD).split((self.latent.kv_rank, turning), dim=-1)
        latent, shared = self.kv_a_layernorm(latent).unsqueeze(1), self._turned(shared, angles)
        prefix = None
        if cache is not None:
            latent, shared = cache.update(latent, shared, self.layer)
            prefix = cache.prefix(self.layer)
        if isinstance(mask, Packing):
            heads = mask.mixed(q, *self._made(latent, shared), self.scale)
        elif prefix is not None and q.shape[2] == 1:
            heads = behind_prefix(q, self._made(*prefix), *self._made(latent, shared), mask, self.scale)
        else:
            if prefix is not None:
                latent, shared = behind(prefix, (latent, shared))
            heads = mixed(q, *self._made(latent, shared), mask, self.scale)
        y: Tensor = self.o_proj(heads.transpose(1, 2).flatten(-2))
        return y

    def _made(self, latent: Tensor, shared: Tensor) -> tuple[Tensor, Tensor]:
        """Return keys and values [B,H,S,d] of the latents [B,1,S,r] and the turned part of the keys [B,1,S,d]."""
        plain, values = self.latent.plain_dim, self.latent.value_dim
        made = self.kv_b_proj(latent.squeeze(1)).unflatten(-1, (self.heads, plain + values)).transpose(1, 2)
        k_plain, v = made.split((plain, values), dim=-1)
        return torch.cat([k_plain, shared.expand(-1, self.heads, -1, -1)], dim=-1), v

    def _turned(self, x_BSD: Tensor, angles: Angles) -> Tensor:
        """Return the turned parts of heads [B,H,S,d]; pairs side by side are laid half a part apart first."""
        if self.interleaved:
            pairs = self.latent.rotary_dim // 2
            x_BSD = x_BSD.unflatten(-1, (-1, pairs, 2)).transpose(-1, -2).flatten(-3)
        return angles.turn(x_BSD)
