"""Our gates beyond a router's own matrix."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from jobs.moe.frames import normed
from orchestrator.catalog.gates import Affine, Hidden, Normed, Rank, Tanh


class AffineGate(nn.Module):
    """W x + b, bounded by cap * tanh(. / cap): `weight` [N,D], `bias` [N]."""

    def __init__(self, ids: int, hidden_size: int, own: Affine) -> None:
        super().__init__()
        self.cap = own.cap
        self.weight = nn.Parameter(torch.empty(ids, hidden_size))
        self.bias = nn.Parameter(torch.empty(ids)) if own.bias else None

    def reset_parameters(self, std: float) -> None:
        """Draw the matrix from N(0, std); the bias starts at 0."""
        nn.init.normal_(self.weight, std=std)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x_TD: Tensor) -> Tensor:
        """Return logits [T,N] of fp32 hidden states."""
        logits = F.linear(x_TD, self.weight.float(), None if self.bias is None else self.bias.float())
        return self.cap * torch.tanh(logits / self.cap) if self.cap else logits


class NormedGate(nn.Module):
    """W (scale * rms(x)) / sqrt(D): `weight` [N,D], `scale` [D]."""

    def __init__(self, ids: int, hidden_size: int, own: Normed) -> None:
        super().__init__()
        self.eps = own.eps
        self.weight = nn.Parameter(torch.empty(ids, hidden_size))
        self.scale = nn.Parameter(torch.empty(hidden_size))

    def reset_parameters(self, std: float) -> None:
        """Draw the matrix from N(0, std); the scale starts at 1."""
        nn.init.normal_(self.weight, std=std)
        nn.init.ones_(self.scale)

    def forward(self, x_TD: Tensor) -> Tensor:
        """Return logits [T,N] of fp32 hidden states."""
        scaled = normed(x_TD, self.eps) * self.scale.float() / math.sqrt(x_TD.shape[-1])
        return F.linear(scaled, self.weight.float())


class NoisyGate(nn.Module):
    """W x + e * softplus(V x) in training, e ~ N(0, 1) for each id; W x in evaluation: `weight`, `noise` [N,D]."""

    def __init__(self, ids: int, hidden_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(ids, hidden_size))
        self.noise = nn.Parameter(torch.empty(ids, hidden_size))

    def reset_parameters(self, std: float) -> None:
        """Draw both matrices from N(0, std)."""
        nn.init.normal_(self.weight, std=std)
        nn.init.normal_(self.noise, std=std)

    def forward(self, x_TD: Tensor) -> Tensor:
        """Return logits [T,N] of fp32 hidden states."""
        logits = F.linear(x_TD, self.weight.float())
        if not self.training:
            return logits
        return logits + torch.randn_like(logits) * F.softplus(F.linear(x_TD, self.noise.float()))


class MLPGate(nn.Module):
    """W gelu(V x + b): `hidden` [h,D], `bias` [h], `weight` [N,h]."""

    def __init__(self, ids: int, hidden_size: int, own: Hidden) -> None:
        super().__init__()
        self.hidden = nn.Parameter(torch.empty(own.hidden, hidden_size))
        self.bias = nn.Parameter(torch.empty(own.hidden))
        self.weight = nn.Parameter(torch.empty(ids, own.hidden))

    def reset_parameters(self, std: float) -> None:
        """Draw both matrices from N(0, std); the bias starts at 0."""
        nn.init.normal_(self.hidden, std=std)
        nn.init.zeros_(self.bias)
        nn.init.normal_(self.weight, std=std)

    def forward(self, x_TD: Tensor) -> Tensor:
        """Return logits [T,N] of fp32 hidden states."""
        hidden = F.gelu(F.linear(x_TD, self.hidden.float(), self.bias.float()))
        return F.linear(hidden, self.weight.float())


class TanhGate(nn.Module):
    """W tanh(V x), and e * (softplus(U x) + least) in training: `hidden` V [h,D], `weight` W [N,h], `noise` U [N,D]."""

    def __init__(self, ids: int, hidden_size: int, own: Tanh) -> None:
        super().__init__()
        self.least = own.least
        self.hidden = nn.Parameter(torch.empty(own.hidden or ids, hidden_size))
        self.weight = nn.Parameter(torch.empty(ids, own.hidden or ids))
        self.noise = nn.Parameter(torch.empty(ids, hidden_size)) if own.noise else None

    def reset_parameters(self, std: float) -> None:
        """Draw both matrices from N(0, std); the noise's starts at 0."""
        nn.init.normal_(self.hidden, std=std)
        nn.init.normal_(self.weight, std=std)
        if self.noise is not None:
            nn.init.zeros_(self.noise)

    def forward(self, x_TD: Tensor) -> Tensor:
        """Return logits [T,N] of fp32 hidden states."""
        logits = F.linear(torch.tanh(F.linear(x_TD, self.hidden.float())), self.weight.float())
        if self.noise is None or not self.training:
            return logits
        return logits + torch.randn_like(logits) * (F.softplus(F.linear(x_TD, self.noise.float())) + self.least)


class CosineGate(nn.Module):
    """exp(t) cos(P x, e_i): `projection` [r,D], `embeddings` [N,r], `temperature` [1]."""

    def __init__(self, ids: int, hidden_size: int, own: Rank) -> None:
        super().__init__()
        self.projection = nn.Parameter(torch.empty(own.rank, hidden_size))
        self.embeddings = nn.Parameter(torch.empty(ids, own.rank))
        self.temperature = nn.Parameter(torch.empty(1))

    def reset_parameters(self, std: float) -> None:
        """Draw the projection from N(0, std) and the embeddings from N(0, 1); t starts at 0."""
        nn.init.normal_(self.projection, std=std)
        nn.init.normal_(self.embeddings)
        nn.init.zeros_(self.temperature)

    def forward(self, x_TD: Tensor) -> Tensor:
        """Return logits [T,N] of fp32 hidden states."""
        projected = F.normalize(F.linear(x_TD, self.projection.float()), dim=-1)
        return F.linear(projected, F.normalize(self.embeddings.float(), dim=-1)) * self.temperature.float().exp()


class ProductKeyGate(nn.Module):
    """a_i + b_j for expert i sqrt(N) + j, [a, b] = W x: `weight` [2 sqrt(N), D]."""

    def __init__(self, ids: int, hidden_size: int) -> None:
        super().__init__()
        self.keys = math.isqrt(ids)
        self.weight = nn.Parameter(torch.empty(2 * self.keys, hidden_size))

    def reset_parameters(self, std: float) -> None:
        """Draw the keys from N(0, std)."""
        nn.init.normal_(self.weight, std=std)

    def forward(self, x_TD: Tensor) -> Tensor:
        """Return logits [T,N] of fp32 hidden states."""
        first, second = self.halves(F.linear(x_TD, self.weight.float()))
        return (first.unsqueeze(2) + second.unsqueeze(1)).flatten(1)

    def halves(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        """Return the scores of the first and of the second keys, [T, sqrt(N)] each."""
        return scores[:, : self.keys], scores[:, self.keys :]


class MixedProductKeyGate(ProductKeyGate):
    """As Doge is released: token t is scored by a half of token t / 2's row, and one of token (T + t) / 2's."""

    def halves(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        """Return the scores of the first and of the second keys, [T, sqrt(N)] each."""
        first, second = scores.reshape(2, len(scores), self.keys).unbind(0)
        return first, second
