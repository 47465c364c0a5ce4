"""The router that all others are made of: token choice, and the hooks by which a block asks what differs.

A new router is one class (its logits, scores, weights: override what differs) and its declaration, a `RouterKind` of
`orchestrator.catalog.routers`; its own parameters are `self.settings`. All computes in fp32.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from jobs.moe.overflow import Asked
from jobs.moe.routing import Routing
from jobs.moe.selection import count, limit_collaboration, limit_groups, random_ids, top_k
from jobs.moe.spans import SpanState, pool_spans
from jobs.moe.switches import Switches
from jobs.moe.weighing import chosen_scores, jittered, renormalised, standardised
from orchestrator.catalog.gates import GATES, LINEAR
from orchestrator.catalog.overflows import NONE, OVERFLOWS
from orchestrator.catalog.parameters import code_of
from orchestrator.catalog.scores import SCORES
from orchestrator.catalog.selections import SELECTIONS
from orchestrator.errors import MoegridError
from orchestrator.spec.model import Moe
from orchestrator.spec.resolve import parts_causal, settings

# Of the experts that token ids are dealt, where they are looked up by them.
HASH_SEED = 0


Extras = dict[str, Any]  # fields of a `Routing` record


@dataclass
class Context:
    """What a router may know beside the hidden states; T = batch * length tokens."""

    batch: int
    mask: Tensor  # [T] bool, True = real token
    padded: bool
    spans: Tensor | None = None  # [B,S] word or sentence ids
    previous: Tensor | None = None  # [T,N] the previous layer's logits (MoE++ gating residual)
    keys: Tensor | None = None  # [T] int64, stands for (position, token): seeds of random routing
    span_states: dict[int, SpanState] | None = None  # of the KV cache, by layer
    layer: int = 0
    tokens: Tensor | None = None  # [T] token ids, where experts are looked up by them


class Part(nn.Module):
    """A module that a router brings beside the experts; `role` says which learning rate and freezing it shares."""

    role = "routed_expert"

    def reset_parameters(self, std: float) -> None:
        """Draw the initial weights."""
        raise NotImplementedError


class Router(nn.Module):
    """Token choice over a linear router: softmax or sigmoid scores, top-k, raw or renormalised weights.

    `weight` [N,D]. Optional `bias` [N] (aux-loss-free balancing) enters the selection, never the weights. `settings`
    are the router's own parameters, an instance of its declaration's dataclass (None when it has none).
    """

    role = "router"
    bias: Tensor
    allowed: Tensor | None
    table: Tensor | None
    physical: Tensor | None

    def __init__(self, moe: Moe, hidden_size: int) -> None:
        super().__init__()
        self.moe = moe
        self.hidden_size = hidden_size
        self.settings: Any = settings(moe)
        self.num_ids = self.count_ids()
        self.fixed_temperature = moe.temperature
        self.scaling = moe.routed_scaling
        self.score_function = code_of(SCORES, moe.score, moe.score_parameters)
        self.distribution = SCORES.get(moe.score).distribution
        self.select = code_of(SELECTIONS, moe.selection, moe.selection_parameters)
        self.fixed, self.sampled = SELECTIONS.get(moe.selection).fixed, SELECTIONS.get(moe.selection).sampled
        self.looks_back = parts_causal(moe)
        self.drop = None if moe.overflow == NONE else code_of(OVERFLOWS, moe.overflow, moe.overflow_parameters)
        self.switches = Switches()
        self.build()
        if moe.expert_scale:
            self.expert_scale = nn.Parameter(torch.ones(self.num_ids))
        if moe.balance_bias:
            self.register_buffer("bias", self.first_bias_values())
        # Until a profiling stage sets C2R's lists, every expert may work with every other. An intervention's are not
        # saved with the model.
        limited = bool(moe.collaboration_top)
        everything = torch.ones(self.num_ids, self.num_ids, dtype=torch.bool) if limited else None
        self.register_buffer("allowed", everything, persistent=limited)
        self.register_buffer("table", None)
        physical = self.physical_ids()
        self.register_buffer("physical", physical, persistent=False)

    # What a new router overrides -------------------------------------------------------------------------------

    def count_ids(self) -> int:
        """Return how many ids the router chooses from."""
        return self.moe.num_experts

    def physical_ids(self) -> Tensor | None:
        """Return the map [N] from ids to physical experts (-1 = none), None when it is the identity."""
        return None

    def first_bias_values(self) -> Tensor:
        """Return where the balancing bias [N] begins."""
        return torch.zeros(self.num_ids)

    @property
    def carried_size(self) -> int:
        """How many numbers a token carries to the next layer's router."""
        return self.num_ids

    def build(self) -> None:
        """Create the parameters: `weight`, or a gate of another package."""
        if self.moe.gate == LINEAR:
            self.weight = nn.Parameter(torch.empty(self.num_ids, self.hidden_size))
        else:
            made = code_of(GATES, self.moe.gate, self.moe.gate_parameters)
            self.gate = made(self.num_ids, self.hidden_size)

    def reset_parameters(self) -> None:
        """Draw the initial weights."""
        if self.moe.gate == LINEAR:
            nn.init.normal_(self.weight, std=self.moe.router_init_std)
        else:
            self.gate.reset_parameters(self.moe.router_init_std)

    def logits(self, x_TD: Tensor, context: Context) -> Tensor:
        """Return h [T,N] of fp32 hidden states."""
        if self.moe.gate == LINEAR:
            return F.linear(x_TD, self.weight.float())
        logits: Tensor = self.gate(x_TD)
        return logits

    def gated(self, x_TD: Tensor, context: Context) -> tuple[Tensor, Tensor | None]:
        """Return the logits [T,N] of fp32 hidden states, and what the next layer's router is given [T,...].

        That are the logits themselves where it is None.
        """
        return self.logits(x_TD, context), None

    def tempered(self, logits_TN: Tensor) -> Tensor:
        """Return what the softmax or sigmoid is taken of [T,N]; a constant temperature divides the logits."""
        tempered = logits_TN if self.fixed_temperature == 1.0 else logits_TN / self.fixed_temperature
        return standardised(tempered, self.moe.logit_std) if self.moe.logit_std else tempered

    def score(self, logits_TN: Tensor) -> Tensor:
        """Return the scores s [T,N]."""
        tempered = self.tempered(logits_TN)
        scores: Tensor = self.score_function(tempered)
        return scores

    def weigh(self, scores_TN: Tensor, indices_TK: Tensor, empty_TK: Tensor | None) -> Tensor:
        """Return the combine weights [T,K] of the chosen ids; slots in `empty_TK` stay empty and weigh 0."""
        weights = chosen_scores(scores_TN, indices_TK, empty_TK)
        return renormalised(weights, self.moe.weight_norm) if self.moe.renormalise else weights

    def extras(self) -> Extras:
        """Return further fields of the `Routing` record."""
        return {}

    # What a block asks ------------------------------------------------------------------------------------------

    @property
    def input_scale(self) -> float:
        """What the experts' input is multiplied with."""
        return 1.0

    def signed(self, indices_TK: Tensor, weights_TK: Tensor) -> Tensor:
        """Return the weights [T,K] with the signs of the chosen ids."""
        return weights_TK

    def parts(self) -> dict[str, Part]:
        """Return further modules of the block by name."""
        return {}

    def special(self, x_TD: Tensor, indices_TK: Tensor, weights_TK: Tensor, parts: Mapping[str, Part]) -> Tensor | None:
        """Return what ids without a feed-forward expert add to the output [T,D], None when there are none."""
        return None

    def first_layer(self) -> None:
        """Drop what the first MoE layer of a model does not have."""

    def update_thresholds(self, cutoffs_N: Tensor) -> None:
        """Move running thresholds towards the C-th best scores of a step (expert choice)."""
        raise MoegridError(f"preset {self.moe.preset!r} has no expert-choice thresholds")

    # ------------------------------------------------------------------------------------------------------------

    @property
    def causal(self) -> bool:
        """True when no later token can change an earlier token's routing in the current mode (train or eval)."""
        return self.looks_back and (self.moe.unit == "token" or self.moe.pool != "full_mean")

    @property
    def choices(self) -> int:
        """Among how many ids a token's choice falls: the limits of groups and of collaboration lists count."""
        if self.moe.n_group > 1:
            return self.num_ids // self.moe.n_group * self.moe.topk_group
        return self.moe.collaboration_top + 1 if self.moe.collaboration_top else self.num_ids

    def forward(self, x_TD: Tensor, context: Context) -> Routing:
        with torch.autocast(x_TD.device.type, enabled=False):
            logits, carried = self.prepare(self.jittered(x_TD.float()), context)
            scores = self.score(logits)
            indices, empty = self.choose(logits, scores) if self.table is None else self._look_up(scores, context)
            asked = None
            if self.drop is not None:
                asked = self._asked(scores, indices, empty, context)
                full = ~self.drop(asked)
                if self.moe.renormalise_kept:
                    empty = full
            weights = self.weigh(scores, indices, empty)
            if asked is not None:
                empty, weights = full, weights.masked_fill(full, 0.0)
            if self.moe.expert_scale:
                weights = weights * self.expert_scale.float()[indices]
            if empty is not None:
                indices = indices.masked_fill(empty, -1)
            if self.scaling != 1.0:
                weights = weights * self.scaling
        routing = self.record(context, logits, scores, indices, weights, carried, full=empty is None)
        routing.asked = None if asked is None else asked.indices
        return routing

    def jittered(self, x_TD: Tensor) -> Tensor:
        """Return what the router sees of fp32 hidden states: with noise in training, where there is some."""
        return jittered(x_TD, self.moe.router_jitter) if self.training else x_TD

    def prepare(self, x_TD: Tensor, context: Context) -> tuple[Tensor, Tensor]:
        """Return the logits after span pooling and interventions, and what the next layer's router is given."""
        logits, carried = self.gated(x_TD, context)
        if self.moe.unit != "token":
            logits = self._pool(logits, context)
        carried = logits if carried is None else carried
        if self.switches.temperature != 1.0:
            logits = logits / self.switches.temperature
        if self.switches.removed:
            logits = logits.masked_fill(self.removed_ids(), float("-inf"))
        return logits, carried

    def removed_ids(self) -> Tensor:
        """Return which ids [N] belong to a removed expert (both signs of TC-MoE)."""
        ids = self.physical if self.physical is not None else torch.arange(self.num_ids, device=self.device)
        return torch.isin(ids, torch.tensor(self.switches.removed, device=self.device))

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def choose(self, logits_TN: Tensor, scores_TN: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the chosen ids [T,k], best first, and which of them are not to be had [T,k] (None = all are)."""
        moe, values = self.moe, scores_TN.detach()
        grouped = moe.n_group > 1
        if moe.balance_bias:
            values = (values if moe.select_by == "scores" else logits_TN.detach()) + self.bias
        elif self.switches.temperature != 1.0 and not (grouped and moe.group_score == "top2_sum"):
            # The scores grow with it, and at a low temperature many of them round to the same 0 or 1.
            values = self.tempered(logits_TN.detach())
        if self.switches.removed:
            values = values.masked_fill(self.removed_ids(), float("-inf"))
        if grouped:
            excluded = float("-inf") if moe.group_mask == "exclude" else 0.0
            values = limit_groups(values, moe.n_group, moe.topk_group, moe.group_score, excluded)
            if self.switches.removed and not excluded:
                values = values.masked_fill(self.removed_ids(), float("-inf"))
        if self.allowed is not None:
            values = limit_collaboration(values, self.allowed)
        drop = self.switches.drop
        drawn = self.training and self.sampled
        select = self.select if drawn or not self.sampled else top_k
        chosen: Tensor = select(values, moe.top_k + drop)[:, drop:]
        if (self.fixed or (self.sampled and not drawn)) and not drop and not self.switches.removed:
            return chosen, None
        # Fewer than k may be left: what is removed or forbidden never fills a slot.
        ids = chosen.clamp_min(0)
        return ids, (chosen < 0) | (values.gather(1, ids) == float("-inf"))

    def look_up(self, vocab_size: int) -> None:
        """Take experts from a `table` [V,k] by token id from now on: distinct ones, drawn once for each id."""
        keys = torch.arange(vocab_size)
        slots = torch.zeros(vocab_size, self.moe.top_k, dtype=torch.long)
        self.table = random_ids(slots, self.num_ids, keys, HASH_SEED, 0)
        if self.moe.balance_bias:
            del self.bias  # nothing is selected by scores

    def _look_up(self, scores_TN: Tensor, context: Context) -> tuple[Tensor, Tensor | None]:
        """Return the experts of each token's id [T,k], best first, and which of them are not to be had."""
        assert self.table is not None
        if context.tokens is None:
            raise MoegridError(
                "this layer looks its experts up by token id",
                cause="the block was called without `tokens`",
                hint="pass tokens [B,S]",
            )
        ids = self.table[context.tokens].sort(-1).values  # ties go to the lower index
        values = scores_TN.detach().gather(1, ids)
        if self.switches.removed:
            values = values.masked_fill(self.removed_ids()[ids], float("-inf"))
        order = top_k(values, ids.shape[1])
        ids, values, drop = ids.gather(1, order), values.gather(1, order), self.switches.drop
        if not drop and not self.switches.removed:
            return ids, None
        # There is no further choice: slots of what is dropped or removed stay empty.
        values[:, :drop] = float("-inf")
        return ids, values == float("-inf")

    def _asked(self, scores_TN: Tensor, indices_TK: Tensor, empty_TK: Tensor | None, context: Context) -> Asked:
        indices = indices_TK if empty_TK is None else indices_TK.masked_fill(empty_TK, -1)
        if context.padded:
            indices = torch.where(context.mask.unsqueeze(-1), indices, -1)
        return Asked(indices, scores_TN.detach(), context.mask, context.batch, self.training)

    def record(
        self,
        context: Context,
        logits: Tensor,
        scores: Tensor,
        indices: Tensor,
        weights: Tensor,
        carried: Tensor,
        *,
        full: bool = False,
    ) -> Routing:
        """Apply random routing and the padding mask, count, and return the record; `full`: every slot was filled."""
        full = full and not context.padded and self.switches.random_seed is None
        if self.switches.random_seed is not None:
            forbidden = self.removed_ids() if self.switches.removed else None
            seed, layer = self.switches.random_seed, context.layer
            indices = random_ids(indices, self.num_ids, context.keys, seed, layer, forbidden, self.physical)
            weights = weights.masked_fill(indices < 0, 0.0)
        if context.padded:
            real = context.mask.unsqueeze(-1)
            indices, weights = torch.where(real, indices, -1), torch.where(real, weights, 0.0)
        return Routing(
            logits=logits,
            scores=scores,
            indices=indices,
            weights=weights,
            mask=context.mask,
            counts=count(indices, self.num_ids, full=full),
            batch=context.batch,
            top_k=self.moe.top_k,
            num_experts=self.moe.num_experts,
            padded=context.padded,
            full=full,
            softmax=self.distribution,
            physical=self.physical,
            carried=carried,
            tempered=self.tempered(logits) if self.moe.z_after_temperature else None,
            **self.extras(),
        )

    def _pool(self, logits_TN: Tensor, context: Context) -> Tensor:
        if context.spans is None:
            raise MoegridError(
                f"routing unit {self.moe.unit!r} needs span ids",
                cause="the block was called without `spans`",
                hint=f"pass spans [B,S] of the data stage (spans_{self.moe.unit})",
            )
        if not len(logits_TN):
            return logits_TN
        shape = (context.batch, -1, logits_TN.shape[1])
        states = context.span_states
        pooled, state = pool_spans(
            logits_TN.view(shape),
            context.spans,
            context.mask.view(context.batch, -1),
            self.moe.pool,
            states.get(context.layer) if states is not None else None,
        )
        if states is not None:
            states[context.layer] = state
        return pooled.reshape(logits_TN.shape)
