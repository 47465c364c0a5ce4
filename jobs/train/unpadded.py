"""Micro-batches of examples without their padding: one row, in which each example sees itself alone.

Examples are padded to the longest of their micro-batch, which makes most of what a step computes (60 % at scale tiny).
No value depends on it but by the order of sums. A GPU keeps the padding: its kernels want equal lengths.
"""

from __future__ import annotations

from collections.abc import Sequence
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
from orchestrator.spec.cell import BalanceSpec, TrainSpec


@dataclass(frozen=True, slots=True)
class Row:
    """The real tokens of a micro-batch behind one another, [1,S] each, and what they see of each other.

    `sizes` are the tokens of each micro-batch. `padding` is True for what fills the row up behind them, and is counted
    to the last one; None where nothing does.
    """

    input_ids: Tensor
    labels: Tensor
    position_ids: Tensor
    packing: Packing
    padding: Tensor | None
    sizes: tuple[int, ...]


def fits(model: CausalLM, balance: BalanceSpec, batch: Batch) -> bool:
    """Return whether the model and its losses look at tokens one by one, wherever in a batch they stand."""
    per_sequence = (LOAD_VARIANTS[balance.aux_variant] or balance.aux_group) == "sequence"
    return (
        visible(batch.input_ids)
        and batch.images is None
        and not model.spec.attention_sinks  # their gradients are those of sums that no kernel gives
        and model.cacheable
        and model.spec.moe.choice == "token"  # experts with thresholds learn them from the best tokens of a row
        and not per_sequence
        and not balance.losses  # another package's may read the record's rows
        and not bool(batch.attention_mask.all())
    )


def together(model: CausalLM, train: TrainSpec, batches: Sequence[Batch]) -> list[int]:
    """Return how many micro-batches, in turn, are one row: as many as have the tokens that a full one may have."""
    most, found, room = train.micro_batch * train.sequence_length, [0], 0
    for batch in batches:
        size = int(batch.attention_mask.sum()) if fits(model, train.balance, batch) else most
        if size > room:
            found.append(0)
            room = most
        found[-1] += 1
        room -= size
    return found[1:]


def unpadded(batches: Sequence[Batch], dtype: torch.dtype) -> Row:
    """Return micro-batches as one row; `dtype` is that of the attention's logits.

    Where products want whole multiples of some number of rows, padding fills it up.
    """
    real = [batch.attention_mask.bool() for batch in batches]
    lengths = [length for mask in real for length in mask.sum(1).tolist() if length]
    more = -sum(lengths) % ROWS if machine.has_fast_products() else 0
    stretches = [*lengths, more] if more else lengths
    ends = torch.tensor(stretches).cumsum(0).tolist()
    own = tuple(Read(end - size, end, end - size, end, causal=True) for size, end in zip(stretches, ends, strict=True))
    ids = [batch.input_ids[mask] for batch, mask in zip(batches, real, strict=True)]
    labels = [batch.labels[mask] for batch, mask in zip(batches, real, strict=True)]
    *first, last = map(len, ids)
    return Row(
        F.pad(torch.cat(ids), (0, more)).unsqueeze(0),
        F.pad(torch.cat(labels), (0, more), value=IGNORED).unsqueeze(0),
        torch.cat([torch.arange(size) for size in stretches]).unsqueeze(0),
        Packing(own, (), dtype),
        (torch.arange(ends[-1]) >= ends[-1] - more).unsqueeze(0) if more else None,
        (*first, last + more),
    )
