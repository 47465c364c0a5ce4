"""Runs a schedule of `prefix_tree` through a model: log-likelihood and greedy flag of every request.

Works for our `CausalLM` and for plain transformers causal LMs. Logits are computed on scored positions only and
reduced in fp32.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from jobs.evaluate.prefix_tree import Schedule, Scored, Tree, Trunk
from jobs.moe.routing import Routing

# Logits of so many entries are held at once (1 GB in fp32 would be 2**28).
LARGEST_LOGITS = 2**26
TOKENS_PER_BATCH = 4096

Spans = Callable[[NDArray[np.int64]], NDArray[np.int64]]


def batch_tokens(vocabulary: int) -> int:
    """Return how many tokens a batch may feed: every one of them may need logits over the whole vocabulary."""
    return min(TOKENS_PER_BATCH, max(512, LARGEST_LOGITS // vocabulary))


class Observer(Protocol):
    """Sees the routing records of every forward pass, with the mask of its real tokens [B,S]."""

    def __call__(self, routings: tuple[Routing, ...], real_BS: Tensor) -> None: ...


@dataclass
class Scores:
    """Per request: summed natural-log likelihood of the continuation, and whether it is what greedy decoding gives."""

    loglikelihood: NDArray[np.float64]
    greedy: NDArray[np.bool_]

    @classmethod
    def empty(cls, requests: int) -> Scores:
        return cls(np.zeros(requests), np.ones(requests, dtype=bool))


@dataclass
class Model:
    """A model as the scorer calls it. `ours` models leave routing records and are told which tokens are padding."""

    module: nn.Module
    spans: Spans | None = None  # span numbers of a whole sequence, for routers that need them
    ours: bool = field(init=False)

    def __post_init__(self) -> None:
        self.ours = hasattr(self.module, "moe_blocks")

    @property
    def device(self) -> torch.device:
        return next(self.module.parameters()).device

    @property
    def cacheable(self) -> bool:
        """Whether prefixes may be shared: a token's routing depends on that token and on earlier ones alone."""
        return bool(getattr(self.module, "cacheable", True))

    def __call__(self, ids_BS: Tensor, keep_BS: Tensor, real_BS: Tensor, **kwargs: Any) -> tuple[Tensor, Any, Any]:
        """Return (logits [n,V] at the positions of `keep_BS` in row order, cache, routing records)."""
        if self.ours:
            padding = None if bool(real_BS.all()) else ~real_BS
            output = self.module(ids_BS, logits_to_keep=keep_BS, padding=padding, **kwargs)
            return output.logits, output.past_key_values, output.routings
        head = self.module.get_output_embeddings()  # type: ignore[operator]

        def select(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor]:
            return (inputs[0][keep_BS].unsqueeze(0),)

        kwargs.pop("spans", None)
        handle = head.register_forward_pre_hook(select)
        try:
            output = self.module(input_ids=ids_BS, **kwargs)
        finally:
            handle.remove()
        return output.logits[0], getattr(output, "past_key_values", None), ()


class Scorer:
    """Scores schedules with one model; `tokens` counts what was fed, with padding."""

    def __init__(self, model: Model, observer: Observer | None = None) -> None:
        self.model = model
        self.observer = observer
        self.tokens = 0
        self._dtype = next(model.module.parameters()).dtype

    @torch.inference_mode()
    def run(self, schedule: Schedule) -> Scores:
        """Return the scores of every request of `schedule`."""
        scores = Scores.empty(schedule.requests)
        for batch in schedule.trees:
            self._trees(batch, scores)
        for trunks in schedule.trunks:
            self._trunks(trunks, scores)
        return scores

    def _trees(self, trees: Sequence[Tree], scores: Scores) -> None:
        ids, real = _padded([tree.ids for tree in trees], self.model.device)
        kwargs: dict[str, Any] = {"use_cache": False}
        if any(not tree.chain for tree in trees):
            kwargs["attention_mask"] = self._mask(trees, None, ids.shape[1])
            kwargs["position_ids"] = _padded([tree.positions for tree in trees], self.model.device)[0]
        elif not self.model.cacheable:
            kwargs["attention_mask"] = real.long()
        if self.model.spans is not None:
            kwargs["spans"] = _padded([self.model.spans(tree.ids) for tree in trees], self.model.device)[0]
        self._forward(ids, real, [tree.scored for tree in trees], scores, **kwargs)

    def _trunks(self, trunks: Sequence[Trunk], scores: Scores) -> None:
        device = self.model.device
        ids, real = _padded([trunk.ids for trunk in trunks], device)
        # Padding lies behind the real tokens: the causal mask already hides it.
        cache = self._forward(ids, real, [trunk.scored for trunk in trunks], scores, use_cache=True)
        length = ids.shape[1]
        for number in range(max(len(trunk.trees) for trunk in trunks)):
            trees = [trunk.trees[number] for trunk in trunks]
            excess = cache.get_seq_length() - length
            if excess:
                cache.crop(-excess)
            ids, tree_real = _padded([tree.ids for tree in trees], device)
            positions, _ = _padded([tree.positions for tree in trees], device)
            mask = self._mask(trees, real, ids.shape[1])
            scored = [tree.scored for tree in trees]
            self._forward(
                ids,
                tree_real,
                scored,
                scores,
                attention_mask=mask,
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
            )

    def _mask(self, trees: Sequence[Tree], trunk_BL: Tensor | None, length: int) -> Tensor:
        """Return the additive attention mask [B, 1, Q, L + Q]: the real trunk, ancestors, the token itself."""
        device = self.model.device
        place = torch.arange(length, device=device)
        # A padded token sees itself, lest its softmax be empty.
        ends = place.repeat(len(trees), 1) + 1
        for row, tree in enumerate(trees):
            ends[row, : len(tree.ends)] = torch.from_numpy(tree.ends).to(device)
        seen = (place[None, None, :] <= place[None, :, None]) & (place[None, :, None] < ends[:, None, :])
        if trunk_BL is not None:
            seen = torch.cat([trunk_BL[:, None, :].expand(-1, length, -1), seen], dim=-1)
        mask = torch.zeros(seen.shape, dtype=self._dtype, device=device)
        return mask.masked_fill_(~seen, torch.finfo(self._dtype).min)[:, None]

    def _forward(self, ids: Tensor, real: Tensor, scored: Sequence[Scored], scores: Scores, **kwargs: Any) -> Any:
        rows = np.concatenate([np.full(len(s.position), row) for row, s in enumerate(scored)])
        columns = np.concatenate([s.position for s in scored])
        targets = np.concatenate([s.target for s in scored])
        requests = np.concatenate([s.request for s in scored])
        places, slot = np.unique(rows * ids.shape[1] + columns, return_inverse=True)
        keep = torch.zeros(ids.numel(), dtype=torch.bool, device=ids.device)
        keep[torch.from_numpy(places.astype(np.int64))] = True
        logits, cache, routings = self.model(ids, keep.view(ids.shape), real, **kwargs)
        self.tokens += ids.numel()
        if self.observer is not None and routings:
            self.observer(routings, real)
        if len(places):
            values, best = _reduce(logits, torch.from_numpy(slot), torch.from_numpy(targets))
            np.add.at(scores.loglikelihood, requests, values)
            np.logical_and.at(scores.greedy, requests, best == targets)
        return cache


def _reduce(logits_nV: Tensor, slot_m: Tensor, target_m: Tensor) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Return the log-probability of each target and the greedy choice at its slot, [m] each."""
    slot_m, target_m = slot_m.to(logits_nV.device), target_m.to(logits_nV.device)
    step = max(1, LARGEST_LOGITS // logits_nV.shape[1])
    normaliser = torch.cat([part.float().logsumexp(-1) for part in logits_nV.split(step)])
    best = logits_nV.argmax(-1)
    values = logits_nV[slot_m, target_m].float() - normaliser[slot_m]
    return values.double().cpu().numpy(), best[slot_m].cpu().numpy()


def _padded(rows: Sequence[NDArray[np.int64]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Return rows padded with 0 on the right [B,S], and which entries are real."""
    lengths = [len(row) for row in rows]
    ids = np.zeros((len(rows), max(lengths)), dtype=np.int64)
    real = np.arange(ids.shape[1])[None, :] < np.array(lengths)[:, None]
    ids[real] = np.concatenate(rows)
    return torch.from_numpy(ids).to(device), torch.from_numpy(real).to(device)
