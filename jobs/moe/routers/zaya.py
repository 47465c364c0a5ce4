"""Zaya: a router with a state that goes from layer to layer, and an id that skips the experts."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from jobs.moe.frames import normed
from jobs.moe.routers.base import Context, Router

# Where the released model begins with the bias of the id that skips.
SKIP_BIAS = -1.0


class Zaya(Router):
    """State s_l = P x + c + a * s_(l-1) [T,r]; logits are an MLP of its norm. The last id is no expert.

    `down` [r,D], `down_bias` [r], `scale` [r] (not in the first layer), `norm` [r], `first`, `second` [r,r] with
    `first_bias`, `second_bias` [r], `weight` [N+1,r].
    """

    scale: nn.Parameter | None

    def count_ids(self) -> int:
        return self.moe.num_experts + 1

    def physical_ids(self) -> Tensor:
        ids = torch.arange(self.num_ids)
        return torch.where(ids < self.moe.num_experts, ids, -1)

    @property
    def carried_size(self) -> int:
        size: int = self.settings.router_size
        return size

    def build(self) -> None:
        size = self.carried_size
        self.down = nn.Parameter(torch.empty(size, self.hidden_size))
        self.down_bias = nn.Parameter(torch.empty(size))
        self.scale = nn.Parameter(torch.empty(size))
        self.norm = nn.Parameter(torch.empty(size))
        self.first = nn.Parameter(torch.empty(size, size))
        self.first_bias = nn.Parameter(torch.empty(size))
        self.second = nn.Parameter(torch.empty(size, size))
        self.second_bias = nn.Parameter(torch.empty(size))
        self.weight = nn.Parameter(torch.empty(self.num_ids, size))

    def first_bias_values(self) -> Tensor:
        bias = super().first_bias_values()
        bias[-1] = SKIP_BIAS
        return bias

    def reset_parameters(self) -> None:
        for matrix in (self.down, self.first, self.second, self.weight):
            nn.init.normal_(matrix, std=self.moe.router_init_std)
        for bias in (self.down_bias, self.first_bias, self.second_bias):
            nn.init.zeros_(bias)
        for factor in (self.scale, self.norm):
            if factor is not None:
                nn.init.ones_(factor)

    def first_layer(self) -> None:
        # No layer stands before the first: a weight without a gradient would stop data-parallel training.
        self.scale = None

    def gated(self, x_TD: Tensor, context: Context) -> tuple[Tensor, Tensor | None]:
        state = F.linear(x_TD, self.down.float(), self.down_bias.float())
        if self.scale is not None and context.previous is not None:
            state = state + context.previous * self.scale.float()
        hidden = normed(state, self.settings.eps) * self.norm.float()
        for matrix, bias in ((self.first, self.first_bias), (self.second, self.second_bias)):
            hidden = F.gelu(F.linear(hidden, matrix.float(), bias.float()))
        return F.linear(hidden, self.weight.float()), state
