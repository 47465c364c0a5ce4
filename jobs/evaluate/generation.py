"""Batched generation with a KV cache: greedy, or sampled from a seeded generator of each request's own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from jobs.evaluate.scoring import Model

_NEW_TOKENS_NAMES = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")


@dataclass(frozen=True, slots=True)
class Generation:
    """How one text is generated: stop sequences, the most new tokens, and temperature (0 = greedy)."""

    stops: tuple[str, ...]
    new_tokens: int
    temperature: float
    seed: int

    @classmethod
    def of(cls, settings: Mapping[str, Any], end: str, new_tokens: int) -> Generation:
        """Read lm-eval's generation settings; the end of text always stops."""
        until = settings.get("until") or []
        stops = [until] if isinstance(until, str) else list(until)
        limit = next((settings[name] for name in _NEW_TOKENS_NAMES if settings.get(name) is not None), new_tokens)
        sampled = bool(settings.get("do_sample", float(settings.get("temperature") or 0.0) > 0))
        temperature = float(settings.get("temperature") or 1.0) if sampled else 0.0
        return cls(tuple(stop for stop in [*stops, end] if stop), int(limit), temperature, int(settings.get("seed", 0)))


def generate(
    model: Model, tokenizer: Any, requests: Sequence[tuple[list[int], Generation]], tokens_per_batch: int
) -> list[str]:
    """Return the text that follows each context, cut at its first stop sequence."""
    order = sorted(range(len(requests)), key=lambda i: (requests[i][1].new_tokens, len(requests[i][0])), reverse=True)
    texts = [""] * len(requests)
    while order:
        longest = len(requests[order[0]][0]) + requests[order[0]][1].new_tokens
        count = max(1, tokens_per_batch // longest)
        batch, order = order[:count], order[count:]
        run = _cached if model.cacheable else _uncached
        # Sampling is seeded by the request's own number: batches may be of any size.
        chosen = [(requests[i][0], replace(requests[i][1], seed=seed_of(requests[i][1].seed, i))) for i in batch]
        for number, ids in zip(batch, run(model, tokenizer, chosen), strict=True):
            texts[number] = _cut(tokenizer.decode(ids, skip_special_tokens=False), requests[number][1].stops)
    return texts


def seed_of(seed: int, number: int) -> int:
    """Return the seed of request `number` of a list of requests."""
    return int(np.random.SeedSequence([seed, number]).generate_state(1)[0])


def _cut(text: str, stops: Sequence[str]) -> str:
    for stop in stops:
        text = text.split(stop)[0]
    return text


class _Progress:
    """The tokens generated so far for the rows of one batch."""

    def __init__(self, tokenizer: Any, settings: Sequence[Generation]) -> None:
        self.tokenizer = tokenizer
        self.settings = settings
        self.ids: list[list[int]] = [[] for _ in settings]
        self.done = [False] * len(settings)
        self._random = [np.random.Generator(np.random.PCG64(s.seed)) for s in settings]

    def add(self, logits_nV: Tensor, rows: Sequence[int]) -> None:
        """Choose the next token of `rows`; a finished row stays as it is."""
        greedy = logits_nV.argmax(-1).tolist()
        for place, row in enumerate(rows):
            if self.done[row]:
                continue
            setting, token = self.settings[row], greedy[place]
            if setting.temperature > 0:
                weights = torch.softmax(logits_nV[place].double() / setting.temperature, -1).cpu().numpy()
                token = int(self._random[row].choice(len(weights), p=weights / weights.sum()))
            self.ids[row].append(token)
            # Stop sequences are short: the last few tokens hold any that has just been completed.
            tail = self.tokenizer.decode(self.ids[row][-24:], skip_special_tokens=False)
            full = len(self.ids[row]) >= setting.new_tokens
            self.done[row] = full or any(stop in tail for stop in setting.stops)


def _rows(contexts: Sequence[list[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    length = max(map(len, contexts))
    ids = torch.zeros(len(contexts), length, dtype=torch.long)
    for row, context in enumerate(contexts):
        ids[row, : len(context)] = torch.tensor(context)
    lengths = torch.tensor([len(context) for context in contexts])
    return ids.to(device), lengths.to(device)


@torch.inference_mode()
def _cached(model: Model, tokenizer: Any, requests: Sequence[tuple[list[int], Generation]]) -> list[list[int]]:
    progress = _Progress(tokenizer, [settings for _, settings in requests])
    ids, lengths = _rows([context for context, _ in requests], model.device)
    place = torch.arange(ids.shape[1], device=ids.device)
    real = place[None, :] < lengths[:, None]
    keep = place[None, :] == lengths[:, None] - 1
    logits, cache, _ = model(ids, keep, real, use_cache=True)
    rows = list(range(len(requests)))  # of the batch as it is now
    seen = real
    step = 0
    while True:
        progress.add(logits, rows)
        going = [place for place, row in enumerate(rows) if not progress.done[row]]
        if not going:
            return progress.ids
        if 2 * len(going) <= len(rows):
            # Every copy of the cache halves it: the finished rows cost less than copying it at every token.
            index = torch.tensor(going, device=ids.device)
            cache.batch_select_indices(index)
            seen, lengths, rows = seen[index], lengths[index], [rows[place] for place in going]
        tokens = torch.tensor([progress.ids[row][-1:] for row in rows], device=ids.device)
        one = torch.ones_like(tokens, dtype=torch.bool)
        seen = torch.cat([seen, one], dim=1)
        logits, cache, _ = model(
            tokens,
            one,
            one,
            attention_mask=seen.long(),
            position_ids=(lengths + step)[:, None],
            past_key_values=cache,
            use_cache=True,
        )
        step += 1


@torch.inference_mode()
def _uncached(model: Model, tokenizer: Any, requests: Sequence[tuple[list[int], Generation]]) -> list[list[int]]:
    """Generate with the whole text fed again for every token: for routers whose choice depends on other tokens."""
    progress = _Progress(tokenizer, [settings for _, settings in requests])
    rows = list(range(len(requests)))
    while rows:
        texts = [requests[row][0] + progress.ids[row] for row in rows]
        ids, lengths = _rows(texts, model.device)
        place = torch.arange(ids.shape[1], device=ids.device)
        real = place[None, :] < lengths[:, None]
        keep = place[None, :] == lengths[:, None] - 1
        extra = {}
        if model.spans is not None:
            spans = [model.spans(np.array(text)).tolist() for text in texts]
            extra["spans"] = _rows(spans, model.device)[0]
        logits, _, _ = model(ids, keep, real, attention_mask=real.long(), use_cache=False, **extra)
        progress.add(logits, rows)
        rows = [row for row in rows if not progress.done[row]]
    return progress.ids
