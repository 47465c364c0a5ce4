"""Micro-batches of examples without their padding: one row, in which each example sees itself alone.

Examples are padded to the longest of their micro-batch, which makes most of what a step computes (60 % at scale tiny).
No value depends on it but by the order of sums. A GPU keeps the padding: its kernels want equal lengths.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from jobs.data.packing import IGNORED, Batch
from jobs.models.backbones import CausalLM
from jobs.models.packing import Packing, Read
from jobs.moe.host import visible
from jobs.moe.products import ROWS
from jobs.node import machine
from orchestrator.catalog.losses import LOAD_VARIANTS
from orchestrator.spec.cell import BalanceSpec


@dataclass(frozen=True, slots=True)
class Row:
    """The real tokens of a micro-batch behind one another, [1,S] each, and what they see of each other.

    `padding` is True for what fills the row up behind them, None where nothing does.
    """

    input_ids: Tensor
    labels: Tensor
    position_ids: Tensor
    packing: Packing
    padding: Tensor | None


def fits(model: CausalLM, balance: BalanceSpec, batch: Batch) -> bool:
    """Return whether the model and its losses look at tokens one by one, wherever in a batch they stand."""
    per_sequence = (LOAD_VARIANTS[balance.aux_variant] or balance.aux_group) == "sequence"
    return (
        visible(batch.input_ids)
        and batch.images is None
        and not model.spec.attention_sinks  # their gradients are those of sums that no kernel gives
        and model.cacheable
        and not per_sequence
        and not balance.losses  # another package's may read the record's rows
        and not bool(batch.attention_mask.all())
    )


def unpadded(batch: Batch, dtype: torch.dtype) -> Row:
    """Return a batch as one row; `dtype` is that of the attention's logits.

    Where products want whole multiples of some number of rows, padding fills it up.
    """
    real = batch.attention_mask.bool()
    lengths = [length for length in real.sum(1).tolist() if length]
    more = -sum(lengths) % ROWS if machine.has_fast_products() else 0
    stretches = [*lengths, more] if more else lengths
    ends = torch.tensor(stretches).cumsum(0).tolist()
    own = tuple(Read(end - size, end, end - size, end, causal=True) for size, end in zip(stretches, ends, strict=True))
    padding = (torch.arange(ends[-1]) >= ends[-1] - more).unsqueeze(0) if more else None
    return Row(
        F.pad(batch.input_ids[real], (0, more)).unsqueeze(0),
        F.pad(batch.labels[real], (0, more), value=IGNORED).unsqueeze(0),
        torch.cat([torch.arange(size) for size in stretches]).unsqueeze(0),
        Packing(own, (), dtype),
        padding,
    )
