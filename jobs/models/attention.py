"""Self-attention with rotary positions: transformers' weights, cache and kernel, the rotation in fewer passes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward


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
    y = x * cos
    y[..., :half].addcmul_(x[..., half:], sin[..., :half], value=-sign)
    y[..., half:].addcmul_(x[..., :half], sin[..., half:], value=sign)
    return y


class Attention(nn.Module):
    """Causal self-attention of a Llama-like decoder. Takes the place (and the weights) of a transformers attention."""

    def __init__(self, theirs: Any) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = theirs.q_proj, theirs.k_proj, theirs.v_proj, theirs.o_proj
        # OLMoE norms queries and keys before they are split into heads.
        self.q_norm = getattr(theirs, "q_norm", nn.Identity())
        self.k_norm = getattr(theirs, "k_norm", nn.Identity())
        self.layer, self.head_dim = theirs.layer_idx, theirs.head_dim
        # Read by transformers' kernel.
        self.is_causal, self.num_key_value_groups = True, theirs.num_key_value_groups

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: object,
    ) -> tuple[Tensor, None]:
        """Return the mixed hidden states [B,S,D]; `position_embeddings` are cos and sin [B or 1,S,head_dim]."""
        q, k = self.q_norm(self.q_proj(hidden_states)), self.k_norm(self.k_proj(hidden_states))
        v = self.v_proj(hidden_states)
        q, k = self._rotated(q, position_embeddings), self._rotated(k, position_embeddings)
        v = v.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        if past_key_values is not None:
            k, v = past_key_values.update(k, v, self.layer)
        mixed, _ = sdpa_attention_forward(self, q, k, v, attention_mask, scaling=self.head_dim**-0.5, **kwargs)
        return self.o_proj(mixed.flatten(-2)), None

    def _rotated(self, x_BSD: Tensor, tables: tuple[Tensor, Tensor]) -> Tensor:
        """Return the heads [B,H,S,d], turned by their positions."""
        batch, length, _ = x_BSD.shape
        # A table row for each head of each position: kernels then run over whole rows, not over single heads.
        heads = x_BSD.shape[-1] // self.head_dim
        cos, sin = (table.unsqueeze(2).expand(-1, -1, heads, -1).flatten(1, 2) for table in tables)
        rows = x_BSD.reshape(batch, length * heads, self.head_dim)
        turned: Tensor = _Rotary.apply(rows, cos, sin)  # type: ignore[no-untyped-call]
        return turned.view(batch, length, heads, self.head_dim).transpose(1, 2)
