"""What stands around the experts of a block: norms, a bias, a projection into a narrower space and back."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from orchestrator.catalog.frames import FRAMES, LATENT, NONE, PLACES
from orchestrator.registry import load
from orchestrator.spec.model import Moe


class Nothing(nn.Module):
    """The identity."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()

    def reset_parameters(self, std: float) -> None:
        """Draw nothing."""

    def forward(self, x: Tensor) -> Tensor:
        """Return x."""
        return x


class UnitRMSNorm(Nothing):
    """x / sqrt(mean(x^2) + eps), in fp32."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__(width, eps)
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Return the normed rows of x [..., width]."""
        return normed(x.float(), self.eps).to(x.dtype)


class RMSNorm(UnitRMSNorm):
    """An RMS norm, then `weight` [width]."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__(width, eps)
        self.weight = nn.Parameter(torch.empty(width))

    def reset_parameters(self, std: float) -> None:
        """Begin with weights of 1."""
        nn.init.ones_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Return the normed and weighted rows of x [..., width]."""
        return (normed(x.float(), self.eps) * self.weight.float()).to(x.dtype)


class ScaledRMSNorm(RMSNorm):
    """`weight` [width], then an RMS norm: channels of larger weight make up more of the row (Muse Spark)."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the weighted and then normed rows of x [..., width]."""
        return normed(x.float() * self.weight.float(), self.eps).to(x.dtype)


class Bias(Nothing):
    """x + `bias` [width]."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__(width, eps)
        self.bias = nn.Parameter(torch.empty(width))

    def reset_parameters(self, std: float) -> None:
        """Begin with 0."""
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Return x [..., width] with the bias."""
        return x + self.bias.to(x.dtype)


class Latent(nn.Module):
    """The space in which routed experts compute (Nemotron-H): `down` [L,D] into it, `up` [O,L] out of it."""

    role = "routed_expert"

    def __init__(self, hidden_size: int, width: int, out_size: int) -> None:
        super().__init__()
        self.down = nn.Parameter(torch.empty(width, hidden_size))
        self.up = nn.Parameter(torch.empty(out_size, width))

    def reset_parameters(self, std: float) -> None:
        """Draw the weights from N(0, std)."""
        nn.init.normal_(self.down, std=std)
        nn.init.normal_(self.up, std=std)

    def forward(self, x: Tensor) -> Tensor:
        """Return x [..., D] as [..., L]."""
        return F.linear(x, self.down)

    def back(self, y: Tensor) -> Tensor:
        """Return y [..., L] as [..., O]."""
        return F.linear(y, self.up)


def normed(x: Tensor, eps: float) -> Tensor:
    """Return x / sqrt(mean(x^2) + eps) over the last dimension."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)


def frames_of(moe: Moe, hidden_size: int, out_size: int) -> dict[str, nn.Module]:
    """Return the frames of a block by place, with the roles of their weights."""
    found: dict[str, nn.Module] = {}
    for place, role in PLACES.items():
        if (name := getattr(moe, place)) != NONE:
            around = hidden_size if place.endswith("_input") else out_size
            width = (moe.latent_size or around) if place in LATENT else around
            found[place] = load(FRAMES.get(name).code, FRAMES.who(name))(width, moe.frame_eps)
            found[place].role = role  # type: ignore[assignment]
    return found
