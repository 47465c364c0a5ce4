"""A router: what differs from token choice over a linear one, on nodes."""

from __future__ import annotations

import torch
from moegrid.extend import Context, Router
from torch import Tensor, nn


class Scaled(Router):
    """A linear router whose logits are multiplied by a learned scale of each expert, `scale` [N]."""

    def build(self) -> None:
        super().build()
        self.scale = nn.Parameter(torch.empty(self.num_ids))

    def reset_parameters(self) -> None:
        super().reset_parameters()
        nn.init.constant_(self.scale, self.settings.scale)

    def logits(self, x_TD: Tensor, context: Context) -> Tensor:
        return super().logits(x_TD, context) * self.scale.float()
