"""Word and sentence routing: all tokens of a span share one assignment (MoE-Bench's routing units)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class SpanState:
    """The open span at the end of a cached prefix: id [B], sum (fp64) and first of its logits [B,N], length [B]."""

    span: Tensor
    total: Tensor
    first: Tensor
    count: Tensor


def pool_spans(
    logits_BSN: Tensor, spans_BS: Tensor, mask_BS: Tensor, pool: str, state: SpanState | None = None
) -> tuple[Tensor, SpanState]:
    """Replace each token's logits by its span's (first token, running mean or full mean); padding keeps its own.

    `state` continues the span that was open when the cache ended. Returns the pooled logits and the new open span.
    """
    batch, length, _ = logits_BSN.shape
    spans = spans_BS.to(torch.long)
    position = torch.arange(length, device=spans.device).expand(batch, length)
    fresh = torch.ones_like(mask_BS)
    fresh[:, 1:] = (spans[:, 1:] != spans[:, :-1]) | (mask_BS[:, 1:] != mask_BS[:, :-1])
    fresh |= ~mask_BS
    start = torch.where(fresh, position, 0).cummax(1).values  # [B,S] where the token's span begins here
    carried = torch.zeros_like(mask_BS)
    if state is not None:
        carried = (start == 0) & mask_BS[:, :1] & (spans[:, :1] == state.span.unsqueeze(1))
    first = logits_BSN.gather(1, start.unsqueeze(-1).expand_as(logits_BSN))
    # A span's sum is a difference of two sums over the row: in fp64, or it would lose digits as the row gets longer.
    sums = torch.where(mask_BS.unsqueeze(-1), logits_BSN, 0.0).double().cumsum(1)
    until = sums.gather(1, (start - 1).clamp_min(0).unsqueeze(-1).expand_as(sums))
    before = torch.where((start > 0).unsqueeze(-1), until, 0.0)
    running, count = sums - before, (position - start + 1)
    if state is not None:
        first = torch.where(carried.unsqueeze(-1), state.first.unsqueeze(1), first)
        running = torch.where(carried.unsqueeze(-1), running + state.total.unsqueeze(1), running)
        count = torch.where(carried, count + state.count.unsqueeze(1), count)
    mean = (running / count.unsqueeze(-1)).to(logits_BSN.dtype)
    if pool == "first":
        pooled = first
    elif pool == "causal_mean":
        pooled = mean
    else:
        last = torch.ones_like(fresh)
        last[:, :-1] = fresh[:, 1:]
        end = torch.where(last, position, length).flip(1).cummin(1).values.flip(1)
        pooled = mean.gather(1, end.unsqueeze(-1).expand_as(mean))
    pooled = torch.where(mask_BS.unsqueeze(-1), pooled, logits_BSN)
    tail = _last_real(mask_BS)
    rows = torch.arange(batch, device=spans.device)
    open_span = torch.where(mask_BS.any(1), spans[rows, tail], -1)
    return pooled, SpanState(
        open_span, running[rows, tail].detach(), first[rows, tail].detach(), count[rows, tail].detach()
    )


def _last_real(mask_BS: Tensor) -> Tensor:
    position = torch.arange(mask_BS.shape[1], device=mask_BS.device)
    return torch.where(mask_BS, position, 0).amax(1)
