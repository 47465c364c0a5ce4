"""Profiling for C2R: which experts serve the same tokens of a phase's first micro-batches."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from jobs.data.packing import Batches
from jobs.models.backbones import CausalLM
from jobs.moe.collaboration import collaboration_lists, set_collaboration
from orchestrator.errors import MoegridError

# Co-activations of this many micro-batches make C2R's lists.
PROFILE_BATCHES = 16


def profiling_sample(
    source: Batches, micro_batch: int, unit: str | None
) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
    """Yield (input_ids, attention_mask, spans) of the phase's first micro-batches: C2R's lists are counted on them."""
    for step in range(PROFILE_BATCHES):
        batch = source.micro_batch(step, 0, micro_batch)
        yield batch.input_ids, batch.attention_mask, batch.spans(unit)


@torch.no_grad()
def profile_collaboration(model: CausalLM, sample: Iterable[tuple[Tensor, Tensor, Tensor | None]]) -> None:
    """Set each layer's lists from its co-activations on a sample of (input_ids, attention_mask, spans).

    Profiling routes without a limit. The lists are buffers of the router: saved with the model, frozen after this.
    """
    was_training = model.training
    model.eval()
    for block in model.moe_blocks:
        allowed = block.router.allowed
        if allowed is None:
            raise MoegridError("this model has no collaboration lists", hint="set model.moe.collaboration_top")
        allowed.fill_(True)
    chosen: list[list[Tensor]] = [[] for _ in model.moe_blocks]
    device = next(model.parameters()).device
    for input_ids, attention_mask, spans in sample:
        spans = None if spans is None else spans.to(device)
        mask = attention_mask.to(device)
        routings = model(input_ids.to(device), attention_mask=mask, spans=spans, logits_to_keep=1).routings
        for layer, routing in enumerate(routings):
            chosen[layer].append(routing.indices)
    for block, indices in zip(model.moe_blocks, chosen, strict=True):
        length = block.moe.collaboration_top
        set_collaboration(block, collaboration_lists(torch.cat(indices), block.moe.num_experts, length))
    model.train(was_training)
