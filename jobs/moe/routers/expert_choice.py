"""Expert choice: experts take tokens, so that all are equally loaded; by rank, the future leaks into the past."""

from __future__ import annotations

import torch
from torch import Tensor

from jobs.moe.routers import Context, Router, renormalised
from jobs.moe.routing import Routing
from jobs.moe.selection import choose_tokens, slots


class ExpertChoice(Router):
    """Experts choose tokens: the top C of a group, or every token that passes the expert's running threshold.

    Only the threshold is causal. `threshold` [N] starts at the even share 1/N until the first training step sets it.
    """

    threshold: Tensor
    threshold_updates: Tensor

    def build(self) -> None:
        super().build()
        self.register_buffer("threshold", torch.full((self.num_ids,), 1.0 / self.num_ids))
        self.register_buffer("threshold_updates", torch.zeros((), dtype=torch.long))

    @property
    def by_threshold(self) -> bool:
        """True when tokens are compared with thresholds in the current mode (train or eval), not ranked."""
        return (self.moe.train_select if self.training else self.moe.eval_select) == "threshold"

    @property
    def causal(self) -> bool:
        # The first training batch is ranked, whatever the mode.
        return self.by_threshold and (not self.training or bool(self.threshold_updates > 0))

    def forward(self, x_TD: Tensor, context: Context) -> Routing:
        with torch.autocast(x_TD.device.type, enabled=False):
            logits, carried = self.prepare(self.jittered(x_TD.float()), context)
            scores = self.score(logits)
            chosen, cutoffs = self._chosen(scores.detach(), context)
            if self.switches.removed:
                chosen = chosen & ~self.removed_ids()
            indices, weights = slots(chosen, scores, self.moe.top_k)
            if self.moe.renormalise:
                weights = renormalised(weights)
            if self.scaling != 1.0:
                weights = weights * self.scaling
        routing = self.record(context, logits, scores, indices, weights, carried)
        routing.cutoffs = cutoffs
        return routing

    @torch.no_grad()
    def update_thresholds(self, cutoffs_N: Tensor) -> None:
        """Move the thresholds towards `cutoffs_N`, the mean C-th best scores of one optimizer step."""
        decay = self.moe.threshold_decay
        started = self.threshold_updates > 0
        self.threshold.copy_(torch.where(started, decay * self.threshold + (1 - decay) * cutoffs_N, cutoffs_N))
        self.threshold_updates += 1

    def _chosen(self, scores_TN: Tensor, context: Context) -> tuple[Tensor, Tensor | None]:
        """Return the choice [T,N] and, where tokens were ranked, the C-th best scores [N]."""
        passed = (scores_TN >= self.threshold) & context.mask.unsqueeze(-1)
        if self.by_threshold and not self.training:
            return passed, None
        if not len(scores_TN):
            return passed, scores_TN.new_zeros(self.num_ids)
        groups = context.batch if self.moe.choice_group == "sequence" else 1
        best, cutoffs = choose_tokens(
            scores_TN.view(groups, -1, self.num_ids), context.mask.view(groups, -1), self.moe.top_k
        )
        best = best.view(-1, self.num_ids)
        # The first training batch initialises the thresholds, so it has to choose by rank.
        return torch.where(self.threshold_updates > 0, passed, best) if self.by_threshold else best, cutoffs
