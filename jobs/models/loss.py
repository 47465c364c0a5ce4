"""Next-token cross-entropy fused with the output head: logits exist one chunk of tokens at a time."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from jobs.moe.host import visible
from jobs.moe.products import ROWS, fits, times
from jobs.threads import for_each, threads_for

# Tokens per chunk. On a CPU 256 x 4096 fp32 logits are 4 MB: they stay in cache; a GPU wants larger products.
CPU_CHUNK, GPU_CHUNK = 256, 4096


def linear_cross_entropy(hidden_BSD: Tensor, head_VD: Tensor, labels_BS: Tensor) -> tuple[Tensor, Tensor]:
    """Return (summed cross-entropy in nats, number of labels) of `hidden @ head.T`; labels of -100 count nothing."""
    labels = labels_BS.reshape(-1)
    hidden = hidden_BSD.reshape(-1, hidden_BSD.shape[-1])
    if torch.is_autocast_enabled(hidden.device.type):
        dtype = torch.get_autocast_dtype(hidden.device.type)
        hidden, head_VD = hidden.to(dtype), head_VD.to(dtype)
    kept = labels != -100
    tokens = kept.sum()
    if visible(hidden) and not bool(kept.all()):
        # Loss on the response only: the head runs on its tokens alone.
        rows = kept.nonzero().squeeze(1)
        hidden, labels = hidden.index_select(0, rows), labels.index_select(0, rows)
    return _LinearCrossEntropy.apply(hidden, head_VD, labels), tokens  # type: ignore[no-untyped-call]


class _LinearCrossEntropy(torch.autograd.Function):
    """Computes both gradients in the forward pass, while a chunk's logits are there; backward scales them."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: Tensor, labels: Tensor) -> Tensor:
        need_hidden, need_head = ctx.needs_input_grad[:2]
        d_hidden = torch.empty_like(hidden) if need_hidden else None
        # Each group of chunks has its own sums, added in order: bits depend on the number of threads alone.
        groups = threads_for(len(hidden)) if visible(hidden) else 1
        chunk = min(CPU_CHUNK if visible(hidden) else GPU_CHUNK, len(hidden))
        fast = head.dtype is hidden.dtype and fits(hidden, CPU_CHUNK)
        pieces = _pieces(len(hidden), chunk, ROWS if fast else 1)
        # oneDNN copies what it is given transposed on the left: of [D,V] that is the smaller matrix.
        shape = head.shape[::-1] if fast else head.shape
        made = head.new_empty if len(hidden) else head.new_zeros
        d_heads = [made(shape) for _ in range(groups)] if need_head else []
        losses = torch.zeros(groups, dtype=torch.float32, device=hidden.device)
        masked = bool((labels == -100).any()) if visible(labels) else True

        def run(group: int) -> None:
            # The same memory for every chunk: it is still in cache.
            buffer = hidden.new_empty(chunk, len(head))
            for number, (start, size) in enumerate(pieces[group::groups]):
                h, target = hidden[start : start + size], labels[start : start + size].unsqueeze(1)
                ignored = target == -100
                target = target.masked_fill(ignored, 0)
                quick = fast and not size % ROWS
                logits = times(h, head) if quick else torch.mm(h, head.t(), out=buffer[:size]).float()
                highest, right = logits.amax(-1, keepdim=True), logits.gather(1, target)
                # In place on a CPU: half the memory to keep in cache.
                p = torch.softmax(logits, dim=-1, out=logits if visible(logits) else None)
                # logsumexp = max h - log(max p): max p >= 1/V cannot underflow, and a softmax is one fused pass.
                nats = highest - p.amax(-1, keepdim=True).log_() - right
                losses[group] += nats.masked_fill_(ignored, 0.0).sum()
                if d_hidden is None and not d_heads:
                    continue
                p.scatter_add_(1, target, torch.full_like(highest, -1.0))
                gradient = p.mul_(~ignored).to(head.dtype) if masked else p.to(head.dtype)
                if d_hidden is not None and quick:
                    d_hidden[start : start + size] = times(gradient, head.t())
                elif d_hidden is not None:
                    torch.mm(gradient, head, out=d_hidden[start : start + size])
                if d_heads:
                    _add_product(d_heads[group], h, gradient, first=not number, turned=fast, quick=quick)

        for_each(run, [chunk * len(pieces[group::groups]) for group in range(groups)])
        loss = losses.sum()
        for other in d_heads[1:]:
            d_heads[0].add_(other)
        d_head = (d_heads[0].t().contiguous() if fast else d_heads[0]) if d_heads else None
        ctx.save_for_backward(*[g for g in (d_hidden, d_head) if g is not None])
        ctx.has = (d_hidden is not None, d_head is not None)
        return loss

    @staticmethod
    def backward(ctx: Any, d_loss: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        saved = list(ctx.saved_tensors)
        # In place: autograd refuses a second backward pass, which would scale them twice.
        d_hidden = saved.pop(0).mul_(d_loss) if ctx.has[0] else None
        d_head = saved.pop(0).mul_(d_loss) if ctx.has[1] else None
        return d_hidden, d_head, None


def _pieces(rows: int, chunk: int, step: int) -> list[tuple[int, int]]:
    """Return (first, number) of the rows of each chunk, all whole multiples of `step` but for a last few."""
    pieces = [(start, min(chunk, rows - start)) for start in range(0, rows, chunk)] if chunk else []
    if pieces and (rest := pieces[-1][1] % step) and (most := pieces[-1][1] - rest):
        start = pieces.pop()[0]
        pieces += [(start, most), (start + most, rest)]
    return pieces


def _add_product(sums: Tensor, h_TD: Tensor, d_TV: Tensor, *, first: bool, turned: bool, quick: bool) -> None:
    """Add d^T h to sums [V,D], or h^T d to sums that are `turned` [D,V]; the first product makes them."""
    left, right = (h_TD, d_TV) if turned else (d_TV, h_TD)
    if quick and first:
        sums.copy_(times(left.t(), right.t()))
    elif quick:
        sums.add_(times(left.t(), right.t()))
    elif first:
        torch.mm(left.t(), right, out=sums)
    else:
        sums.addmm_(left.t(), right)
