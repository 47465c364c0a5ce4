"""Batched generation with a KV cache: greedy, or sampled from a seeded generator of each request's own.

Contexts that begin alike (few shots before every question) are generated side by side: their common prefix is computed
once, and its keys and values are held once for all rows. So is a picture that stands before all of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from jobs.evaluate.packed_pass import PackedPass
from jobs.evaluate.prefix_tree import SHORTEST_TRUNK, Scored
from jobs.evaluate.scoring import Model
from jobs.models.backbones import CausalLM, Output
from jobs.models.key_values import KeyValues

# Keys and values of the rows that generate side by side may take so many bytes.
CACHE_BYTES = {"cpu": 2**28}
CACHE_BYTES_ACCELERATOR = 2**32
# More rows make no product of matrices faster, and all wait for the last one.
MOST_ROWS = 64
# A pass over contexts may feed so many batches of scoring: of each row the last position alone needs logits.
CONTEXT_BATCHES = 8

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
    model: Model,
    tokenizer: Any,
    requests: Sequence[tuple[list[int], Generation]],
    tokens_per_batch: int,
    picture: Tensor | None = None,
) -> list[str]:
    """Return the text that follows each context, cut at its first stop sequence; 0 tokens a batch: each text alone.

    `picture` [1,P,D] (features) or [1,H,W,3] (pixels) stands before every context.
    """
    texts = [""] * len(requests)
    for batch in _batches(model, requests, tokens_per_batch, apart=picture is None):
        run = _cached if model.cacheable else _uncached
        # Sampling is seeded by the request's own number: batches may be of any size.
        chosen = [(requests[i][0], replace(requests[i][1], seed=seed_of(requests[i][1].seed, i))) for i in batch]
        for number, ids in zip(batch, run(model, tokenizer, chosen, picture), strict=True):
            texts[number] = _cut(tokenizer.decode(ids, skip_special_tokens=False), requests[number][1].stops)
    return texts


def _batches(
    model: Model, requests: Sequence[tuple[list[int], Generation]], tokens_per_batch: int, *, apart: bool
) -> Iterator[list[int]]:
    """Yield the numbers of requests that run side by side: those of one prefix, the longest first.

    Not `apart`: they have one in common already.
    """
    contexts = [context for context, _ in requests]
    groups = _alike(contexts) if model.cacheable and tokens_per_batch and apart else [(list(range(len(requests))), 0)]
    for group, shared in groups:
        order = sorted(group, key=lambda i: (requests[i][1].new_tokens, len(contexts[i])), reverse=True)
        while order:
            longest = len(contexts[order[0]]) + requests[order[0]][1].new_tokens
            if model.cacheable:
                fed = max(len(contexts[i]) for i in order[:MOST_ROWS]) - shared
                held = _cache_bytes(model.device) // (longest * model.token_bytes)
                rows = min(MOST_ROWS, held, CONTEXT_BATCHES * tokens_per_batch // fed)
            else:
                rows = tokens_per_batch // longest
            yield order[: max(1, rows)]
            order = order[max(1, rows) :]


def _cache_bytes(device: torch.device) -> int:
    return CACHE_BYTES.get(device.type, CACHE_BYTES_ACCELERATOR)


def _alike(contexts: Sequence[list[int]]) -> list[tuple[list[int], int]]:
    """Return groups of context numbers with the length of their common prefix; those that share with none are one."""
    # Of a context at least the last token is fed by itself: its logits are what generation starts from.
    keys = [np.asarray(context[:-1], dtype=">i4").tobytes() for context in contexts]
    order = sorted(range(len(contexts)), key=keys.__getitem__)
    runs: list[list[int]] = []
    prefix: list[int] = []  # the common prefix of each run
    for number in order:
        shared = _common(contexts[runs[-1][-1]], contexts[number]) if runs else 0
        if shared < SHORTEST_TRUNK or 2 * shared < prefix[-1]:
            # A prefix of less than half the length would be computed again for the rest of it.
            runs.append([number])
            prefix.append(0)
        elif len(runs[-1]) > 1 and shared > 2 * prefix[-1]:
            # The one before has more in common with this one than with those before it.
            runs.append([runs[-1].pop(), number])
            prefix.append(shared)
        else:
            prefix[-1] = min(shared, prefix[-1]) if len(runs[-1]) > 1 else shared
            runs[-1].append(number)
    alone = [run[0] for run in runs if len(run) == 1]
    groups = [(run, shared) for run, shared in zip(runs, prefix, strict=True) if len(run) > 1]
    return [*groups, (alone, 0)] if alone else groups


def _common(one: list[int], other: list[int]) -> int:
    """Return how many first tokens two contexts share, the last of either apart."""
    length = min(len(one), len(other)) - 1
    differs = np.flatnonzero(np.asarray(one[:length]) != np.asarray(other[:length]))
    return int(differs[0]) if len(differs) else length


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
def _cached(
    model: Model, tokenizer: Any, requests: Sequence[tuple[list[int], Generation]], picture: Tensor | None
) -> list[list[int]]:
    progress = _Progress(tokenizer, [settings for _, settings in requests])
    logits, cache, seen = _read(model, [context for context, _ in requests], picture)
    lengths = seen.sum(1)
    rows = list(range(len(requests)))  # of the batch as it is now
    step = 0
    while True:
        progress.add(logits, rows)
        going = [place for place, row in enumerate(rows) if not progress.done[row]]
        if not going:
            return progress.ids
        if 2 * len(going) <= len(rows):
            # Every copy of the cache halves it: the finished rows cost less than copying it at every token.
            index = torch.tensor(going, device=model.device)
            cache.batch_select_indices(index)
            seen, lengths, rows = seen[index], lengths[index], [rows[place] for place in going]
        tokens = torch.tensor([progress.ids[row][-1:] for row in rows], device=model.device)
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


def _read(model: Model, contexts: Sequence[list[int]], picture: Tensor | None = None) -> tuple[Tensor, Any, Tensor]:
    """Return logits [B,V] after each context, the cache, and which of its places are tokens [B,L]."""
    shared = min((_common(contexts[0], context) for context in contexts[1:]), default=0)
    if picture is None and model.packs and model.contrast is None:
        return _read_packed(model, contexts, shared if shared >= SHORTEST_TRUNK else 0)
    cached: dict[str, object] = {}
    if picture is not None:
        nothing = torch.zeros(1, 0, dtype=torch.long, device=model.device)
        cache = model.module(nothing, images=picture, use_cache=True).past_key_values
        shared = cache.get_seq_length()
        cache.batch_repeat_interleave(len(contexts))
        cached["past_key_values"] = cache
    elif shared >= SHORTEST_TRUNK:
        ids, _ = _rows([contexts[0][:shared]], model.device)
        one = torch.ones_like(ids, dtype=torch.bool)
        last = torch.arange(shared, device=ids.device)[None, :] == shared - 1
        _, cache, _ = model(ids, last, one, use_cache=True)
        cache.batch_repeat_interleave(len(contexts))
        contexts = [context[shared:] for context in contexts]
        cached["past_key_values"] = cache
    else:
        shared = 0
    ids, lengths = _rows(contexts, model.device)
    place = torch.arange(ids.shape[1], device=ids.device)
    real = place[None, :] < lengths[:, None]
    seen = torch.cat([real.new_ones(len(contexts), shared), real], dim=1)
    if cached:
        cached |= {"attention_mask": seen.long(), "position_ids": (shared + place).expand(len(contexts), -1)}
    # Padding lies behind the real tokens: without a prefix the causal mask already hides it.
    logits, cache, _ = model(ids, place[None, :] == lengths[:, None] - 1, real, use_cache=True, **cached)
    return logits, cache, seen


def _read_packed(model: Model, contexts: Sequence[list[int]], shared: int) -> tuple[Tensor, KeyValues, Tensor]:
    """Do as `_read` in one row without padding, whose last layer computes the last token of each context alone."""
    module, device = model.module, model.device
    assert isinstance(module, CausalLM)
    lengths = np.array([len(context) - shared for context in contexts])
    lasts = shared + np.cumsum(lengths)
    firsts = lasts - lengths
    whole = PackedPass(
        np.concatenate([contexts[0][:shared], *(context[shared:] for context in contexts)]).astype(np.int64),
        np.concatenate([np.arange(shared), *(shared + np.arange(length) for length in lengths)]),
        np.concatenate([np.full(shared, lasts[-1]), np.repeat(lasts, lengths)]),
        Scored.of([]),
    )
    output: Output = module(
        torch.from_numpy(whole.ids)[None].to(device),
        packing=whole.packing(model.dtype, device, torch.from_numpy(lasts - 1).to(device)),
        position_ids=torch.from_numpy(whole.positions)[None].to(device),
        use_cache=True,
    )
    cache = output.past_key_values
    assert output.hidden is not None
    assert cache is not None
    place = np.arange(lengths.max())
    real = place[None, :] < lengths[:, None]
    cache.deal(torch.from_numpy(np.where(real, firsts[:, None] + place, 0)).to(device), shared)
    seen = np.concatenate([np.ones((len(contexts), shared), dtype=bool), real], axis=1)
    return module.head(output.hidden), cache, torch.from_numpy(seen).to(device)


@torch.inference_mode()
def _uncached(
    model: Model, tokenizer: Any, requests: Sequence[tuple[list[int], Generation]], picture: Tensor | None
) -> list[list[int]]:
    """Generate with the whole text fed again for every token: for routers whose choice depends on other tokens."""
    progress = _Progress(tokenizer, [settings for _, settings in requests])
    rows = list(range(len(requests)))
    while rows:
        texts = [requests[row][0] + progress.ids[row] for row in rows]
        ids, lengths = _rows(texts, model.device)
        place = torch.arange(ids.shape[1], device=ids.device)
        real = place[None, :] < lengths[:, None]
        keep = place[None, :] == lengths[:, None] - 1
        extra = {} if picture is None else {"images": picture.expand(len(rows), *picture.shape[1:])}
        if model.spans is not None:
            spans = [model.spans(np.array(text)).tolist() for text in texts]
            extra["spans"] = _rows(spans, model.device)[0]
        logits, _, _ = model(ids, keep, real, attention_mask=real.long(), use_cache=False, **extra)
        progress.add(logits, rows)
        rows = [row for row in rows if not progress.done[row]]
    return progress.ids
