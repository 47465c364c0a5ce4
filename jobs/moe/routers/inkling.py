"""Inkling: the router weighs the shared experts with the routed ones."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from jobs.moe.routers.base import Context, Router
from jobs.moe.routing import Routing


class Inkling(Router):
    """Sigmoids of the chosen and of all shared experts, divided by their sum, times a learned `scale` [1].

    `weight` [N,D], `shared` [n,D]. The record's logits are those of the routed experts.
    """

    def build(self) -> None:
        super().build()
        self.shared = nn.Parameter(torch.empty(self.moe.shared_experts, self.hidden_size))
        self.scale = nn.Parameter(torch.empty(1))

    def reset_parameters(self) -> None:
        super().reset_parameters()
        nn.init.normal_(self.shared, std=self.moe.router_init_std)
        nn.init.ones_(self.scale)

    def forward(self, x_TD: Tensor, context: Context) -> Routing:
        with torch.autocast(x_TD.device.type, enabled=False):
            x_TD = self.jittered(x_TD.float())
            logits, carried = self.prepare(x_TD, context)
            scores = self.score(logits)
            indices, empty = self.choose(logits, scores)
            routed = F.logsigmoid(self.tempered(logits)).gather(1, indices)
            if empty is not None:
                routed, indices = routed.masked_fill(empty, float("-inf")), indices.masked_fill(empty, -1)
            shared = F.logsigmoid(self.tempered(F.linear(x_TD, self.shared.float())))
            weights = torch.softmax(torch.cat([routed, shared], dim=1), dim=1) * (self.scaling * self.scale.float())
            of_routed, of_shared = weights.split([indices.shape[1], self.moe.shared_experts], dim=1)
        routing = self.record(context, logits, scores, indices, of_routed, carried, full=empty is None)
        routing.shared = of_shared
        return routing
