"""Runs a schedule of `prefix_tree` through a model: log-likelihood and greedy flag of every request.

Works for our `CausalLM` and for plain transformers causal LMs. Logits are computed on scored positions only and
reduced in fp32.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from jobs.data.spans import Spans
from jobs.evaluate.dola import Contrast
from jobs.evaluate.packed_pass import PackedPass, passes
from jobs.evaluate.prefix_tree import Schedule, Scored, Tree, Trunk
from jobs.evaluate.reduction import reduced, rows_at_once
from jobs.models.backbones import CausalLM, Output
from jobs.models.key_values import KeyValues
from jobs.moe.host import visible
from jobs.moe.products import ROWS, fits
from jobs.moe.routing import Routing

# Logits of so many entries may be held at once (2**27 in fp32: half a GB).
LARGEST_LOGITS = 2**27
# What a batch feeds: more only adds padding on a CPU, and keeps an accelerator busy.
TOKENS_PER_BATCH = {"cpu": 2048}
TOKENS_PER_ACCELERATOR_BATCH = 16384
# A packed pass of so many tokens is filled up where its products are then faster.
FILLED_UP = 512


def batch_tokens(vocabulary: int, device: torch.device) -> int:
    """Return how many tokens a batch may feed: every one of them may need logits over the whole vocabulary."""
    most = TOKENS_PER_BATCH.get(device.type, TOKENS_PER_ACCELERATOR_BATCH)
    return min(most, max(512, LARGEST_LOGITS // vocabulary))


def text_config(model: nn.Module) -> Any:
    """Return the config of a transformers model, of one that reads more than text its part for text; None without."""
    config = getattr(model, "config", None)
    return getattr(config, "text_config", None) or config


class Observer(Protocol):
    """Sees the routing records of every forward pass, with the mask of its real tokens [B,S]."""

    def __call__(self, routings: tuple[Routing, ...], real_BS: Tensor) -> None: ...


@dataclass
class Scores:
    """Per request: summed natural-log likelihood of the continuation, and whether it is what greedy decoding gives."""

    loglikelihood: NDArray[np.float64]
    greedy: NDArray[np.bool_]


@dataclass
class Model:
    """A model as the scorer calls it. `ours` models leave routing records and are told which tokens are padding."""

    module: nn.Module
    spans: Spans | None = None  # span numbers of a whole sequence, for routers that need them
    contrast: Contrast | None = None
    ours: bool = field(init=False)

    def __post_init__(self) -> None:
        self.ours = hasattr(self.module, "moe_blocks")

    @property
    def device(self) -> torch.device:
        return next(self.module.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.module.parameters()).dtype

    @property
    def token_bytes(self) -> int:
        """Bytes of keys and values that a cache holds of one token, at most."""
        shape = getattr(self.module, "spec", None)
        if shape is not None:
            heads, width = shape.num_kv_heads, shape.head_width
            return int(2 * shape.num_layers * heads * width * self.dtype.itemsize)
        shape = text_config(self.module)
        heads = getattr(shape, "num_key_value_heads", None) or shape.num_attention_heads
        width = getattr(shape, "head_dim", None) or shape.hidden_size // shape.num_attention_heads
        return int(2 * shape.num_hidden_layers * heads * width * self.dtype.itemsize)

    @property
    def packs(self) -> bool:
        """Whether sequences may lie behind one another in one row: on a CPU nothing is then padded or masked."""
        return isinstance(self.module, CausalLM) and self.cacheable and visible(next(self.module.parameters()))

    @property
    def cacheable(self) -> bool:
        """Whether prefixes may be shared: a token's routing depends on that token and on earlier ones alone."""
        return bool(getattr(self.module, "cacheable", True))

    @property
    def by_length(self) -> bool:
        """Whether the longest row of a batch decides how the positions of all turn: rows are then computed alone."""
        return bool(getattr(self.module, "by_length", False))

    def __call__(self, ids_BS: Tensor, keep_BS: Tensor, real_BS: Tensor, **kwargs: object) -> tuple[Tensor, Any, Any]:
        """Return (logits [n,V] at the positions of `keep_BS` in row order, cache, routing records)."""
        if self.contrast is None:
            return self._run(ids_BS, keep_BS, real_BS, **kwargs)
        with self.contrast.watching(keep_BS) as states:
            logits, cache, routings = self._run(ids_BS, keep_BS, real_BS, **kwargs)
        return self.contrast.logits(logits, states), cache, routings

    def _run(self, ids_BS: Tensor, keep_BS: Tensor, real_BS: Tensor, **kwargs: object) -> tuple[Tensor, Any, Any]:
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


class _Tally:
    """Token log-probabilities by request, in the order of the continuation."""

    def __init__(self, requests: int) -> None:
        self._parts: list[tuple[NDArray[np.int64], NDArray[np.float32]]] = []
        self._greedy = np.ones(requests, dtype=bool)

    def add(self, requests: NDArray[np.int64], values: NDArray[np.float32], greedy: NDArray[np.bool_]) -> None:
        self._parts.append((requests, values))
        np.logical_and.at(self._greedy, requests, greedy)

    def scores(self) -> Scores:
        """Return the sums. They are taken in fp32 by torch, as the harness does, so that long texts round alike."""
        requests = np.concatenate([part for part, _ in self._parts] or [np.empty(0, dtype=np.int64)])
        values = np.concatenate([part for _, part in self._parts] or [np.empty(0, dtype=np.float32)])
        order = np.argsort(requests, kind="stable")
        counts = np.bincount(requests, minlength=len(self._greedy))
        pieces = torch.from_numpy(values[order]).split(counts.tolist())
        return Scores(np.array([float(piece.sum()) for piece in pieces]), self._greedy)


class Scorer:
    """Scores schedules with one model; `tokens` counts what was fed, with padding.

    `tokens_per_batch` are those of a packed pass: padded batches are the schedule's own. `device` is the type of the
    device whose logits are reduced.
    """

    def __init__(
        self, model: Model, observer: Observer | None = None, tokens_per_batch: int = TOKENS_PER_BATCH["cpu"]
    ) -> None:
        self.model = model
        self.observer = observer
        self._tokens_per_batch = tokens_per_batch
        self.tokens = 0
        self.device = model.device.type
        self._dtype = model.dtype

    @torch.inference_mode()
    def run(self, schedule: Schedule) -> Scores:
        """Return the scores of every request of `schedule`."""
        tally = _Tally(schedule.requests)
        if self.model.packs:
            self._packed(passes(schedule, self._tokens_per_batch), tally)
            return tally.scores()
        for batch in schedule.trees:
            self._trees(batch, tally)
        for trunks in schedule.trunks:
            self._trunks(trunks, tally)
        return tally.scores()

    def _packed(self, passes: Iterable[PackedPass], tally: _Tally) -> None:
        """Score passes of one row: who watches layers or their records sees all tokens, else the last sees few."""
        device, whole = self.model.device, self.observer is not None or self.model.contrast is not None
        cache: KeyValues | None = None
        for one in passes:
            if cache is not None:
                cache.crop(one.past - cache.get_seq_length())
            ids = torch.from_numpy(one.ids)[None].to(device)
            if whole:
                cache = self._forward(
                    ids,
                    torch.ones_like(ids, dtype=torch.bool),
                    [one.scored],
                    tally,
                    packing=one.packing(self._dtype, device, None),
                    position_ids=torch.from_numpy(one.positions)[None].to(device),
                    past_key_values=cache,
                    use_cache=one.trunk > 0,
                )
            else:
                cache = self._few(one, ids, tally, cache)
            cache = cache if one.trunk else None

    def _few(self, one: PackedPass, ids: Tensor, tally: _Tally, cache: KeyValues | None) -> KeyValues | None:
        """Score a pass whose last layer and head compute what is scored alone; return the cache."""
        places, slot = np.unique(one.scored.position, return_inverse=True)
        # Where nothing is scored the last layer still has keys and values to leave.
        kept = torch.from_numpy(places if len(places) else np.zeros(1, dtype=np.int64)).to(ids.device)
        module = self.model.module
        assert isinstance(module, CausalLM)
        self.tokens += ids.numel()
        if ids.numel() >= FILLED_UP and fits(module.backbone.lm_head.weight, ROWS):
            one = one.filled_up(ROWS)
            ids = torch.from_numpy(one.ids)[None]
        output: Output = module(
            ids,
            packing=one.packing(self._dtype, ids.device, kept),
            position_ids=torch.from_numpy(one.positions)[None].to(ids.device),
            past_key_values=cache,
            use_cache=one.trunk > 0,
        )
        if len(places) and output.hidden is not None:
            parts = (module.head(part) for part in output.hidden.split(rows_at_once(module.vocab_size)))
            tally.add(one.scored.request, *reduced(parts, slot, one.scored.target))
        return output.past_key_values

    def _trees(self, trees: Sequence[Tree], tally: _Tally) -> None:
        ids, real = _padded([tree.ids for tree in trees], self.model.device)
        kwargs: dict[str, object] = {"use_cache": False}
        if any(not tree.chain for tree in trees):
            kwargs["attention_mask"] = self._mask(trees, None, ids.shape[1])
            kwargs["position_ids"] = _padded([tree.positions for tree in trees], self.model.device)[0]
        elif not self.model.cacheable:
            kwargs["attention_mask"] = real.long()
        if self.model.spans is not None:
            kwargs["spans"] = _padded([self.model.spans(tree.ids) for tree in trees], self.model.device)[0]
        self._forward(ids, real, [tree.scored for tree in trees], tally, **kwargs)

    def _trunks(self, trunks: Sequence[Trunk], tally: _Tally) -> None:
        device = self.model.device
        ids, real = _padded([trunk.ids for trunk in trunks], device)
        # Padding lies behind the real tokens: the causal mask already hides it.
        cache = self._forward(ids, real, [trunk.scored for trunk in trunks], tally, use_cache=True)
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
                tally,
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

    def _forward(self, ids: Tensor, real: Tensor, scored: Sequence[Scored], tally: _Tally, **kwargs: object) -> Any:
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
            tally.add(requests, *reduced(logits.split(rows_at_once(logits.shape[1], self.device)), slot, targets))
        return cache


def _padded(rows: Sequence[NDArray[np.int64]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Return rows padded with 0 on the right [B,S], and which entries are real."""
    lengths = [len(row) for row in rows]
    ids = np.zeros((len(rows), max(lengths)), dtype=np.int64)
    real = np.arange(ids.shape[1])[None, :] < np.array(lengths)[:, None]
    ids[real] = np.concatenate(rows)
    return torch.from_numpy(ids).to(device), torch.from_numpy(real).to(device)
