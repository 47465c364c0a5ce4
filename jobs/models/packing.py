"""Attention of many sequences that lie behind one another in one row, where what they share stands once.

A row holds trees of tokens in depth-first order: whatever goes on from a run of tokens is one stretch behind it. So a
run is read by all its descendants in one product without a mask, and by its own tokens in a causal one; the two are
merged by their sums of exponentials, as blocks of keys are in FlashAttention (Dao et al. 2022, section 3.1). Nothing is
padded.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import BackwardCFunction, once_differentiable

# The kernel behind torch's scaled_dot_product_attention on a CPU: it also gives the logarithms of the sums.
_kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_kernel_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


@dataclass(frozen=True, slots=True)
class Read:
    """Queries [first, last) see the keys [start, end): all, those up to their own place, or as `mask` [n,m] adds."""

    first: int
    last: int
    start: int
    end: int
    causal: bool = False
    mask: Tensor | None = None

    def bias(self, dtype: torch.dtype, device: torch.device, rows: Tensor | None = None) -> Tensor:
        """Return what is added to the logits [n,m] of the queries, or of some of their `rows`."""
        if self.mask is not None:
            return self.mask if rows is None else self.mask[rows]
        rows = torch.arange(self.last - self.first, device=device) if rows is None else rows
        bias = torch.zeros(len(rows), self.end - self.start, dtype=dtype, device=device)
        if self.causal:
            later = torch.arange(self.end - self.start, device=device) > rows[:, None]
            bias.masked_fill_(later, torch.finfo(dtype).min)
        return bias


@dataclass(frozen=True, slots=True)
class Packing:
    """What each token of a row reads: `own` holds every query once and in order, `before` what lies further in front.

    Keys are numbered behind those of a cache. `kept` are the tokens whose output the last layer is asked for.
    """

    own: tuple[Read, ...]
    before: tuple[Read, ...]
    dtype: torch.dtype
    kept: Tensor | None = None
    last: bool = False  # True: the queries are those of the kept tokens alone

    def within(self, window: int, queries_S: Tensor, keys_K: Tensor) -> Packing:
        """Return this packing with no key that lies `window` positions or more before its query."""

        def near(read: Read) -> Read:
            distance = queries_S[read.first : read.last, None] - keys_K[None, read.start : read.end]
            far = distance >= window
            if not bool(far.any()):
                return read
            bias = read.bias(self.dtype, far.device).masked_fill(far, torch.finfo(self.dtype).min)
            return replace(read, causal=False, mask=bias)

        return replace(self, own=tuple(map(near, self.own)), before=tuple(map(near, self.before)))

    def of_kept(self) -> Packing:
        """Return what the kept tokens read, as queries by themselves."""
        assert self.kept is not None
        kept = self.kept
        edges = [edge for read in (*self.own, *self.before) for edge in (read.first, read.last)]
        places = iter(torch.searchsorted(kept, torch.tensor(edges, device=kept.device)).tolist())

        def chosen(reads: Sequence[Read]) -> tuple[Read, ...]:
            found = []
            for read in reads:
                first, last = next(places), next(places)
                if first == last:
                    continue
                fewer = replace(read, first=first, last=last)
                if last - first < read.last - read.first and (read.causal or read.mask is not None):
                    rows = kept[first:last] - read.first
                    fewer = replace(fewer, causal=False, mask=read.bias(self.dtype, kept.device, rows))
                found.append(fewer)
            return tuple(found)

        return Packing(chosen(self.own), chosen(self.before), self.dtype, kept, last=True)

    def mixed(self, q: Tensor, k: Tensor, v: Tensor, scale: float, sinks_H: Tensor | None = None) -> Tensor:
        """Return softmax(scale q k) v [1,H,S,d'] of queries [1,H,S,d] in groups that share keys and values [1,G,K,d].

        `sinks` [H] are further logits, whose values are 0.
        """
        heads, length, wide = q.shape[1], q.shape[2], v.shape[-1]
        groups = k.shape[1]
        # The kernel wants queries, keys and values of one width.
        width = max(q.shape[-1], wide)
        q, k, v = (x if x.shape[-1] == width else F.pad(x, (0, width - x.shape[-1])) for x in (q, k, v))
        if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)):
            assert not self.before, "only sequences that share nothing are trained on"
            assert sinks_H is None, "what sums of exponentials are used for has no gradient here"
            if torch.is_autocast_enabled(q.device.type):  # as torch's own attention does
                q, k, v = (x.to(torch.get_autocast_dtype(q.device.type)) for x in (q, k, v))
            trained: Tensor = _Sequences.apply(q, k, v, self.own, scale)  # type: ignore[no-untyped-call]
            return trained[..., :wide]
        q = q[0].unflatten(0, (groups, heads // groups))
        k, v = (x[0].unsqueeze(1).expand(-1, heads // groups, -1, -1) for x in (k, v))
        y = q.new_empty(q.shape, dtype=torch.float)
        sums = q.new_empty(q.shape[:3], dtype=torch.float)
        asking, asked = ([(read.first, read.last) for read in self.own], [(read.start, read.end) for read in self.own])
        parts = (_parts(q, asking), _parts(k, asked), _parts(v, asked), _parts(y, asking), _parts(sums, asking))
        for read, own_q, own_k, own_v, own_y, own_sums in zip(self.own, *parts, strict=True):
            for whole, part in zip((own_y, own_sums), _read(read, own_q, own_k, own_v, scale), strict=True):
                whole.copy_(part)
        for read in self.before:
            rows, keys = slice(read.first, read.last), slice(read.start, read.end)
            more, more_sums = _read(read, q[:, :, rows], k[:, :, keys], v[:, :, keys], scale)
            known = sums[:, :, rows]
            y[:, :, rows].lerp_(more.float(), torch.sigmoid(more_sums - known).unsqueeze(-1))
            torch.logaddexp(known, more_sums, out=known)
        if sinks_H is not None:
            y.mul_(torch.sigmoid(sums - sinks_H.float().view(groups, -1, 1)).unsqueeze(-1))
        return y.view(1, heads, length, width)[..., :wide].to(q.dtype)


class _Sequences(torch.autograd.Function):
    """Attention [1,H,S,d] of a row's sequences, each over itself alone, with its gradients."""

    @staticmethod
    def forward(ctx: BackwardCFunction, q: Tensor, k: Tensor, v: Tensor, own: tuple[Read, ...], scale: float) -> Tensor:
        y = _as_heads(q)
        sums = []
        for read, (q_n, k_n, v_n, y_n) in zip(own, _of_reads(own, k.shape[1], q, k, v, y), strict=True):
            found, found_sums = _read(read, q_n, k_n, v_n, scale)
            y_n.copy_(found)
            sums.append(found_sums)
        ctx.save_for_backward(q, k, v, y, *sums)
        ctx.own, ctx.scale = own, scale  # type: ignore[attr-defined]
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: BackwardCFunction, d_y: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, y, *sums = list(ctx.saved_tensors)
        own, scale = ctx.own, ctx.scale  # type: ignore[attr-defined]
        d_q, d_k, d_v = _as_heads(q), _as_heads(k), _as_heads(v)
        parts = _of_reads(own, k.shape[1], q, k, v, y, d_y, d_q)
        for read, found_sums, (q_n, k_n, v_n, y_n, d_y_n, d_q_n) in zip(own, sums, parts, strict=True):
            found_q, found_k, found_v = _kernel_backward(
                d_y_n, q_n, k_n, v_n, y_n, found_sums, 0.0, read.causal, attn_mask=read.mask, scale=scale
            )
            d_q_n.copy_(found_q)
            for whole, found in ((d_k, found_k), (d_v, found_v)):
                torch.sum(found, 1, out=whole[0, :, read.start : read.end])
        return d_q, d_k, d_v, None, None


def _as_heads(x_1HSd: Tensor) -> Tensor:
    """Return empty memory of that shape, where the heads of a token lie behind one another."""
    return x_1HSd.new_empty(*(x_1HSd.shape[at] for at in (0, 2, 1, 3))).transpose(1, 2)


def _of_reads(
    own: Sequence[Read], groups: int, q: Tensor, k: Tensor, v: Tensor, *as_q: Tensor
) -> Iterator[tuple[Tensor, ...]]:
    """Yield of each read its queries, keys and values [G,h,n,d], and its part of what is laid out as queries are."""
    asking, asked = ([(read.first, read.last) for read in own], [(read.start, read.end) for read in own])
    by_group = [x[0].unflatten(0, (groups, -1)) for x in (q, *as_q)]
    shared = [x[0].unsqueeze(1).expand(-1, by_group[0].shape[1], -1, -1) for x in (k, v)]
    of_q, *rest = (_parts(x, asking) for x in by_group)
    return zip(of_q, *(_parts(x, asked) for x in shared), *rest, strict=True)


def _parts(x: Tensor, bounds: Sequence[tuple[int, int]]) -> Sequence[Tensor]:
    """Return stretches of the third dimension, at once where each begins at the end of the one before."""
    if all(one[1] == other[0] for one, other in pairwise(bounds)):
        whole = x[:, :, bounds[0][0] : bounds[-1][1]]
        return torch.split(whole, [end - start for start, end in bounds], dim=2)
    return [x[:, :, start:end] for start, end in bounds]


def _read(read: Read, q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Return the attention [G,h,n,d] of queries over keys, and the log of the sum of exponentials [G,h,n]."""
    y, sums = _kernel(q, k, v, 0.0, read.causal, attn_mask=read.mask, scale=scale)
    return y, sums
