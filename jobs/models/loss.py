"""Next-token cross-entropy fused with the output head: logits exist one chunk of tokens at a time."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from jobs.moe.host import visible
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
        empty = torch.empty_like if len(hidden) else torch.zeros_like
        d_heads = [empty(head) for _ in range(groups)] if need_head else []
        losses = torch.zeros(groups, dtype=torch.float32, device=hidden.device)
        masked = bool((labels == -100).any()) if visible(labels) else True
        chunk = min(CPU_CHUNK if visible(hidden) else GPU_CHUNK, len(hidden))
        starts = [range(0, len(hidden), chunk)[group::groups] for group in range(groups)] if chunk else []

        def run(group: int) -> None:
            # The same memory for every chunk: it is still in cache.
            buffer = hidden.new_empty(chunk, len(head))
            for start in starts[group]:
                h, target = hidden[start : start + chunk], labels[start : start + chunk].unsqueeze(1)
                ignored = target == -100
                target = target.masked_fill(ignored, 0)
                logits = torch.mm(h, head.t(), out=buffer[: len(h)]).float()
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
                if d_hidden is not None:
                    torch.mm(gradient, head, out=d_hidden[start : start + chunk])
                if d_heads and start == starts[group][0]:
                    torch.mm(gradient.t(), h, out=d_heads[group])
                elif d_heads:
                    d_heads[group].addmm_(gradient.t(), h)

        for_each(run, [chunk * len(part) for part in starts])
        loss = losses.sum()
        d_head = d_heads[0] if d_heads else None
        for other in d_heads[1:]:
            d_heads[0].add_(other)
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
