"""Attention of many sequences that lie behind one another in one row, where what they share stands once.

A row holds trees of tokens in depth-first order: whatever goes on from a run of tokens is one stretch behind it. So a
run is read by all its descendants in one product without a mask, and by its own tokens in a causal one; the two are
merged by their sums of exponentials, as blocks of keys are in FlashAttention (Dao et al. 2022, section 3.1). Nothing is
padded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

# The kernel behind torch's scaled_dot_product_attention on a CPU: it also gives the logarithms of the sums.
_kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


@dataclass(frozen=True, slots=True)
class Read:
    """Queries [first, last) see the keys [start, end): all, those up to their own place, or as `mask` [n,m] adds."""

    first: int
    last: int
    start: int
    end: int
    causal: bool = False
    mask: Tensor | None = None

    def bias(self, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return what is added to the logits [n,m]."""
        if self.mask is not None:
            return self.mask
        bias = torch.zeros(self.last - self.first, self.end - self.start, dtype=dtype, device=device)
        if self.causal:
            bias.masked_fill_(torch.ones_like(bias, dtype=torch.bool).triu_(1), torch.finfo(dtype).min)
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
                    fewer = replace(fewer, causal=False, mask=read.bias(self.dtype, kept.device)[rows])
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
        q = q[0].unflatten(0, (groups, heads // groups))
        k, v = (x[0].unsqueeze(1).expand(-1, heads // groups, -1, -1) for x in (k, v))
        y_SHd = q.new_empty(length, heads, width, dtype=torch.float)
        sums_SH = q.new_empty(length, heads, dtype=torch.float)
        for read in self.own:
            y, sums = _read(read, q, k, v, scale)
            y_SHd[read.first : read.last] = y
            sums_SH[read.first : read.last] = sums
        for read in self.before:
            y, sums = _read(read, q, k, v, scale)
            known = sums_SH[read.first : read.last]
            y_SHd[read.first : read.last].lerp_(y, torch.sigmoid(sums - known).unsqueeze(-1))
            torch.logaddexp(known, sums, out=known)
        if sinks_H is not None:
            y_SHd.mul_(torch.sigmoid(sums_SH - sinks_H.float()).unsqueeze(-1))
        return y_SHd[..., :wide].to(q.dtype).unsqueeze(0).transpose(1, 2)


def _read(read: Read, q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Return the attention [n,H,d] of a read's queries over its keys, and the log of the sum of exponentials [n,H]."""
    y, sums = _kernel(
        q[:, :, read.first : read.last],
        k[:, :, read.start : read.end],
        v[:, :, read.start : read.end],
        0.0,
        read.causal,
        attn_mask=read.mask,
        scale=scale,
    )
    return y.flatten(0, 1).transpose(0, 1).float(), sums.flatten(0, 1).transpose(0, 1)
