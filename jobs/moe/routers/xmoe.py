"""X-MoE: cosine routing on a low-dimensional projection."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from jobs.moe.routers.base import Context, Router


class XMoE(Router):
    """Cosine router on a low-dimensional projection (r = N/2): `projection` [r,D], `embeddings` [N,r].

    Variants: `paper` (learned temperature), `torchscale` (no cosine: the projected input keeps its length), `libmoe_lm`
    (double softmax, renormalised), `libmoe_vlm` (softmax over the selected probabilities). LibMoE multiplies the unit
    input with embeddings of length 1.5, the others with unit ones.
    """

    def build(self) -> None:
        rank = self.settings.rank or max(1, self.num_ids // 2)
        self.projection = nn.Parameter(torch.empty(rank, self.hidden_size))
        self.embeddings = nn.Parameter(torch.empty(self.num_ids, rank))
        if self.moe.variant == "paper":
            self.temperature = nn.Parameter(torch.tensor(self.moe.temperature))

    def reset_parameters(self) -> None:
        nn.init.normal_(self.projection, std=self.moe.router_init_std)
        nn.init.orthogonal_(self.embeddings, gain=0.32)
        if self.moe.variant != "paper":
            with torch.no_grad():
                self.embeddings.mul_(1.5 / self.embeddings.norm(dim=1, keepdim=True))
        else:
            nn.init.constant_(self.temperature, self.moe.temperature)

    def logits(self, x_TD: Tensor, context: Context) -> Tensor:
        projected, embeddings = F.linear(x_TD, self.projection.float()), self.embeddings.float()
        if self.moe.variant != "paper":
            # Held at length 1.5 outside the graph, as if the parameter had been rescaled in place before use.
            held = embeddings.detach() * (1.5 / embeddings.detach().norm(dim=1, keepdim=True))
            embeddings = embeddings + (held - embeddings).detach()
        if self.moe.variant != "torchscale":
            projected = F.normalize(projected, dim=-1)
        if self.moe.variant in ("paper", "torchscale"):
            embeddings = F.normalize(embeddings, dim=-1)
        return F.linear(projected, embeddings)

    def tempered(self, logits_TN: Tensor) -> Tensor:
        return logits_TN / (self.temperature.float() if self.moe.variant == "paper" else self.fixed_temperature)

    def score(self, logits_TN: Tensor) -> Tensor:
        scores = super().score(logits_TN)
        if self.moe.variant == "libmoe_lm":
            if self.switches.removed:
                scores = scores.masked_fill(logits_TN == float("-inf"), float("-inf"))
            scores = torch.softmax(scores, dim=-1)
        return scores

    def weigh(self, scores_TN: Tensor, indices_TK: Tensor, empty_TK: Tensor | None) -> Tensor:
        if self.moe.variant != "libmoe_vlm":
            return super().weigh(scores_TN, indices_TK, empty_TK)
        chosen = scores_TN.gather(1, indices_TK)
        if empty_TK is None:
            return torch.softmax(chosen, dim=-1)
        return torch.softmax(chosen.masked_fill(empty_TK, float("-inf")), dim=-1).masked_fill(empty_TK, 0.0)
